// The CPU kernels as torch operations, over torch's stable ABI; see product.h and attention.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "amx.h"
#include "attention.h"

using torch::stable::Tensor;

namespace polydecode {

#if POLYDECODE_AMX
struct Float32Kind : Float32 {
  using Tiles = amx::Float32Tiles;
};
struct Int8Kind : Int8 {
  using Tiles = amx::Int8Tiles;
};
#else
using Float32Kind = Float32;
using Int8Kind = Int8;
#endif

template <typename T>
T* data(const Tensor& tensor) {
  return (T*)tensor.data_ptr();
}

// Run a product over all columns on torch's threads, some columns at a time; `done` sees every finished block.
template <typename Kind, typename Done>
void over_columns(const Product<Kind>& p, int64_t rows, int64_t columns, const Done& done) {
#if POLYDECODE_AMX
  if (amx::fits<typename Kind::Tiles>(rows, p.in, columns)) {
    torch::stable::parallel_for(0, columns / amx::SIDE, 1, [&](int64_t first, int64_t last) {
      amx::columns<typename Kind::Tiles>(p, rows, first * amx::SIDE, last * amx::SIDE, [&](int64_t column) { done(column, amx::SIDE); });
    });
    return;
  }
#endif
  const int64_t blocks = (columns + COLUMNS - 1) / COLUMNS;
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      const int64_t column = b * COLUMNS, width = std::min<int64_t>(COLUMNS, columns - column);
      Product<Kind> part = p;
      part.weights += column * p.in, part.out += column;
      block(part, rows, width, (last - b - 1) * COLUMNS);
      done(column, width);
    }
  });
}

void add_bias(float* out, int64_t rows, int64_t stride, const float* bias, int64_t columns) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) out[r * stride + c] += bias[c];
}

// x float[rows, in] (contiguous), weight float[out, in], bias float[out] or none -> float[rows, out].
Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  const int64_t rows = x.size(0), in = x.size(1), columns = weight.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  float* y = data<float>(out);
  const float* b = bias ? data<float>(*bias) : nullptr;
  over_columns(Product<Float32Kind>{data<float>(x), data<float>(weight), y, in, in, columns}, rows, columns, [&](int64_t column, int64_t width) {
    if (b) add_bias(y + column, rows, columns, b + column, width);
  });
  return out;
}

void multiply(float* __restrict out, int64_t rows, int64_t stride, const float* __restrict row_scales, const float* __restrict scales, int64_t columns) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) out[r * stride + c] *= row_scales[r] * scales[c];
}

// One row in 16 bits (fewer only beyond 8,000 inputs), far finer than the weights' 8. Returns what one unit stands for.
float round_row(const float* x, int16_t* rounded, int64_t in) {
  const float units = rounded_max(in);
  Floats most{};
  int64_t i = 0;
  for (; i + LANES <= in; i += LANES) {
    const Floats v = load<Floats>(x + i), size = v < 0 ? -v : v;
    most = size > most ? size : most;
  }
  float largest = 0;
  for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, most[lane]);
  for (int64_t j = i; j < in; j++) largest = std::max(largest, std::fabs(x[j]));
  const float inverse = largest > 0 ? units / largest : 0;
  for (i = 0; i + LANES <= in; i += LANES) {
    const Floats v = load<Floats>(x + i) * inverse;
    const Ints whole = __builtin_convertvector(v < 0 ? v - 0.5f : v + 0.5f, Ints);
    const auto lanes = __builtin_convertvector(whole, VectorOf<int16_t, LANES>::type);
    std::memcpy(rounded + i, &lanes, sizeof lanes);
  }
  for (; i < in; i++) rounded[i] = (int16_t)std::lround(x[i] * inverse);
  return largest / units;
}

// x float[rows, in] (contiguous), weight int8[out, in], scale float[out] -> float[rows, out].
Tensor linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scale, std::optional<Tensor> bias) {
  const int64_t rows = x.size(0), in = x.size(1), columns = weight.size(0);
  Tensor room = torch::stable::empty({rows, in}, torch::headeronly::ScalarType::Short);  // aligned, unlike a vector
  int16_t* rounded = data<int16_t>(room);
  std::vector<float> row_scales(rows);
  for (int64_t r = 0; r < rows; r++) row_scales[r] = round_row(data<float>(x) + r * in, rounded + r * in, in);
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  float* y = data<float>(out);
  const float* s = data<float>(scale);
  const float* b = bias ? data<float>(*bias) : nullptr;
  over_columns(Product<Int8Kind>{rounded, data<int8_t>(weight), y, in, in, columns}, rows, columns, [&](int64_t column, int64_t width) {
    multiply(y + column, rows, columns, row_scales.data(), s + column, width);
    if (b) add_bias(y + column, rows, columns, b + column, width);
  });
  return out;
}

thread_local Step current;  // an engine's thread runs one step at a time; stock models pass nothing of ours to attention

// What `attend` reads until `end_step`: the caller keeps every tensor alive. All int64, see plan.py and kv.py.
void begin_step(const Tensor& layers, int64_t step_base, const Tensor& slots, const Tensor& positions, const Tensor& stops, const Tensor& first_partial, const Tensor& tree_offsets, const Tensor& tree_keys, const Tensor& item_chunks, const Tensor& item_pages, const Tensor& item_offsets, const Tensor& item_rows) {
  static_assert(sizeof(LayerCache) == 6 * sizeof(int64_t));
  const int64_t rows = slots.size(0);
  current = {rows, item_chunks.size(0), data<int64_t>(first_partial)[rows], step_base, data<LayerCache>(layers), data<int64_t>(slots), data<int64_t>(positions), data<int64_t>(stops), data<int64_t>(first_partial), data<int64_t>(tree_offsets), data<int64_t>(tree_keys), data<int64_t>(item_chunks), data<int64_t>(item_pages), data<int64_t>(item_offsets), data<int64_t>(item_rows)};
}

void end_step(const Tensor&) { current = {}; }

HeadRows head_rows(const Tensor& tensor) { return {data<float>(tensor), tensor.stride(1), tensor.stride(2)}; }

// query float[1, H, T, d], key float[1, K, T, d], value float[1, K, T, v] -> float[1, T, H, v].
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, int64_t layer, double scale, int64_t window, double softcap, std::optional<Tensor> sinks) {
  const int64_t heads = query.size(1), rows = query.size(2), key_heads = key.size(1), width = value.size(3);
  STD_TORCH_CHECK(rows == current.rows, "attend: a step of ", current.rows, " rows was begun, not of ", rows);
  STD_TORCH_CHECK(query.stride(3) == 1 && key.stride(3) == 1 && value.stride(3) == 1, "attend: rows must be contiguous");
  Tensor out = torch::stable::new_empty(query, {1, rows, heads, width});
  Attention attention{current, current.layers[layer], head_rows(query), head_rows(key), head_rows(value), heads, key_heads, (float)scale, window, (float)softcap, sinks ? data<float>(*sinks) : nullptr, data<float>(out), {}};
  attention.partials = std::make_unique_for_overwrite<float[]>(current.partials * heads * attention.partial_width());
  attention.store();
  // Head after head: the long chunks, an item's first ones, are spread over the threads.
  torch::stable::parallel_for(0, key_heads * current.items, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) attention.item(task % attention.step.items, task / attention.step.items);
  });
  for (int64_t row = 0; row < rows; row++)
    for (int64_t head = 0; head < heads; head++) attention.join(row, head);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(polydecode, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_int8", TORCH_BOX(&linear_int8));
  library.impl("begin_step", TORCH_BOX(&begin_step));
  library.impl("end_step", TORCH_BOX(&end_step));
  library.impl("attend", TORCH_BOX(&attend));
}

}  // namespace polydecode
