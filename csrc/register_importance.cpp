// The torch op of LoRAPrune's importance on a CPU. What a user can get wrong is checked by its
// caller (ops/importance.py); here is what memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "cpu/importance.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "importance_sums";

Tensor importance_sums(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                       const Tensor& grad_a, const Tensor& grad_b, double scaling, bool by_row) {
  const lrk::Matrix w = lrk::matrix(kOp, "weight", weight);
  const lrk::ImportanceFactors factors{
      lrk::matrix(kOp, "lora_a", lora_a), lrk::matrix(kOp, "lora_b", lora_b),
      lrk::matrix(kOp, "grad_a", grad_a), lrk::matrix(kOp, "grad_b", grad_b),
      static_cast<float>(scaling)};
  const int64_t rank = factors.lora_a.rows;
  STD_TORCH_CHECK(rank > 0, kOp, ": expected a rank of at least 1");
  lrk::check_shape(kOp, "lora_a", "(R, K)", factors.lora_a, rank, w.cols);
  lrk::check_shape(kOp, "grad_a", "(R, K)", factors.grad_a, rank, w.cols);
  lrk::check_shape(kOp, "lora_b", "(N, R)", factors.lora_b, w.rows, rank);
  lrk::check_shape(kOp, "grad_b", "(N, R)", factors.grad_b, w.rows, rank);
  Tensor sums = lrk::empty({by_row ? w.rows : w.cols}, ScalarType::Float);
  lrk::importance_sums(lrk::runtime(), w, factors, by_row,
                       static_cast<float*>(sums.mutable_data_ptr()));
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def(
      "importance_sums(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor grad_a, Tensor grad_b, "
      "float scaling, bool by_row) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("importance_sums", TORCH_BOX(&importance_sums));
}
