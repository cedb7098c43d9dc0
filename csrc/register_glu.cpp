// The torch ops of an MLP's hidden columns on a CPU. What a user can get wrong is checked by its
// caller (lowrank_kernels/blocks.py); here is what memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "cpu/glu.h"

namespace {

using torch::stable::Tensor;

lrk::Activation activation_of(const char* op, const std::string& name) {
  if (name == "silu") return lrk::Activation::kSilu;
  if (name == "gelu_tanh") return lrk::Activation::kGeluTanh;
  STD_TORCH_CHECK(name == "relu_squared", op,
                  ": expected activation to be silu, gelu_tanh or relu_squared, got ", name);
  return lrk::Activation::kReluSquared;
}

lrk::Matrix like(const char* op, const char* name, const lrk::Matrix& m, const lrk::Matrix& gate) {
  lrk::check_shape(op, name, "(M, F)", m, gate.rows, gate.cols);
  STD_TORCH_CHECK(m.dtype == gate.dtype, op, ": expected ", name, " of gate's dtype");
  return m;
}

lrk::Matrix maybe(const char* op, const char* name, const std::optional<Tensor>& t,
                  const lrk::Matrix& gate) {
  if (!t.has_value()) return {nullptr, gate.dtype, 0, 0, 0};
  return like(op, name, lrk::matrix(op, name, *t), gate);
}

Tensor glu(const Tensor& gate, const std::optional<Tensor>& up, std::string activation) {
  const char* op = "glu";
  const lrk::Matrix z = lrk::matrix(op, "gate", gate);
  const lrk::Matrix u = maybe(op, "up", up, z);
  Tensor h = lrk::empty({z.rows, z.cols}, gate.scalar_type());
  lrk::glu(lrk::runtime(), activation_of(op, activation), lrk::target(op, "h", h), z, u);
  return h;
}

void glu_grad_(Tensor grad_gate, std::optional<Tensor> grad_up, const Tensor& grad_h,
               const Tensor& gate, const std::optional<Tensor>& up, std::string activation) {
  const char* op = "glu_grad_";
  const lrk::Matrix z = lrk::matrix(op, "gate", gate);
  STD_TORCH_CHECK(grad_up.has_value() == up.has_value(), op, ": expected grad_up with an up");
  lrk::Matrix du = maybe(op, "grad_up", grad_up, z);
  if (grad_up.has_value()) du = lrk::target(op, "grad_up", *grad_up);
  const lrk::Matrix dz = like(op, "grad_gate", lrk::target(op, "grad_gate", grad_gate), z);
  const lrk::Matrix dh = like(op, "grad_h", lrk::matrix(op, "grad_h", grad_h), z);
  lrk::glu_grad(lrk::runtime(),
                {activation_of(op, activation), dz, du, dh, z, maybe(op, "up", up, z)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def("glu(Tensor gate, Tensor? up, str activation) -> Tensor");
  m.def(
      "glu_grad_(Tensor(a!) grad_gate, Tensor(b!)? grad_up, Tensor grad_h, Tensor gate, Tensor? "
      "up, str activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("glu", TORCH_BOX(&glu));
  m.impl("glu_grad_", TORCH_BOX(&glu_grad_));
}
