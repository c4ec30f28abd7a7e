// Skinny products: few rows times a matrix that is read once from memory, the shape of a decoding step.
//
// A tile of R rows by C columns stays in registers while one pass runs along the inner dimension. Weights are read where
// they lie (row-major, [out, in], as nn.Linear keeps them): nothing is packed or copied. Every sum runs over the same
// lanes in the same order however many rows there are, so a row's result does not depend, bit for bit, on the rows
// beside it. Where there are tiles (amx.h), they take over beyond a few rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace polydecode {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
typedef VectorOf<float, LANES>::type Floats;
typedef VectorOf<int32_t, LANES>::type Ints;
typedef VectorOf<int16_t, 2 * LANES>::type Shorts;

template <typename V, typename T>
inline V load(const T* from) {
  V loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

// Halving sums: lanes [0, H) + [H, 2H) of every 2H lanes of `first`, then of `second`.
template <int H, typename V, int... Lane>
inline V halved(V first, V second, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(first, second, (Lane / H * 2 * H + Lane % H)...) +
         __builtin_shufflevector(first, second, (Lane / H * 2 * H + Lane % H + H)...);
}

// The sums over all lanes of LANES vectors, as one vector. The order of each sum is the same whatever stands beside it.
template <typename V, int H = LANES / 2>
inline V totals(V* vectors) {
  for (int pair = 0; pair < H; pair++)
    vectors[pair] = halved<H>(vectors[2 * pair], vectors[2 * pair + 1], std::make_integer_sequence<int, LANES>());
  if constexpr (H > 1) return totals<V, H / 2>(vectors);
  return vectors[0];
}

// float32 rows times float32 weights.
struct Float32 {
  using Input = float;
  using Weight = float;
  using Lanes = Floats;
  static constexpr int STEP = LANES;
  static Floats weights(const float* from) { return load<Floats>(from); }
  static Floats inputs(const float* from) { return load<Floats>(from); }
  static void add(Floats& sum, Floats input, Floats weight) { sum += input * weight; }
};

// Rows rounded to int16 (see round_row) times int8 weights: each lane's sum is exact, the lanes are added as floats.
struct Int8 {
  using Input = int16_t;
  using Weight = int8_t;
  using Lanes = Ints;
  static constexpr int STEP = 2 * LANES;
  static Shorts inputs(const int16_t* from) { return load<Shorts>(from); }
  static Shorts weights(const int8_t* from) {
#if defined(__AVX512BW__)
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#else
    return __builtin_convertvector(load<VectorOf<int8_t, STEP>::type>(from), Shorts);
#endif
  }
  static void add(Ints& sum, Shorts input, Shorts weight) {
#if defined(__AVX512VNNI__)
    sum = (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)input, (__m512i)weight);
#elif defined(__AVX512BW__)
    sum += (Ints)_mm512_madd_epi16((__m512i)input, (__m512i)weight);
#elif defined(__AVX2__)
    sum += (Ints)_mm256_madd_epi16((__m256i)input, (__m256i)weight);
#else
    for (int lane = 0; lane < LANES; lane++)
      sum[lane] += (int32_t)input[2 * lane] * weight[2 * lane] + (int32_t)input[2 * lane + 1] * weight[2 * lane + 1];
#endif
  }
};
// The largest rounded input with which no lane can overflow.
inline float rounded_max(int64_t in) {
  const int64_t products = in / LANES + 2;  // of one lane
  return (float)std::min<int64_t>(32767, ((int64_t)1 << 31) / 128 / products);
}

// One product of rows[count, in] and weights[out, in], to out[count, out_stride]. in_stride is at least in.
template <typename Kind>
struct Product {
  const typename Kind::Input* rows;
  const typename Kind::Weight* weights;
  float* out;
  int64_t in, in_stride, out_stride;
};

// Cache lines to ask for during a tile: the columns that come next, a share of them in each pass over the rows.
template <typename Weight>
struct Ahead {
  const Weight* from;
  int64_t step;
};

// Write the totals of R * C vectors of lanes to a tile; inputs from `done` on are still missing in them.
template <typename Kind, int R, int C>
__attribute__((noinline)) void finish(typename Kind::Lanes* lanes, const Product<Kind>& p, int64_t done) {
  Floats floats[(R * C + LANES - 1) / LANES * LANES] = {}, sums[(R * C + LANES - 1) / LANES];
  for (int k = 0; k < R * C; k++) floats[k] = __builtin_convertvector(lanes[k], Floats);
  for (int first = 0; first < R * C; first += LANES) sums[first / LANES] = totals(floats + first);
  float* sum = (float*)sums;
  for (int k = 0; done < p.in && k < R * C; k++)
    for (int64_t i = done; i < p.in; i++)
      sum[k] += (float)p.rows[k / C * p.in_stride + i] * (float)p.weights[k % C * p.in + i];
  for (int r = 0; r < R; r++) std::memcpy(p.out + r * p.out_stride, sum + r * C, C * sizeof *sum);
}

template <typename Kind, int R, int C>
void tile(const Product<Kind>& p, Ahead<typename Kind::Weight> ahead) {
  typename Kind::Lanes sums[R][C] = {};
  const int64_t in = p.in, stride = p.in_stride;
  const typename Kind::Input* rows = p.rows;
  const typename Kind::Weight* weights = p.weights;
  int64_t i = 0;
  for (; i + Kind::STEP <= in; i += Kind::STEP, ahead.from += ahead.step) {
    decltype(Kind::weights(weights)) w[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      w[c] = Kind::weights(weights + c * in + i);
      if (ahead.step) __builtin_prefetch(ahead.from + c * in, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      auto x = Kind::inputs(rows + r * stride + i);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) Kind::add(sums[r][c], x, w[c]);
    }
  }
  // Through memory: sums stay in registers during the loop only if nothing takes their address.
  typename Kind::Lanes lanes[(R * C + LANES - 1) / LANES * LANES];
#pragma GCC unroll 32
  for (int k = 0; k < R * C; k++) lanes[k] = sums[k / C][k % C];
  finish<Kind, R, C>(lanes, p, i);
}

constexpr int ROWS = 8;      // rows of a tile at most
constexpr int COLUMNS = 12;  // columns that all rows go over before the next ones are read

// Columns a tile of R rows takes: as many sums as registers hold.
template <int R>
constexpr int WIDTH = LANES < 16 ? (R <= 2 ? 4 : R <= 4 ? 2 : 1) : (R == 1 ? 6 : R <= 4 ? 4 : 3);

template <typename Kind, int R>
void strip(Product<Kind> p, int64_t columns, Ahead<typename Kind::Weight> ahead) {
  constexpr int C = WIDTH<R>;
  int64_t column = 0;
  for (; column + C <= columns; column += C) {
    tile<Kind, R, C>(p, ahead);
    p.weights += C * p.in, p.out += C, ahead.from += C * p.in;
  }
  for (; column < columns; column++) {
    tile<Kind, R, 1>(p, ahead);
    p.weights += p.in, p.out += 1, ahead.from += p.in;
  }
}

// Any number of rows times a few columns, in passes of nearly equal height. `more` is how many columns follow these.
template <typename Kind>
void block(Product<Kind> p, int64_t rows, int64_t columns, int64_t more = 0) {
  const int64_t passes = (rows + ROWS - 1) / ROWS;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t height = (rows - 1) / (passes - pass) + 1;
    const bool fetch = more >= columns;
    Ahead<typename Kind::Weight> ahead{p.weights + columns * p.in + pass * p.in / passes, fetch ? (Kind::STEP + passes - 1) / passes : 0};
    switch (height) {
      case 1: strip<Kind, 1>(p, columns, ahead); break;
      case 2: strip<Kind, 2>(p, columns, ahead); break;
      case 3: strip<Kind, 3>(p, columns, ahead); break;
      case 4: strip<Kind, 4>(p, columns, ahead); break;
      case 5: strip<Kind, 5>(p, columns, ahead); break;
      case 6: strip<Kind, 6>(p, columns, ahead); break;
      case 7: strip<Kind, 7>(p, columns, ahead); break;
      default: strip<Kind, 8>(p, columns, ahead);
    }
    p.rows += height * p.in_stride, p.out += height * p.out_stride;
    rows -= height;
  }
}

}  // namespace polydecode
