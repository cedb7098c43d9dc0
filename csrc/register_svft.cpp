// The torch ops of SVFT on a CPU. What a user can get wrong is checked by its caller (ops/svft.py);
// here is what memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "cpu/svft.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What svft_pattern of ops/svft.py made for `count` values of a matrix (rows, columns).
struct Pattern {
  const int32_t *row, *column, *by_column, *row_starts, *column_starts;
};

void check_range(const char* op, const int32_t* values, int64_t count, int64_t end) {
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside = inside && values[i] >= 0 && values[i] < end;
  STD_TORCH_CHECK(inside, op, ": expected a pattern whose elements are below ", end);
}

void check_starts(const char* op, const int32_t* starts, int64_t lines, int64_t count) {
  bool ascends = starts[0] == 0 && starts[lines] == count;
  for (int64_t i = 0; i < lines; ++i) ascends = ascends && starts[i] <= starts[i + 1];
  STD_TORCH_CHECK(ascends, op, ": expected a pattern whose lines ascend from 0 to ", count);
}

Pattern pattern_of(const char* op, const Tensor& t, int64_t count, int64_t rows, int64_t columns) {
  const int64_t size = 3 * count + rows + columns + 2;
  STD_TORCH_CHECK(t.numel() == size, op, ": expected pattern of ", size, " elements, got ",
                  t.numel());
  const int32_t* p = lrk::values<int32_t>(op, "pattern", t, ScalarType::Int, size);
  const Pattern pattern{p, p + count, p + 2 * count, p + 3 * count, p + 3 * count + rows + 1};
  check_range(op, pattern.row, count, rows);
  check_range(op, pattern.column, count, columns);
  check_range(op, pattern.by_column, count, count);
  check_starts(op, pattern.row_starts, rows, count);
  check_starts(op, pattern.column_starts, columns, count);
  return pattern;
}

Tensor svft_multiply(const Tensor& in, const Tensor& values, const Tensor& pattern, int64_t width,
                     bool turned) {
  const char* op = "svft_multiply";
  const lrk::Matrix from = lrk::matrix(op, "in", in);
  const int64_t count = values.numel();
  const std::vector<float> own = lrk::float_values(op, "values", "E", values, count);
  const Pattern p =
      pattern_of(op, pattern, count, turned ? from.cols : width, turned ? width : from.cols);
  Tensor out = lrk::empty({from.rows, width}, in.scalar_type());
  const lrk::SparseLines by_row{own.data(), nullptr, p.row_starts, p.column};
  const lrk::SparseLines by_column{own.data(), p.by_column, p.column_starts, p.row};
  lrk::svft_multiply(lrk::runtime(), lrk::target(op, "out", out), from,
                     turned ? by_column : by_row);
  return out;
}

Tensor svft_grad(const Tensor& grad, const Tensor& t, const Tensor& pattern, int64_t count) {
  const char* op = "svft_grad";
  const lrk::Matrix ds = lrk::matrix(op, "grad", grad), tm = lrk::matrix(op, "t", t);
  STD_TORCH_CHECK(ds.rows == tm.rows, op, ": expected grad and t with the same rows");
  const Pattern p = pattern_of(op, pattern, count, ds.cols, tm.cols);
  Tensor out = lrk::empty({count}, ScalarType::Float);
  lrk::svft_grad(lrk::runtime(), static_cast<float*>(out.mutable_data_ptr()), ds, tm, p.row,
                 p.column, count);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def(
      "svft_multiply(Tensor rows, Tensor values, Tensor pattern, int width, bool turned) -> "
      "Tensor");
  m.def("svft_grad(Tensor grad, Tensor t, Tensor pattern, int count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("svft_multiply", TORCH_BOX(&svft_multiply));
  m.impl("svft_grad", TORCH_BOX(&svft_grad));
}
