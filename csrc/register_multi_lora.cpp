// The torch ops of many adapters at once on a CPU: the batch's plan, and the passes over it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <vector>

#include "arguments.h"
#include "batch_plan.h"
#include "cpu/lora.h"
#include "cpu/multi_lora.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using lrk::dtype_of;
using lrk::empty;
using lrk::float_values;
using lrk::matrix;
using lrk::pointer;
using lrk::rows_of;
using lrk::runtime;
using lrk::shape_of;
using lrk::values;

// A matrix of this shape that is written: its rows may not overlap.
lrk::Matrix target(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  const lrk::Matrix result = lrk::target(op, name, t);
  STD_TORCH_CHECK(result.rows == rows && result.cols == cols, op, ": expected ", name,
                  " of shape (", rows, ", ", cols, "), got ", shape_of(t));
  return result;
}

// ---- the plan of a batch ------------------------------------------------------------------------

// A contiguous int32 CPU tensor of this shape that is written.
int32_t* plan_part(const char* name, Tensor t, const std::vector<int64_t>& shape) {
  const char* op = "plan_batch_";
  values<int32_t>(op, name, t, ScalarType::Int, 0);
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = t.size(static_cast<int64_t>(i)) == shape[i];
  }
  std::ostringstream wanted;
  for (size_t i = 0; i < shape.size(); ++i) wanted << (i ? ", " : "") << shape[i];
  STD_TORCH_CHECK(fits, op, ": expected ", name, " of shape (", wanted.str(), "), got ",
                  shape_of(t));
  return static_cast<int32_t*>(t.mutable_data_ptr());
}

// Writes the plan of ids (M, J) for J choices of an adapter a row: order (J, M), bounds (J, G + 2)
// and tiles (J, tile_capacity, 3). See batch_plan.h.
void plan_batch_(const Tensor& ids, int64_t adapters, int64_t tile_rows, Tensor order,
                 Tensor bounds, Tensor tiles) {
  const char* op = "plan_batch_";
  STD_TORCH_CHECK(ids.dim() == 2, op, ": expected ids of shape (M, J), got ", shape_of(ids));
  const int32_t* id = values<int32_t>(op, "ids", ids, ScalarType::Int, 0);
  const int64_t rows = ids.size(0), choices = ids.size(1);
  STD_TORCH_CHECK(adapters >= 0 && adapters < INT32_MAX && tile_rows >= 1 &&
                      tile_rows <= INT32_MAX && rows <= INT32_MAX - tile_rows,
                  op,
                  ": expected 0 or more adapters, tiles of 1 or more rows, and fewer than 2**31 "
                  "of each and of rows, got ",
                  adapters, ", ", tile_rows, " and ", rows);
  const int64_t capacity = lrk::tile_capacity(rows, adapters, tile_rows);
  int32_t* orders = plan_part("order", order, {choices, rows});
  int32_t* edges = plan_part("bounds", bounds, {choices, adapters + 2});
  int32_t* places = plan_part("tiles", tiles, {choices, capacity, 3});
  for (int64_t j = 0; j < choices; ++j) {
    const int64_t used =
        lrk::plan_batch(id + j, choices, rows, adapters, tile_rows,
                        {orders + j * rows, edges + j * (adapters + 2),
                         reinterpret_cast<lrk::Tile*>(places) + j * capacity, capacity});
    STD_TORCH_CHECK(used >= 0, op, ": expected ids from -1 to ", adapters - 1,
                    ", got another in row ", -1 - used);
  }
}

// ---- arguments ----------------------------------------------------------------------------------

// The adapters of a stack. `dropouts` is memory that `value` points into.
struct AdaptersArgument {
  lrk::Adapters value;
  std::vector<lrk::AdapterDropout> dropouts;
  int64_t max_rank = 0;
};

AdaptersArgument adapters_argument(const char* op, const Tensor& table,
                                   const std::optional<Tensor>& scalings, int64_t factor_rows,
                                   const std::optional<Tensor>& dropout_p,
                                   const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == 3, op,
                  ": expected table of shape (G, 3), got ", shape_of(table));
  AdaptersArgument result;
  const int64_t count = table.size(0);
  const auto* places = reinterpret_cast<const lrk::Place*>(
      values<int32_t>(op, "table", table, ScalarType::Int, 3 * count));
  for (int64_t i = 0; i < count; ++i) {
    const lrk::Place& p = places[i];
    STD_TORCH_CHECK(p.start >= 0 && p.rank >= 0 && int64_t{p.start} + p.rank <= factor_rows, op,
                    ": expected adapter ", i, " within the ", factor_rows,
                    " rows of the factor, got start ", p.start, " and rank ", p.rank);
    result.max_rank = p.rank > result.max_rank ? p.rank : result.max_rank;
  }
  const float* scales = nullptr;
  if (scalings.has_value()) {
    scales = values<float>(op, "scalings", *scalings, ScalarType::Float, count);
  }
  if (dropout_p.has_value()) {
    STD_TORCH_CHECK(seed.has_value(), op, ": expected a dropout_seed since there is a dropout_p");
    const double* p = values<double>(op, "dropout_p", *dropout_p, ScalarType::Double, count);
    const uint64_t bits =
        static_cast<uint64_t>(*values<int64_t>(op, "dropout_seed", *seed, ScalarType::Long, 1));
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(p[i] >= 0.0 && p[i] < 1.0, op, ": expected 0 <= dropout_p < 1, got ", p[i]);
      result.dropouts.push_back({{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
                                  lrk::dropout_threshold(p[i])},
                                 static_cast<float>(1.0 / (1.0 - p[i]))});
    }
  }
  result.value = {count, places, scales,
                  result.dropouts.empty() ? nullptr : result.dropouts.data()};
  return result;
}

const float* row_weights(const char* op, const std::optional<Tensor>& weights, int64_t rows) {
  if (!weights.has_value()) return nullptr;
  return values<float>(op, "weights", *weights, ScalarType::Float, rows);
}

const int32_t* order_argument(const char* op, const Tensor& order, int64_t rows) {
  const int32_t* result = values<int32_t>(op, "order", order, ScalarType::Int, rows);
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(result[i] >= 0 && result[i] < rows, op, ": expected order to hold rows below ",
                    rows, ", got ", result[i]);
  }
  return result;
}

lrk::Batch tiled_batch(const char* op, const Tensor& order, const Tensor& tiles, int64_t rows,
                       int64_t adapters, const std::optional<Tensor>& weights) {
  STD_TORCH_CHECK(tiles.dim() == 2 && tiles.size(1) == 3, op,
                  ": expected tiles of shape (T, 3), got ", shape_of(tiles));
  lrk::Batch batch{order_argument(op, order, rows), nullptr,
                   reinterpret_cast<const lrk::Tile*>(
                       values<int32_t>(op, "tiles", tiles, ScalarType::Int, 3 * tiles.size(0))),
                   0, row_weights(op, weights, rows)};
  // Unused tiles are at the end.
  for (int64_t t = 0; t < tiles.size(0) && batch.tiles[t].count; ++t) {
    const lrk::Tile& tile = batch.tiles[t];
    STD_TORCH_CHECK(tile.adapter < adapters && tile.first >= 0 && tile.count > 0 &&
                        int64_t{tile.first} + tile.count <= rows,
                    op, ": expected tile ", t, " to be of a plan for ", adapters, " adapters and ",
                    rows, " rows");
    ++batch.tile_count;
  }
  return batch;
}

// ---- the passes ---------------------------------------------------------------------------------

Tensor multi_lora_down(const Tensor& x, const Tensor& factor, const Tensor& table, int64_t max_rank,
                       const Tensor& order, const Tensor& tiles,
                       const std::optional<Tensor>& dropout_p,
                       const std::optional<Tensor>& dropout_seed) {
  const char* op = "multi_lora_down";
  const lrk::Matrix input = matrix(op, "x", x), f = matrix(op, "factor", factor);
  STD_TORCH_CHECK(f.cols == input.cols, op, ": expected factor of ", input.cols,
                  " columns like x, got ", f.cols);
  const AdaptersArgument adapters =
      adapters_argument(op, table, std::nullopt, f.rows, dropout_p, dropout_seed);
  STD_TORCH_CHECK(adapters.max_rank <= max_rank, op, ": expected max_rank of at least ",
                  adapters.max_rank, ", got ", max_rank);
  const lrk::Batch batch =
      tiled_batch(op, order, tiles, input.rows, adapters.value.count, std::nullopt);
  Tensor p = empty({input.rows, max_rank}, ScalarType::Float);
  std::fill_n(static_cast<float*>(p.mutable_data_ptr()), input.rows * max_rank, 0.0f);
  lrk::multi_lora_down(runtime(), matrix(op, "p", p), input, f, adapters.value, batch);
  return p;
}

void multi_lora_up_(Tensor y, const Tensor& p, const Tensor& factor, const Tensor& table,
                    const Tensor& scalings, const Tensor& order, const Tensor& tiles,
                    const std::optional<Tensor>& weights, const std::optional<Tensor>& dropout_p,
                    const std::optional<Tensor>& dropout_seed,
                    const std::optional<Tensor>& column_scale, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& out) {
  const char* op = "multi_lora_up_";
  const lrk::Matrix f = matrix(op, "factor", factor), left = matrix(op, "p", p);
  const lrk::Matrix sum = target(op, "y", y, left.rows, f.cols);
  const AdaptersArgument adapters =
      adapters_argument(op, table, scalings, f.rows, dropout_p, dropout_seed);
  STD_TORCH_CHECK(adapters.max_rank <= left.cols && left.dtype == lrk::Dtype::kFloat32, op,
                  ": expected p in float32 with at least ", adapters.max_rank, " columns, got ",
                  shape_of(p));
  const lrk::Batch batch = tiled_batch(op, order, tiles, sum.rows, adapters.value.count, weights);
  if (!column_scale.has_value()) {
    return lrk::multi_lora_up(runtime(), sum, left, f, adapters.value, batch);
  }
  const lrk::Matrix scale = matrix(op, "column_scale", *column_scale);
  STD_TORCH_CHECK(scale.dtype == lrk::Dtype::kFloat32 && scale.cols == sum.cols, op,
                  ": expected column_scale (D, N) in float32, got ", shape_of(*column_scale));
  for (int64_t i = 0; i < adapters.value.count; ++i) {
    STD_TORCH_CHECK(adapters.value.places[i].dora < scale.rows, op, ": expected adapter ", i,
                    " to have a row of column_scale");
  }
  const std::vector<float> biases = float_values(op, "bias", "N", bias, sum.cols);
  const lrk::AdapterColumnScale columns{
      scale, pointer(biases), out.has_value() ? target(op, "out", *out, sum.rows, sum.cols) : sum};
  STD_TORCH_CHECK(columns.out.dtype == sum.dtype, op, ": expected out of y's dtype");
  lrk::multi_lora_up(runtime(), sum, left, f, adapters.value, batch, &columns);
}

struct Stack {
  const Tensor &lora_a, &lora_b, &table, &scalings;
};

// The whole correction from ids to sum: sum[m] += s B A x[m], after `base` has run. Where an id is
// out of range this raises before `base` runs, and nothing is changed.
template <typename Base>
void add_correction(const char* op, const lrk::Matrix& sum, const lrk::Matrix& input,
                    const Stack& stack, const Tensor& ids, const Base& base) {
  const auto& [lora_a, lora_b, table, scalings] = stack;
  const lrk::Matrix a = matrix(op, "lora_a", lora_a), b = matrix(op, "lora_b", lora_b);
  STD_TORCH_CHECK(a.cols == input.cols && a.rows == b.rows, op, ": expected lora_a of shape (",
                  b.rows, ", ", input.cols, "), got ", shape_of(lora_a));
  STD_TORCH_CHECK(b.cols == sum.cols, op, ": expected lora_b of ", sum.cols, " columns, got ",
                  shape_of(lora_b));
  const AdaptersArgument adapters =
      adapters_argument(op, table, scalings, a.rows, std::nullopt, std::nullopt);
  const int64_t rows = input.rows, count = adapters.value.count;

  // Kept between calls: a fresh block would cost more than what is planned in it.
  static thread_local std::vector<int32_t> order, bounds;
  static thread_local std::vector<lrk::Tile> tiles;
  static thread_local std::vector<float> p;
  constexpr int64_t kTileRows = 32;
  const int64_t capacity = lrk::tile_capacity(rows, count, kTileRows);
  order.resize(static_cast<size_t>(rows));
  bounds.resize(static_cast<size_t>(count + 2));
  tiles.resize(static_cast<size_t>(capacity));
  const auto plan = [&](const auto* id) {
    return lrk::plan_batch(id, 1, rows, count, kTileRows,
                           {order.data(), bounds.data(), tiles.data(), capacity});
  };
  const int64_t used = ids.scalar_type() == ScalarType::Long
                           ? plan(values<int64_t>(op, "ids", ids, ScalarType::Long, rows))
                           : plan(values<int32_t>(op, "ids", ids, ScalarType::Int, rows));
  STD_TORCH_CHECK(used >= 0, op, ": expected ids from -1 to ", count - 1, ", got another in row ",
                  -1 - used);
  base();
  const int64_t rank = adapters.max_rank;
  if (rank == 0 || rows == 0) return;
  p.resize(static_cast<size_t>(rows * rank));
  const lrk::Matrix down{p.data(), lrk::Dtype::kFloat32, rows, rank, rank};
  const lrk::Batch batch{order.data(), bounds.data(), tiles.data(), used, nullptr};
  lrk::multi_lora_down(runtime(), down, input, a, adapters.value, batch);
  lrk::multi_lora_up(runtime(), sum, down, b, adapters.value, batch);
}

// y += the correction of x; x (..., K) and y (..., N) are contiguous, or matrices.
void multi_lora_add_(Tensor y, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                     const Tensor& table, const Tensor& scalings, const Tensor& ids) {
  const char* op = "multi_lora_add_";
  const lrk::Matrix input = rows_of(op, "x", x, x.dim() ? x.size(x.dim() - 1) : 0);
  const lrk::Matrix sum = y.dim() == 2 ? target(op, "y", y, input.rows, lora_b.size(1))
                                       : rows_of(op, "y", y, lora_b.size(1));
  STD_TORCH_CHECK(sum.rows == input.rows, op, ": expected y of ", input.rows, " rows, got ",
                  shape_of(y));
  add_correction(op, sum, input, {lora_a, lora_b, table, scalings}, ids, [] {});
}

Tensor multi_lora_grad(const Tensor& big, const Tensor& small, const Tensor& table,
                       const Tensor& scalings, const Tensor& order, const Tensor& bounds,
                       const std::optional<Tensor>& weights, const std::optional<Tensor>& dropout_p,
                       const std::optional<Tensor>& dropout_seed, int64_t rows,
                       ScalarType out_dtype) {
  const char* op = "multi_lora_grad";
  const lrk::Matrix wide = matrix(op, "big", big), left = matrix(op, "small", small);
  const AdaptersArgument adapters =
      adapters_argument(op, table, scalings, rows, dropout_p, dropout_seed);
  STD_TORCH_CHECK(left.rows == wide.rows && adapters.max_rank <= left.cols, op,
                  ": expected small of ", wide.rows, " rows and at least ", adapters.max_rank,
                  " columns, got ", shape_of(small));
  const int32_t* edges =
      values<int32_t>(op, "bounds", bounds, ScalarType::Int, adapters.value.count + 1);
  for (int64_t i = 0; i < adapters.value.count; ++i) {
    STD_TORCH_CHECK(edges[i] >= 0 && edges[i] <= edges[i + 1] && edges[i + 1] <= wide.rows, op,
                    ": expected ascending bounds of at most ", wide.rows);
  }
  dtype_of(op, "out_dtype", out_dtype);
  Tensor out = empty({rows, wide.cols}, out_dtype);
  lrk::multi_lora_grad(runtime(), matrix(op, "out", out), wide, left, adapters.value,
                       {order_argument(op, order, wide.rows), edges, nullptr, 0,
                        row_weights(op, weights, wide.rows)});
  return out;
}

// y = x weight^T + bias + the correction of x; x (..., K) is contiguous, or a matrix.
Tensor multi_lora_linear_inference(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                   const Tensor& lora_b, const std::optional<Tensor>& bias,
                                   const Tensor& table, const Tensor& scalings, const Tensor& ids) {
  const char* op = "multi_lora_linear_inference";
  const lrk::Matrix w = matrix(op, "weight", weight), input = rows_of(op, "x", x, w.cols);
  const std::vector<float> biases = float_values(op, "bias", "N", bias, w.rows);
  Tensor y = empty(lrk::shape_with_columns(x, w.rows), x.scalar_type());
  const lrk::Matrix sum = rows_of(op, "y", y, w.rows);
  add_correction(op, sum, input, {lora_a, lora_b, table, scalings}, ids,
                 [&] { lrk::frozen_linear(runtime(), sum, input, w, pointer(biases)); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def(
      "plan_batch_(Tensor ids, int num_adapters, int tile_rows, Tensor(a!) order, "
      "Tensor(b!) bounds, Tensor(c!) tiles) -> ()");
  m.def(
      "multi_lora_down(Tensor x, Tensor factor, Tensor table, int max_rank, Tensor order, "
      "Tensor tiles, Tensor? dropout_p, Tensor? dropout_seed) -> Tensor");
  m.def(
      "multi_lora_up_(Tensor(a!) y, Tensor p, Tensor factor, Tensor table, Tensor scalings, "
      "Tensor order, Tensor tiles, Tensor? weights, Tensor? dropout_p, Tensor? dropout_seed, "
      "Tensor? column_scale, Tensor? bias, Tensor(b!)? out) -> ()");
  m.def(
      "multi_lora_grad(Tensor big, Tensor small, Tensor table, Tensor scalings, Tensor order, "
      "Tensor bounds, Tensor? weights, Tensor? dropout_p, Tensor? dropout_seed, int rows, "
      "ScalarType out_dtype) -> Tensor");
  m.def(
      "multi_lora_add_(Tensor(a!) y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor table, "
      "Tensor scalings, Tensor ids) -> ()");
  m.def(
      "multi_lora_linear_inference(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor? bias, Tensor table, Tensor scalings, Tensor ids) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("plan_batch_", TORCH_BOX(&plan_batch_));
  m.impl("multi_lora_down", TORCH_BOX(&multi_lora_down));
  m.impl("multi_lora_up_", TORCH_BOX(&multi_lora_up_));
  m.impl("multi_lora_grad", TORCH_BOX(&multi_lora_grad));
  m.impl("multi_lora_add_", TORCH_BOX(&multi_lora_add_));
  m.impl("multi_lora_linear_inference", TORCH_BOX(&multi_lora_linear_inference));
}
