// Attention of a narrow step over pages of committed rows and the step's own tree rows.
//
// A row's keys stand in one order: its path, then the tree rows it sees. They are cut into chunks of CHUNK keys at the
// same places for every row; a task computes one chunk for all rows that see it (threads that share pages share the
// task, and the keys are read once), and a last pass joins each row's chunks in order. As in product.h, a row's result
// depends on no other row: a token gets the same bits as a tree row as it gets alone.
#pragma once

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
  std::vector<float> partials;  // [partials, heads, 2 + value_width]: largest score, sum of weights, weighted values

  int64_t groups() const { return heads / key_heads; }
  int64_t partial_width() const { return 2 + cache.value_width; }
  float* partial(int64_t row, int64_t chunk, int64_t head) {
    return partials.data() + ((step.first_partial[row] + chunk) * heads + head) * partial_width();
  }
  const float* key(int64_t head, int64_t slot) const {
    return cache.keys + head * cache.key_head_stride + slot * cache.key_width;
  }
  const float* value(int64_t head, int64_t slot) const {
    return cache.values + head * cache.value_head_stride + slot * cache.value_width;
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

// sums[q] += weights[q][i] * values[i] for i in order; one vector of the value's width at a time.
template <int Q>
void weigh(const float* weights, const float* const* values, int64_t count, float* sums, int64_t width) {
  int64_t column = 0;
  for (; column + LANES <= width; column += LANES) {
    Floats lanes[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) lanes[q] = load<Floats>(sums + q * width + column);
    for (int64_t i = 0; i < count; i++) {
      const Floats v = load<Floats>(values[i] + column);
#pragma GCC unroll 8
      for (int q = 0; q < Q; q++) lanes[q] += weights[q * CHUNK + i] * v;
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) std::memcpy(sums + q * width + column, &lanes[q], sizeof lanes[q]);
  }
  for (; column < width; column++)
    for (int q = 0; q < Q; q++)
      for (int64_t i = 0; i < count; i++) sums[q * width + column] += weights[q * CHUNK + i] * values[i][column];
}

inline void weigh_any(int64_t queries, const float* weights, const float* const* values, int64_t count, float* sums, int64_t width) {
  switch (queries) {
    case 1: return weigh<1>(weights, values, count, sums, width);
    case 2: return weigh<2>(weights, values, count, sums, width);
    case 3: return weigh<3>(weights, values, count, sums, width);
    case 4: return weigh<4>(weights, values, count, sums, width);
    case 5: return weigh<5>(weights, values, count, sums, width);
    case 6: return weigh<6>(weights, values, count, sums, width);
    case 7: return weigh<7>(weights, values, count, sums, width);
    default: return weigh<8>(weights, values, count, sums, width);
  }
}

// One chunk of keys of one key head, for all rows of the item and all query heads of the group.
inline void Attention::item(int64_t item, int64_t key_head) {
  const int64_t chunk = step.item_chunks[item], first_key = chunk * CHUNK;
  const int64_t* pages = step.item_pages + item * CHUNK_PAGES;
  const int64_t* rows = step.item_rows + step.item_offsets[item];
  const int64_t width = cache.key_width, value_width = cache.value_width, group = groups();
  const int64_t queries_total = (step.item_offsets[item + 1] - step.item_offsets[item]) * group;
  std::vector<float> query(ROWS * width), sums(ROWS * value_width);
  alignas(64) float scores[ROWS * CHUNK];
  const float* lines[CHUNK];
  for (int64_t start = 0; start < queries_total; start += ROWS) {
    const int64_t count = std::min<int64_t>(ROWS, queries_total - start);
    const auto row_of = [&](int64_t q) { return rows[(start + q) / group]; };
    const auto head_of = [&](int64_t q) { return key_head * group + (start + q) % group; };
    const auto oldest = [&](int64_t row) { return window ? std::max<int64_t>(0, step.positions[row] - window + 1) : 0; };
    int64_t path_from = CHUNK, path_to = 0;  // the chunk's keys that some row sees
    for (int64_t q = 0; q < count; q++) {
      const int64_t row = row_of(q);
      path_from = std::min(path_from, std::clamp<int64_t>(oldest(row) - first_key, 0, CHUNK));
      path_to = std::max(path_to, std::clamp<int64_t>(step.stops[row] - first_key, 0, CHUNK));
      for (int64_t i = 0; i < width; i++) query[q * width + i] = queries(head_of(q), row)[i] * scale;
    }
    std::fill_n(scores, count * CHUNK, UNSEEN);
    for (int64_t page = path_from / PAGE_ROWS; page * PAGE_ROWS < path_to; page++) {
      const int64_t offset = page * PAGE_ROWS, valid = std::min<int64_t>(PAGE_ROWS, path_to - offset);
      block(Product<Float32>{query.data(), key(key_head, pages[page] * PAGE_ROWS), scores + offset, width, width, CHUNK}, count, valid);
    }
    std::fill_n(sums.data(), count * value_width, 0.0f);
    for (int64_t q = 0; q < count; q++) {
      const int64_t row = row_of(q);
      float* own = scores + q * CHUNK;
      std::fill(own, own + std::clamp<int64_t>(oldest(row) - first_key, 0, CHUNK), UNSEEN);
      std::fill(own + std::clamp<int64_t>(step.stops[row] - first_key, 0, CHUNK), own + CHUNK, UNSEEN);
      for (int64_t t = step.tree_offsets[row]; t < step.tree_offsets[row + 1]; t++) {
        const int64_t at = step.stops[row] + (t - step.tree_offsets[row]) - first_key, seen = step.tree_keys[t];
        if (at < 0 || at >= CHUNK || step.positions[seen] < oldest(row)) continue;
        block(Product<Float32>{query.data() + q * width, key(key_head, step.step_base + seen), own + at, width, width, CHUNK}, 1, 1);
      }
      float largest = UNSEEN;
      for (int i = 0; i < CHUNK; i++) {
        if (softcap && own[i] > UNSEEN) own[i] = std::tanh(own[i] / softcap) * softcap;
        largest = std::max(largest, own[i]);
      }
      Floats sum{};
      for (int i = 0; i < CHUNK; i += LANES) {
        const Floats lanes = load<Floats>(own + i);
        const Floats weight = lanes <= UNSEEN ? Floats{} : exp_lanes(lanes - largest);
        sum += weight;
        std::memcpy(own + i, &weight, sizeof weight);
      }
      float* partial = this->partial(row, chunk, head_of(q));
      partial[0] = largest;
      partial[1] = 0;
      for (int lane = 0; lane < LANES; lane++) partial[1] += sum[lane];
    }
    for (int64_t i = path_from; i < path_to; i++) lines[i] = value(key_head, pages[i / PAGE_ROWS] * PAGE_ROWS + i % PAGE_ROWS);
    if (path_from < path_to) weigh_any(count, scores + path_from, lines + path_from, path_to - path_from, sums.data(), value_width);
    for (int64_t q = 0; q < count; q++) {
      const int64_t row = row_of(q);
      for (int64_t t = step.tree_offsets[row]; t < step.tree_offsets[row + 1]; t++) {
        const int64_t at = step.stops[row] + (t - step.tree_offsets[row]) - first_key;
        if (at < 0 || at >= CHUNK) continue;
        const float* line = value(key_head, step.step_base + step.tree_keys[t]);
        weigh<1>(scores + q * CHUNK + at, &line, 1, sums.data() + q * value_width, value_width);
      }
      std::memcpy(partial(row, chunk, head_of(q)) + 2, sums.data() + q * value_width, value_width * sizeof(float));
    }
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
