// The torch op that merges a correction into its weight on a CPU. What a
// user can get wrong is checked by its caller (ops/merge.py); here is what memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "arguments.h"
#include "cpu/merge.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "merge_rows_";

lrk::Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  const lrk::Matrix result = lrk::matrix(kOp, name, t);
  STD_TORCH_CHECK(result.rows == rows && result.cols == cols, kOp, ": expected ", name,
                  " of shape (", rows, ", ", cols, "), got ", lrk::shape_of(t));
  return result;
}

const float* row_scales(const char* name, const std::optional<Tensor>& t, int64_t rows) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == rows &&
                      t->scalar_type() == ScalarType::Float && (rows <= 1 || t->stride(0) == 1),
                  kOp, ": expected ", name, " as ", rows, " contiguous float32 on the CPU");
  return static_cast<const float*>(t->const_data_ptr());
}

void merge_rows_(Tensor weight, const Tensor& lora_a, const Tensor& lora_b, double scaling,
                 const std::optional<Tensor>& before, const std::optional<Tensor>& after,
                 const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(weight.dim() == 2 && lora_a.dim() == 2, kOp, ": expected matrices");
  const int64_t n = weight.size(0), k = weight.size(1), rank = lora_a.size(0);
  const lrk::Matrix w = matrix("weight", weight, n, k);
  STD_TORCH_CHECK(n <= 1 || w.stride >= k, kOp, ": expected weight whose rows do not overlap");
  lrk::StochasticRounding rounding{};
  if (seed.has_value()) {
    STD_TORCH_CHECK(seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    kOp, ": expected seed as an int64 CPU tensor with one element");
    STD_TORCH_CHECK(w.dtype == lrk::Dtype::kBFloat16, kOp,
                    ": expected a bfloat16 weight for stochastic rounding");
    const uint64_t bits =
        static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    rounding = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  }
  lrk::merge_rows(lrk::runtime(), w, matrix("lora_a", lora_a, rank, k),
                  matrix("lora_b", lora_b, n, rank), static_cast<float>(scaling),
                  row_scales("before", before, n), row_scales("after", after, n),
                  seed.has_value() ? &rounding : nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def(
      "merge_rows_(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, float scaling, "
      "Tensor? before, Tensor? after, Tensor? seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("merge_rows_", TORCH_BOX(&merge_rows_));
}
