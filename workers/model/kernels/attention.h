// Attention of a narrow step over pages of committed rows and the step's own tree rows.
//
// A row's keys stand in one order: its path, then the tree rows it sees. They are cut into chunks of CHUNK keys at the
// same places for every row; a task computes one chunk for all rows that see it (threads that share pages share the
// task, and the keys are read once), and a last pass joins each row's chunks in order. As in product.h, a row's result
// depends on no other row: a token gets the same bits as a tree row as it gets alone.
#pragma once

#include <memory>
#include <tuple>
#include <vector>

#include "product.h"

namespace polydecode {

constexpr int PAGE_ROWS = 16;    // as in pages.py
constexpr int CHUNK_PAGES = 8;   // as in plan.py
constexpr int CHUNK = PAGE_ROWS * CHUNK_PAGES;
constexpr float UNSEEN = -1e30f;

// Where one layer keeps its keys and values, float[heads, slots, width]; strides in elements. As in kv.py.
struct LayerCache {
  float *keys, *values;
  int64_t key_head_stride, value_head_stride, key_width, value_width;
};

// A step's rows, T of them, and its items: chunks of pages with the rows that see them. See plan.py.
struct Step {
  int64_t rows = 0, items = 0, partials = 0, step_base = 0;
  const LayerCache* layers = nullptr;
  const int64_t *slots, *positions, *stops, *first_partial, *tree_offsets, *tree_keys;
  const int64_t *item_chunks, *item_pages, *item_offsets, *item_rows;
};

// float[heads, rows, width] with the strides of a view; the last dimension is contiguous.
struct HeadRows {
  const float* at;
  int64_t head_stride, row_stride;
  const float* operator()(int64_t head, int64_t row) const { return at + head * head_stride + row * row_stride; }
};

struct Attention {
  const Step& step;
  const LayerCache& cache;
  HeadRows queries, keys, values;
  int64_t heads, key_heads;
  float scale;
  int64_t window;       // 0: none
  float softcap;        // 0: none
  const float* sinks;   // float[heads] or null
  float* out;           // float[rows, heads, value_width]
  std::unique_ptr<float[]> partials;  // [partials, heads, 2 + value_width]: largest score, sum of weights, weighted values

  int64_t groups() const { return heads / key_heads; }
  int64_t partial_width() const { return 2 + cache.value_width; }
  float* partial(int64_t row, int64_t chunk, int64_t head) {
    return partials.get() + ((step.first_partial[row] + chunk) * heads + head) * partial_width();
  }
  const float* key(int64_t head, int64_t slot) const {
    return cache.keys + head * cache.key_head_stride + slot * cache.key_width;
  }
  const float* value(int64_t head, int64_t slot) const {
    return cache.values + head * cache.value_head_stride + slot * cache.value_width;
  }

  // The tree rows among a row's keys of one chunk: (place in the chunk, step row).
  template <typename Work>
  void each_tree_key(int64_t row, int64_t first_key, const Work& work) const {
    for (int64_t t = step.tree_offsets[row]; t < step.tree_offsets[row + 1]; t++) {
      const int64_t at = step.stops[row] + (t - step.tree_offsets[row]) - first_key;
      if (at >= 0 && at < CHUNK) work(at, step.tree_keys[t]);
    }
  }

  void store() const;
  void item(int64_t item, int64_t key_head);
  void join(int64_t row, int64_t head);
};

// exp to about one unit in the last place; 0 below -87. One code for vectors and single values: equal bits.
inline Floats exp_lanes(Floats x) {
  const Floats n = __builtin_convertvector(__builtin_convertvector(x * 1.44269504f - 0.5f, Ints), Floats);
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return x < -87.0f ? Floats{} : y * load<Floats>((const float*)&power);
}

inline float exp_one(float x) { return exp_lanes(Floats{} + x)[0]; }

// Put the step's own keys and values where its slots say.
inline void Attention::store() const {
  for (int64_t row = 0; row < step.rows; row++)
    for (int64_t head = 0; head < key_heads; head++) {
      const int64_t slot = step.slots[row];
      std::memcpy((float*)key(head, slot), keys(head, row), cache.key_width * sizeof(float));
      std::memcpy((float*)value(head, slot), values(head, row), cache.value_width * sizeof(float));
    }
}

// sum + a * b as the vectors compute it, in whatever loop the compiler makes of it.
inline float added(float sum, float a, float b) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

// A dot product in the one order that all scores have: even places and odd places, each from the left.
inline float dot(const float* a, const float* b, int64_t width) {
  float even = 0, odd = 0;
  for (int64_t i = 0; i + 1 < width; i += 2) even = added(even, a[i], b[i]), odd = added(odd, a[i + 1], b[i + 1]);
  if (width % 2) even = added(even, a[width - 1], b[width - 1]);
  return even + odd;
}

template <int H, bool Upper, int... Lane>
inline Floats swapped(Floats first, Floats second, std::integer_sequence<int, Lane...>) {
  // Blocks of H lanes: the lower (upper) ones of both vectors, alternating.
  return __builtin_shufflevector(first, second, ((Lane / H % 2 ? LANES + Lane - H : Lane) + (Upper ? H : 0))...);
}

// Transpose LANES vectors of LANES lanes in place.
template <int H = LANES / 2>
inline void transpose(Floats* v) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  for (int i = 0; i < LANES; i++) {
    if (i & H) continue;
    const Floats low = swapped<H, false>(v[i], v[i + H], lanes), high = swapped<H, true>(v[i], v[i + H], lanes);
    v[i] = low, v[i + H] = high;
  }
  if constexpr (H > 1) transpose<H / 2>(v);
}

// Keys float[LANES, width] as float[width, LANES]: scores of LANES keys then take no sums across lanes.
inline void turn(const float* keys, float* turned, int64_t width) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    Floats v[LANES];
#pragma GCC unroll 16
    for (int key = 0; key < LANES; key++) v[key] = load<Floats>(keys + key * width + i);
    transpose(v);
    std::memcpy(turned + i * LANES, v, sizeof v);
  }
  for (; i < width; i++)
    for (int key = 0; key < LANES; key++) turned[i * LANES + key] = keys[key * width + i];
}

// scores[q][0 .. LANES) = queries[q] . keys, in the order of `dot`.
template <int Q>
void score(const float* queries, const float* turned, float* scores, int64_t width) {
  Floats even[Q] = {}, odd[Q] = {};
  int64_t i = 0;
  for (; i + 1 < width; i += 2) {
    const Floats first = load<Floats>(turned + i * LANES), second = load<Floats>(turned + (i + 1) * LANES);
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) even[q] += queries[q * width + i] * first, odd[q] += queries[q * width + i + 1] * second;
  }
  if (i < width)
    for (int q = 0; q < Q; q++) even[q] += queries[q * width + i] * load<Floats>(turned + i * LANES);
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++) {
    even[q] += odd[q];
    std::memcpy(scores + q * CHUNK, &even[q], sizeof even[q]);
  }
}

// sums[q] += weights[q][i] * values[i] for i in order, for some vectors of the value's width.
template <int Q, int C>
void weigh_vectors(const float* weights, const float* const* values, int64_t count, float* const* sums, int64_t column) {
  Floats lanes[Q][C];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) lanes[q][c] = load<Floats>(sums[q] + column + c * LANES);
  for (int64_t i = 0; i < count; i++) {
    Floats v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) v[c] = load<Floats>(values[i] + column + c * LANES);
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) {
      const float weight = weights[q * CHUNK + i];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) lanes[q][c] += weight * v[c];
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) std::memcpy(sums[q] + column + c * LANES, &lanes[q][c], sizeof lanes[q][c]);
}

template <int Q>
void weigh(const float* weights, const float* const* values, int64_t count, float* const* sums, int64_t width) {
  constexpr int C = LANES < 16 ? 1 : Q <= 6 ? 4 : 2;  // as many sums as registers hold
  int64_t column = 0;
  for (; column + C * LANES <= width; column += C * LANES) weigh_vectors<Q, C>(weights, values, count, sums, column);
  for (; column + LANES <= width; column += LANES) weigh_vectors<Q, 1>(weights, values, count, sums, column);
  for (; column < width; column++)
    for (int q = 0; q < Q; q++)
      for (int64_t i = 0; i < count; i++) sums[q][column] = added(sums[q][column], weights[q * CHUNK + i], values[i][column]);
}

// Call `work` with a number of queries up to ROWS as a constant.
template <typename Work>
void with_constant(int64_t queries, const Work& work) {
  switch (queries) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, 3>());
    case 4: return work(std::integral_constant<int, 4>());
    case 5: return work(std::integral_constant<int, 5>());
    case 6: return work(std::integral_constant<int, 6>());
    case 7: return work(std::integral_constant<int, 7>());
    default: return work(std::integral_constant<int, 8>());
  }
}

inline void prefetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// The weights of CHUNK scores, exp(score - largest), in their place. Returns the largest score and the weights' sum.
inline std::pair<float, float> soften(float* scores, float softcap) {
  if (softcap)
    for (int i = 0; i < CHUNK; i++)
      if (scores[i] > UNSEEN) scores[i] = std::tanh(scores[i] / softcap) * softcap;
  Floats most = load<Floats>(scores);
  for (int i = LANES; i < CHUNK; i += LANES) {
    const Floats lanes = load<Floats>(scores + i);
    most = lanes > most ? lanes : most;
  }
  float largest = most[0];
  for (int lane = 1; lane < LANES; lane++) largest = std::max(largest, most[lane]);
  Floats sums{};
  for (int i = 0; i < CHUNK; i += LANES) {
    const Floats lanes = load<Floats>(scores + i);
    const Floats weight = lanes <= UNSEEN ? Floats{} : exp_lanes(lanes - largest);
    sums += weight;
    std::memcpy(scores + i, &weight, sizeof weight);
  }
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sums[lane];
  return {largest, total};
}

// One chunk of keys of one key head, for all rows of the item and all query heads of the group.
inline void Attention::item(int64_t item, int64_t key_head) {
  const int64_t chunk = step.item_chunks[item], first_key = chunk * CHUNK;
  const int64_t* pages = step.item_pages + item * CHUNK_PAGES;
  const int64_t* rows = step.item_rows + step.item_offsets[item];
  const int64_t width = cache.key_width, value_width = cache.value_width, group = groups();
  const int64_t row_count = step.item_offsets[item + 1] - step.item_offsets[item], query_count = row_count * group;
  const auto in_chunk = [&](int64_t place) { return std::clamp<int64_t>(place - first_key, 0, CHUNK); };
  const auto oldest = [&](int64_t row) { return window ? std::max<int64_t>(0, step.positions[row] - window + 1) : 0; };
  int64_t from = CHUNK, to = 0;  // the chunk's committed keys that some row sees
  for (int64_t i = 0; i < row_count; i++) {
    from = std::min(from, in_chunk(oldest(rows[i])));
    to = std::max(to, in_chunk(step.stops[rows[i]]));
  }
  const auto slot = [&](int64_t i) { return pages[i / PAGE_ROWS] * PAGE_ROWS + i % PAGE_ROWS; };
  static thread_local std::vector<Floats> room;
  room.resize((CHUNK + ROWS) * width / LANES + 2);
  float *turned = (float*)room.data(), *query = turned + CHUNK * width;
  const float* lines[CHUNK];
  for (int64_t i = from / LANES * LANES; i < to; i += LANES) {
    if (i + LANES < to) prefetch(key(key_head, slot(i + LANES)), LANES * width);
    prefetch(value(key_head, slot(i)), LANES * value_width);
    turn(key(key_head, slot(i)), turned + i * width, width);
  }
  for (int64_t i = from; i < to; i++) lines[i] = value(key_head, slot(i));
  alignas(64) float scores[ROWS * CHUNK];
  const int64_t passes = (query_count + ROWS - 1) / ROWS;
  for (int64_t pass = 0, start = 0, count; pass < passes; pass++, start += count) {
    count = (query_count - start - 1) / (passes - pass) + 1;
    const auto row_of = [&](int64_t q) { return rows[(start + q) / group]; };
    const auto head_of = [&](int64_t q) { return key_head * group + (start + q) % group; };
    const auto sums_of = [&](int64_t q) { return partial(row_of(q), chunk, head_of(q)); };
    for (int64_t q = 0; q < count; q++)
      for (int64_t i = 0; i < width; i++) query[q * width + i] = queries(head_of(q), row_of(q))[i] * scale;
    std::fill_n(scores, count * CHUNK, UNSEEN);
    with_constant(count, [&](auto constant) {
      for (int64_t i = from / LANES * LANES; i < to; i += LANES) score<constant>(query, turned + i * width, scores + i, width);
    });
    float* sums[ROWS];
    for (int64_t q = 0; q < count; q++) {
      const int64_t row = row_of(q);
      float* own = scores + q * CHUNK;
      std::fill(own, own + in_chunk(oldest(row)), UNSEEN);
      std::fill(own + in_chunk(step.stops[row]), own + CHUNK, UNSEEN);
      each_tree_key(row, first_key, [&](int64_t at, int64_t seen) {
        if (step.positions[seen] >= oldest(row)) own[at] = dot(query + q * width, key(key_head, step.step_base + seen), width);
      });
      float* partial = sums_of(q);
      std::tie(partial[0], partial[1]) = soften(own, softcap);
      sums[q] = partial + 2;
      std::fill_n(sums[q], value_width, 0.0f);
    }
    if (from < to)
      with_constant(count, [&](auto constant) { weigh<constant>(scores + from, lines + from, to - from, sums, value_width); });
    for (int64_t q = 0; q < count; q++)
      each_tree_key(row_of(q), first_key, [&](int64_t at, int64_t seen) {
        const float* line = value(key_head, step.step_base + seen);
        weigh<1>(scores + q * CHUNK + at, &line, 1, sums + q, value_width);
      });
  }
}

// Join a row's chunks.
inline void Attention::join(int64_t row, int64_t head) {
  const int64_t chunks = step.first_partial[row + 1] - step.first_partial[row], width = cache.value_width;
  float largest = sinks ? sinks[head] : UNSEEN;
  for (int64_t c = 0; c < chunks; c++) largest = std::max(largest, partial(row, c, head)[0]);
  float total = sinks ? exp_one(sinks[head] - largest) : 0;
  float* result = out + (row * heads + head) * width;
  std::fill_n(result, width, 0.0f);
  for (int64_t c = 0; c < chunks; c++) {
    const float* part = partial(row, c, head);
    if (part[0] <= UNSEEN) continue;
    const float share = exp_one(part[0] - largest);
    total += part[1] * share;
    for (int64_t i = 0; i < width; i++) result[i] += part[2 + i] * share;
  }
  for (int64_t i = 0; i < width; i++) result[i] /= total;
}

}  // namespace polydecode
