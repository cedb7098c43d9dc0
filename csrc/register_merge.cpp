// The torch op that merges a correction into its weight on a CPU, on LibTorch's stable ABI. What a
// user can get wrong is checked by its caller (ops/merge.py); here is what memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/merge.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "merge_rows_";

lrk::Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, kOp, ": expected ", name,
                  " on the CPU with 2 dimensions");
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == cols, kOp, ": expected ", name, " of shape (",
                  rows, ", ", cols, "), got (", t.size(0), ", ", t.size(1), ")");
  STD_TORCH_CHECK(cols <= 1 || t.stride(1) == 1, kOp, ": expected ", name,
                  " with adjacent columns (stride 1), got stride ", t.stride(1));
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, kOp,
      ": expected ", name, " of dtype float32, bfloat16 or float16");
  const lrk::Dtype dtype = type == ScalarType::Float      ? lrk::Dtype::kFloat32
                           : type == ScalarType::BFloat16 ? lrk::Dtype::kBFloat16
                                                          : lrk::Dtype::kFloat16;
  return {const_cast<void*>(t.const_data_ptr()), dtype, rows, cols, rows > 1 ? t.stride(0) : cols};
}

const float* row_scales(const char* name, const std::optional<Tensor>& t, int64_t rows) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == rows &&
                      t->scalar_type() == ScalarType::Float && (rows <= 1 || t->stride(0) == 1),
                  kOp, ": expected ", name, " as ", rows, " contiguous float32 on the CPU");
  return static_cast<const float*>(t->const_data_ptr());
}

void parallel_for(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    if (begin < end) body(begin, end, context);
  });
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
  lrk::merge_rows({lrk::kernel_table(), parallel_for}, w, matrix("lora_a", lora_a, rank, k),
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
