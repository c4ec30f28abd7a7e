// Skinny products on Intel's AMX tiles: nearly the same cost for 1 row and for 64.
//
// A tile product adds 16 columns' weights times 16 rows' inputs. Weights are the left factor and are read where they lie;
// the rows are packed once a product, as the right factor wants them, and missing rows are zeros that cost nothing more.
// float32 is computed on bfloat16 tiles without losing precision: a float is the exact sum of three bfloat16 numbers,
// and of the nine products of parts the six that a float32 product can hold are added up. Every sum runs in the same
// order however many rows there are; only between few rows (product.h) and more do results differ, by rounding.
#pragma once

#include "product.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VBMI__) && defined(__linux__)
#define POLYDECODE_AMX 1

#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

namespace polydecode::amx {

constexpr int64_t SIDE = 16;         // rows, and columns, of a tile product
constexpr int64_t TILE_BYTES = 1024;  // 16 lines of 64 bytes

// Whether the kernel of the operating system lets this process use tiles; asked once.
inline bool allowed() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return granted;
}

// Tiles are on in this thread while one lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = SIDE;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

template <int H, int... Lane>
inline void swap_halves(Ints& first, Ints& second, std::integer_sequence<int, Lane...>) {
  const Ints a = first, b = second;
  first = __builtin_shufflevector(a, b, (Lane / H % 2 ? Lane - H + LANES : Lane)...);
  second = __builtin_shufflevector(a, b, (Lane / H % 2 ? Lane + LANES : Lane + H)...);
}

// Transpose 16 x 16 words of 32 bits in place.
template <int H = SIDE / 2>
inline void transpose(Ints* lines) {
#pragma GCC unroll 16
  for (int line = 0; line < SIDE; line++)
    if (line / H % 2 == 0) swap_halves<H>(lines[line], lines[line + H], std::make_integer_sequence<int, LANES>());
  if constexpr (H > 1) transpose<H / 2>(lines);
}

// float32: the parts of a number are 8 bits of its significand each, cut off from the top.
struct Float32Tiles {
  using Input = float;
  using Weight = float;
  static constexpr int64_t STEP = 32;  // inputs of a tile product
  static constexpr int PARTS = 3;
  static constexpr int SUMS = 3;  // by size: 1, 2^-8 and 2^-16

  // The three parts of 32 floats: 64 bytes each, to `to` and every `apart` bytes behind it.
  static void parts(const float* from, char* to, int64_t apart) {
    const __m512i top = _mm512_set1_epi32(0xffff0000), odd = odd_words();
    __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + LANES);
#pragma GCC unroll 3
    for (int p = 0; p < PARTS; p++) {
      _mm512_store_si512(to + p * apart, _mm512_permutex2var_epi16(_mm512_castps_si512(low), odd, _mm512_castps_si512(high)));
      low -= _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(low), top));
      high -= _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(high), top));
    }
  }
  static __m512i odd_words() {
    alignas(64) static constexpr int16_t odd[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_load_si512(odd);
  }
};

// Rows in 16 bits (see round_row) as a signed upper and an unsigned lower byte, times int8 weights. All sums are exact.
struct Int8Tiles {
  using Input = int16_t;
  using Weight = int8_t;
  static constexpr int64_t STEP = 64;
  static constexpr int PARTS = 2;
  static constexpr int SUMS = 2;

  static void parts(const int16_t* from, char* to, int64_t apart) {
    const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 2 * LANES);
    _mm512_store_si512(to, bytes(_mm512_srai_epi16(low, 8), _mm512_srai_epi16(high, 8)));
    _mm512_store_si512(to + apart, bytes(low, high));
  }
  static __m512i bytes(__m512i low, __m512i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)), _mm512_cvtepi16_epi8(high), 1);
  }
};

// A thread's own scratch memory, aligned; it lives on, because returning it after every product costs page faults.
template <int Use>
inline char* scratch(int64_t bytes) {
  thread_local std::vector<char> room;
  if ((int64_t)room.size() < bytes + 64) room.resize(bytes + 64);
  return room.data() + (64 - (uintptr_t)room.data() % 64) % 64;
}

// Rows packed as right factors: block of 16 rows, step, part, one tile each.
template <typename Kind>
class Packed {
 public:
  Packed(const typename Kind::Input* rows, int64_t count, int64_t in) : steps_(in / Kind::STEP), tiles_(scratch<0>(blocks_of(count) * steps_ * Kind::PARTS * TILE_BYTES)) {
    for (int64_t block = 0; block < blocks_of(count); block++)
      for (int64_t step = 0; step < steps_; step++) {
        alignas(64) Ints lines[Kind::PARTS][SIDE] = {};
        for (int64_t r = 0; r < std::min(SIDE, count - block * SIDE); r++)
          Kind::parts(rows + (block * SIDE + r) * in + step * Kind::STEP, (char*)&lines[0][r], TILE_BYTES);
        for (int p = 0; p < Kind::PARTS; p++) {
          transpose(lines[p]);
          std::memcpy(tiles_ + ((block * steps_ + step) * Kind::PARTS + p) * TILE_BYTES, lines[p], TILE_BYTES);
        }
      }
  }
  const char* block(int64_t number) const { return tiles_ + number * steps_ * Kind::PARTS * TILE_BYTES; }
  int64_t steps() const { return steps_; }
  static int64_t blocks_of(int64_t count) { return (count + SIDE - 1) / SIDE; }

 private:
  int64_t steps_;
  char* tiles_;
};

// The sums of 16 columns and up to 32 rows, [block][sum][column][row], each 32 bits.
template <typename Kind>
struct alignas(64) Sums {
  Ints lines[2][Kind::SUMS][SIDE];
};

// 16 columns' weights, [16, in]; the next 16 columns are asked for while these are read.
template <typename Kind>
struct Strip {
  const typename Kind::Weight* weights;
  int64_t in;
  char* tiles;   // float32: the parts of the weights, [step][part], one tile each
  int64_t ring;  // float32: steps that `tiles` has room for
  int64_t ahead; // how far behind these the weights lie that are to be fetched meanwhile; 0 for none
  bool again;    // whether this is not the first sweep over these columns

  char* at(int64_t step) const { return tiles + step % ring * Kind::PARTS * TILE_BYTES; }
};

inline void split(const Strip<Float32Tiles>& strip, int64_t step) {
  const float* from = strip.weights + step * Float32Tiles::STEP;
  char* to = strip.at(step);
  for (int64_t c = 0; c < SIDE; c++, from += strip.in, to += 64) {
    Float32Tiles::parts(from, to, TILE_BYTES);
    __builtin_prefetch(from + strip.ahead, 0, 2);
    __builtin_prefetch(from + strip.ahead + LANES, 0, 2);
  }
}

// clang-format off
inline void sweep(const Strip<Float32Tiles>& strip, const Packed<Float32Tiles>& rows, int64_t block, bool two, Sums<Float32Tiles>& sums) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5);
  const char *first = rows.block(block), *second = rows.block(block + 1);
  for (int64_t s = 0; s < rows.steps(); s++, first += 3 * TILE_BYTES, second += 3 * TILE_BYTES) {
    if (!strip.again) split(strip, s);
    const char* w = strip.at(s);
    if (!two) {
      _tile_loadd(3, first, 64); _tile_loadd(4, first + TILE_BYTES, 64); _tile_loadd(5, first + 2 * TILE_BYTES, 64);
      _tile_loadd(6, w, 64);
      _tile_dpbf16ps(0, 6, 3); _tile_dpbf16ps(1, 6, 4); _tile_dpbf16ps(2, 6, 5);
      _tile_loadd(7, w + TILE_BYTES, 64);
      _tile_dpbf16ps(1, 7, 3); _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(6, w + 2 * TILE_BYTES, 64);
      _tile_dpbf16ps(2, 6, 3);
    } else {
      _tile_loadd(6, w, 64);
      _tile_loadd(7, first, 64); _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(7, first + TILE_BYTES, 64); _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, first + 2 * TILE_BYTES, 64); _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, second, 64); _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(7, second + TILE_BYTES, 64); _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(7, second + 2 * TILE_BYTES, 64); _tile_dpbf16ps(5, 6, 7);
      _tile_loadd(6, w + TILE_BYTES, 64);
      _tile_loadd(7, first, 64); _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, first + TILE_BYTES, 64); _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, second, 64); _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(7, second + TILE_BYTES, 64); _tile_dpbf16ps(5, 6, 7);
      _tile_loadd(6, w + 2 * TILE_BYTES, 64);
      _tile_loadd(7, first, 64); _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, second, 64); _tile_dpbf16ps(5, 6, 7);
    }
  }
  _tile_stored(0, sums.lines[0][0], 64); _tile_stored(1, sums.lines[0][1], 64); _tile_stored(2, sums.lines[0][2], 64);
  if (!two) return;  // tiles 3 to 5 held inputs
  _tile_stored(3, sums.lines[1][0], 64); _tile_stored(4, sums.lines[1][1], 64); _tile_stored(5, sums.lines[1][2], 64);
}

inline void sweep(const Strip<Int8Tiles>& strip, const Packed<Int8Tiles>& rows, int64_t block, bool two, Sums<Int8Tiles>& sums) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  const char *first = rows.block(block), *second = rows.block(block + 1);
  const int8_t* w = strip.weights;
  for (int64_t s = 0; s < rows.steps(); s++, w += 64, first += 2 * TILE_BYTES, second += 2 * TILE_BYTES) {
    for (int64_t c = 0; !strip.again && c < SIDE; c++) __builtin_prefetch(w + strip.ahead + c * strip.in, 0, 2);
    _tile_loadd(4, w, strip.in);
    _tile_loadd(5, first, 64); _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, first + TILE_BYTES, 64); _tile_dpbsud(1, 4, 6);
    if (!two) continue;
    _tile_loadd(5, second, 64); _tile_dpbssd(2, 4, 5);
    _tile_loadd(6, second + TILE_BYTES, 64); _tile_dpbsud(3, 4, 6);
  }
  _tile_stored(0, sums.lines[0][0], 64); _tile_stored(1, sums.lines[0][1], 64);
  _tile_stored(2, sums.lines[1][0], 64); _tile_stored(3, sums.lines[1][1], 64);
}
// clang-format on

inline Floats joined(const Ints (&sums)[3][SIDE], int column) {
  return (Floats)sums[0][column] + ((Floats)sums[1][column] + (Floats)sums[2][column]);
}

inline Floats joined(const Ints (&sums)[2][SIDE], int column) {
  return __builtin_convertvector(sums[0][column], Floats) * 256 + __builtin_convertvector(sums[1][column], Floats);
}

// Columns first to last (multiples of 16) of p, on this thread; `done` sees every 16 when they are finished.
template <typename Kind, typename Product, typename Done>
void columns(const Product& p, int64_t rows, int64_t first, int64_t last, const Done& done) {
  Tiles on;
  for (int64_t i = 0; i < SIDE * p.in; i += 64 / sizeof *p.weights) __builtin_prefetch(p.weights + first * p.in + i, 0, 2);
  const Packed<Kind> packed(p.rows, rows, p.in);
  const int64_t blocks = packed.blocks_of(rows), ring = blocks > 2 ? packed.steps() : 2;
  char* tiles = scratch<1>(ring * Kind::PARTS * TILE_BYTES);
  Sums<Kind> sums;
  for (int64_t column = first; column < last; column += SIDE) {
    for (int64_t block = 0; block < blocks; block += 2) {
      const bool two = block + 1 < blocks;
      sweep(Strip<Kind>{p.weights + column * p.in, p.in, tiles, ring, column + SIDE < last ? SIDE * p.in : 0, block > 0}, packed, block, two, sums);
      for (int64_t b = 0; b <= two; b++) {
        Ints lines[SIDE];
        for (int c = 0; c < SIDE; c++) lines[c] = (Ints)joined(sums.lines[b], c);
        transpose(lines);
        const int64_t row = (block + b) * SIDE;
        for (int64_t r = 0; r < std::min(SIDE, rows - row); r++) std::memcpy(p.out + (row + r) * p.out_stride + column, &lines[r], 64);
      }
    }
    done(column);
  }
}

constexpr int64_t FEW = 4;  // up to here vector instructions are faster: they keep up with memory and need no packing

// Whether tiles should compute rows[rows, in] times weights[columns, in].
template <typename Kind>
bool fits(int64_t rows, int64_t in, int64_t columns) {
  return allowed() && rows > FEW && in % Kind::STEP == 0 && in <= 1 << 16 && columns % SIDE == 0;  // longer int8 sums would overflow
}

}  // namespace polydecode::amx
#endif
