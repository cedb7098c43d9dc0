// Gradients of a LoRA layer that the ops of other families end with.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace lrk::ops {

// dX = (row_scale * dY) W + drop'(scaling (Q * gate) A).
torch::stable::Tensor lora_grad_x(const torch::stable::Tensor& grad_y,
                                  const torch::stable::Tensor& q,
                                  const torch::stable::Tensor& weight,
                                  const torch::stable::Tensor& lora_a,
                                  const std::optional<torch::stable::Tensor>& gate, double scaling,
                                  const std::optional<torch::stable::Tensor>& dropout_seed,
                                  double dropout_p,
                                  const std::optional<torch::stable::Tensor>& row_scale);

// scaling (p * gate)^T drop(big), or with rank_last its transpose.
torch::stable::Tensor lora_grad(const torch::stable::Tensor& big, const torch::stable::Tensor& p,
                                const std::optional<torch::stable::Tensor>& gate, double scaling,
                                bool rank_last,
                                const std::optional<torch::stable::Tensor>& dropout_seed,
                                double dropout_p, torch::headeronly::ScalarType out_dtype);

}  // namespace lrk::ops
