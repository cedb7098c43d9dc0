// The torch op that counts magnitudes on a CPU. What a user can get wrong is checked by its caller
// (ops/magnitude.py); here is what memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "cpu/magnitude.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "magnitude_counts";

Tensor magnitude_counts(const Tensor& values, int64_t bits, int64_t shift, int64_t leading) {
  const lrk::Matrix m = lrk::matrix(kOp, "values", values);
  STD_TORCH_CHECK(m.rows == 1, kOp, ": expected one row of values");
  STD_TORCH_CHECK(bits > 0 && bits < 16 && shift >= 0 && bits + shift <= 31, kOp,
                  ": expected a digit of 31 bits");
  Tensor counts = lrk::empty({int64_t{1} << bits}, ScalarType::Long);
  lrk::magnitude_histogram(lrk::runtime(), m, static_cast<int>(bits), static_cast<int>(shift),
                           static_cast<uint32_t>(leading),
                           static_cast<int64_t*>(counts.mutable_data_ptr()));
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def("magnitude_counts(Tensor values, int bits, int shift, int leading) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("magnitude_counts", TORCH_BOX(&magnitude_counts));
}
