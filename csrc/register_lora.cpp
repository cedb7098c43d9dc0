// The torch ops of a LoRA layer, and the dropout mask: arguments, results, and the call of a
// kernel.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "coded_argument.h"
#include "cpu/dropout_mask.h"
#include "cpu/lora.h"
#include "lora_ops.h"

#if defined(LRK_WITH_CUDA)
#  include "cuda/dropout_mask.h"
#  include "cuda_arguments.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using lrk::check_shape;
using lrk::dropout_argument;
using lrk::DropoutArgument;
using lrk::dtype_of;
using lrk::empty;
using lrk::factor_argument;
using lrk::float_values;
using lrk::matrix;
using lrk::pointer;
using lrk::rows_of;
using lrk::runtime;
using lrk::target;

// ---- forward ------------------------------------------------------------------------------------

Tensor lora_down(const Tensor& x, const Tensor& factor, bool factor_rank_last,
                 const std::optional<Tensor>& dropout_seed, double dropout_p) {
  const char* op = "lora_down";
  const lrk::Matrix input = matrix(op, "x", x);
  const lrk::Factor f = factor_argument(op, factor, factor_rank_last, input.cols);
  const DropoutArgument dropout = dropout_argument(op, dropout_seed, dropout_p);
  Tensor out = empty({input.rows, f.rank()}, x.scalar_type());
  lrk::lora_down(runtime(), matrix(op, "output", out), input, f,
                 static_cast<float>(dropout.inverse_keep), dropout.get());
  return out;
}

// (y, p, u) of y = column_scale * u + bias, u = x W^T + s (p * gate) B^T, p = drop(x) A^T.
std::tuple<Tensor, Tensor, Tensor> fused_over(
    const char* op, const Tensor& x, const lrk::Matrix& w, const Tensor& lora_a,
    const Tensor& lora_b, const std::optional<Tensor>& bias, const std::optional<Tensor>& gate,
    double scaling, const std::optional<Tensor>& dropout_seed, double dropout_p,
    const std::optional<Tensor>& column_scale, bool keep_u) {
  const lrk::Matrix input = matrix(op, "x", x);
  check_shape(op, "weight", "(N, K)", w, w.rows, input.cols);
  const lrk::Matrix b = matrix(op, "lora_b", lora_b);
  check_shape(op, "lora_b", "(N, R)", b, w.rows, lora_a.size(0));
  const std::vector<float> biases = float_values(op, "bias", "N", bias, w.rows);
  const std::vector<float> gates = float_values(op, "gate", "R", gate, b.cols);
  const std::vector<float> scales = float_values(op, "column_scale", "N", column_scale, w.rows);
  Tensor p = lora_down(x, lora_a, false, dropout_seed, dropout_p);
  Tensor y = empty({input.rows, w.rows}, x.scalar_type());
  Tensor u = empty({keep_u ? input.rows : 0, w.rows}, x.scalar_type());
  lrk::LoraLinear linear{matrix(op, "output", y), matrix(op, "p", p), input, w, b};
  linear.gate = pointer(gates);
  linear.scale = static_cast<float>(scaling);
  linear.epilogue.scale = pointer(scales);
  linear.epilogue.bias = pointer(biases);
  if (keep_u) linear.epilogue.u = matrix(op, "u", u);
  lrk::lora_linear(runtime(), linear);
  return {y, p, u};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_fused(
    const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, double scaling,
    const std::optional<Tensor>& dropout_seed, double dropout_p,
    const std::optional<Tensor>& column_scale, bool keep_u) {
  const char* op = "lora_linear_fused";
  return fused_over(op, x, matrix(op, "weight", weight), lora_a, lora_b, bias, gate, scaling,
                    dropout_seed, dropout_p, column_scale, keep_u);
}

// The same over a coded weight.
std::tuple<Tensor, Tensor, Tensor> lora_linear_coded(
    const Tensor& x, const std::vector<Tensor>& weight, const std::vector<int64_t>& layout,
    double offset, const Tensor& lora_a, const Tensor& lora_b, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& gate, double scaling, const std::optional<Tensor>& dropout_seed,
    double dropout_p, const std::optional<Tensor>& column_scale, bool keep_u) {
  const char* op = "lora_linear_coded";
  const lrk::CodedArgument coded(op, weight, layout, offset);
  return fused_over(op, x, coded.matrix(), lora_a, lora_b, bias, gate, scaling, dropout_seed,
                    dropout_p, column_scale, keep_u);
}

// Rows [start, stop) of a coded weight, dense.
Tensor coded_rows(const std::vector<Tensor>& weight, const std::vector<int64_t>& layout,
                  double offset, int64_t start, int64_t stop) {
  const char* op = "coded_rows";
  const lrk::CodedArgument coded(op, weight, layout, offset);
  const lrk::Matrix w = coded.matrix();
  STD_TORCH_CHECK(0 <= start && start <= stop && stop <= w.rows, op,
                  ": expected 0 <= start <= ", "stop <= ", w.rows, ", got ", start, " and ", stop);
  Tensor out = empty({stop - start, w.cols}, coded.value_type());
  lrk::decode(runtime(), matrix(op, "output", out), part(w, start, 0, stop - start, w.cols));
  return out;
}

// lora_linear_fused without dropout, for x (..., K) that is contiguous or a matrix, where y alone
// is wanted.
Tensor lora_linear_inference(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                             const Tensor& lora_b, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& gate, double scaling,
                             const std::optional<Tensor>& column_scale) {
  const char* op = "lora_linear_inference";
  const lrk::Matrix w = matrix(op, "weight", weight);
  const lrk::Matrix input = rows_of(op, "x", x, w.cols);
  const lrk::Matrix b = matrix(op, "lora_b", lora_b);
  const lrk::Factor a = factor_argument(op, lora_a, false, w.cols);
  check_shape(op, "lora_b", "(N, R)", b, w.rows, a.rank());
  const std::vector<float> biases = float_values(op, "bias", "N", bias, w.rows);
  const std::vector<float> gates = float_values(op, "gate", "R", gate, b.cols);
  const std::vector<float> scales = float_values(op, "column_scale", "N", column_scale, w.rows);
  // p is rounded to x's dtype although nobody sees it: y has the bits of lora_linear_fused.
  std::vector<float> values(static_cast<size_t>(input.rows * b.cols));
  const lrk::Matrix p{values.data(), input.dtype, input.rows, b.cols, b.cols};
  lrk::lora_down(runtime(), p, input, a, 1.0f, nullptr);
  Tensor y = empty(lrk::shape_with_columns(x, w.rows), x.scalar_type());
  lrk::LoraLinear linear{rows_of(op, "output", y, w.rows), p, input, w, b};
  linear.gate = pointer(gates);
  linear.scale = static_cast<float>(scaling);
  linear.epilogue.scale = pointer(scales);
  linear.epilogue.bias = pointer(biases);
  lrk::lora_linear(runtime(), linear);
  return y;
}

void lora_up_(Tensor y, const Tensor& p, const Tensor& factor, bool factor_rank_last,
              const std::optional<Tensor>& gate, double scaling,
              const std::optional<Tensor>& dropout_seed, double dropout_p) {
  const char* op = "lora_up_";
  const lrk::Matrix sum = target(op, "y", y);
  const lrk::Factor f = factor_argument(op, factor, factor_rank_last, sum.cols);
  const lrk::Matrix left = matrix(op, "p", p);
  check_shape(op, "p", "(M, R)", left, sum.rows, f.rank());
  const std::vector<float> gates = float_values(op, "gate", "R", gate, f.rank());
  const DropoutArgument dropout = dropout_argument(op, dropout_seed, dropout_p);
  lrk::LoraUp up{sum, left, f};
  up.gate = pointer(gates);
  up.scale = static_cast<float>(scaling * dropout.inverse_keep);
  up.dropout = dropout.get();
  lrk::lora_up(runtime(), up);
}

// y = x weight^T + bias over a coded weight.
Tensor frozen_product_coded(const Tensor& x, const std::vector<Tensor>& weight,
                            const std::vector<int64_t>& layout, double offset,
                            const std::optional<Tensor>& bias) {
  const char* op = "frozen_product_coded";
  const lrk::CodedArgument coded(op, weight, layout, offset);
  const lrk::Matrix input = matrix(op, "x", x), w = coded.matrix();
  check_shape(op, "weight", "(N, K)", w, w.rows, input.cols);
  const std::vector<float> biases = float_values(op, "bias", "N", bias, w.rows);
  Tensor y = empty({input.rows, w.rows}, x.scalar_type());
  lrk::frozen_linear(runtime(), matrix(op, "y", y), input, w, pointer(biases));
  return y;
}

// y = x weight^T + bias, for the rows where this product beats the library's.
Tensor frozen_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "frozen_product";
  const lrk::Matrix input = matrix(op, "x", x), w = matrix(op, "weight", weight);
  check_shape(op, "weight", "(N, K)", w, w.rows, input.cols);
  const std::vector<float> biases = float_values(op, "bias", "N", bias, w.rows);
  Tensor y = empty({input.rows, w.rows}, x.scalar_type());
  lrk::frozen_linear(runtime(), matrix(op, "y", y), input, w, pointer(biases));
  return y;
}

// ---- backward -----------------------------------------------------------------------------------

}  // namespace

namespace lrk::ops {

namespace {

Tensor grad_x_over(const char* op, const Tensor& grad_y, const Tensor& q, const lrk::Matrix& w,
                   const Tensor& lora_a, const std::optional<Tensor>& gate, double scaling,
                   const std::optional<Tensor>& dropout_seed, double dropout_p,
                   const std::optional<Tensor>& row_scale) {
  const lrk::Matrix dy = matrix(op, "grad_y", grad_y);
  check_shape(op, "weight", "(N, K)", w, dy.cols, w.cols);
  const lrk::Matrix a = matrix(op, "lora_a", lora_a);
  check_shape(op, "lora_a", "(R, K)", a, a.rows, w.cols);
  const lrk::Matrix left = matrix(op, "q", q);
  check_shape(op, "q", "(M, R)", left, dy.rows, a.rows);
  const std::vector<float> gates = float_values(op, "gate", "R", gate, a.rows);
  const DropoutArgument dropout = dropout_argument(op, dropout_seed, dropout_p);
  const std::vector<float> scales = float_values(op, "row_scale", "N", row_scale, w.rows);
  Tensor grad_x = empty({dy.rows, w.cols}, grad_y.scalar_type());
  lrk::LoraGradX grad{matrix(op, "output", grad_x), left, dy, w, a};
  grad.gate = pointer(gates);
  grad.scale = static_cast<float>(scaling * dropout.inverse_keep);
  grad.dropout = dropout.get();
  grad.row_scale = pointer(scales);
  lrk::lora_grad_x(runtime(), grad);
  return grad_x;
}

}  // namespace

Tensor lora_grad_x(const Tensor& grad_y, const Tensor& q, const Tensor& weight,
                   const Tensor& lora_a, const std::optional<Tensor>& gate, double scaling,
                   const std::optional<Tensor>& dropout_seed, double dropout_p,
                   const std::optional<Tensor>& row_scale) {
  const char* op = "lora_grad_x";
  return grad_x_over(op, grad_y, q, matrix(op, "weight", weight), lora_a, gate, scaling,
                     dropout_seed, dropout_p, row_scale);
}

// The same over a coded weight.
Tensor lora_grad_x_coded(const Tensor& grad_y, const Tensor& q, const std::vector<Tensor>& weight,
                         const std::vector<int64_t>& layout, double offset, const Tensor& lora_a,
                         const std::optional<Tensor>& gate, double scaling,
                         const std::optional<Tensor>& dropout_seed, double dropout_p,
                         const std::optional<Tensor>& row_scale) {
  const char* op = "lora_grad_x_coded";
  const lrk::CodedArgument coded(op, weight, layout, offset);
  return grad_x_over(op, grad_y, q, coded.matrix(), lora_a, gate, scaling, dropout_seed, dropout_p,
                     row_scale);
}

Tensor lora_grad(const Tensor& big, const Tensor& p, const std::optional<Tensor>& gate,
                 double scaling, bool rank_last, const std::optional<Tensor>& dropout_seed,
                 double dropout_p, ScalarType out_dtype) {
  const char* op = "lora_grad";
  const lrk::Matrix wide = matrix(op, "big", big);
  const lrk::Matrix left = matrix(op, "p", p);
  check_shape(op, "p", "(M, R)", left, wide.rows, left.cols);
  const std::vector<float> gates = float_values(op, "gate", "R", gate, left.cols);
  const DropoutArgument dropout = dropout_argument(op, dropout_seed, dropout_p);
  dtype_of(op, "out_dtype", out_dtype);
  Tensor out = rank_last ? empty({wide.cols, left.cols}, out_dtype)
                         : empty({left.cols, wide.cols}, out_dtype);
  lrk::LoraGrad grad{{matrix(op, "output", out), rank_last}, wide, left};
  grad.gate = pointer(gates);
  grad.scale = static_cast<float>(scaling * dropout.inverse_keep);
  grad.dropout = dropout.get();
  lrk::lora_grad(runtime(), grad);
  return out;
}

}  // namespace lrk::ops

namespace {

using lrk::ops::lora_grad;
using lrk::ops::lora_grad_x;
using lrk::ops::lora_grad_x_coded;

std::tuple<Tensor, Tensor> lora_down_grad(const Tensor& grad_y, const Tensor& lora_b,
                                          const Tensor& p, const std::optional<Tensor>& gate,
                                          double scaling, ScalarType grad_dtype) {
  const char* op = "lora_down_grad";
  lrk::DownGradArgument argument(op, grad_y, lora_b, p, grad_dtype);
  const std::vector<float> gates = float_values(op, "gate", "R", gate, lora_b.size(1));
  argument.value.gate = pointer(gates);
  argument.value.scale = static_cast<float>(scaling);
  lrk::lora_down_grad(runtime(), argument.value);
  return {argument.q, argument.grad_b};
}

// (dX, dA, dB, Q): all of a backward whose products are the extension's, in one call.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& p, const std::optional<Tensor>& gate, double scaling,
    const std::optional<Tensor>& dropout_seed, double dropout_p) {
  auto [q, grad_b] = lora_down_grad(grad_y, lora_b, p, gate, scaling, lora_b.scalar_type());
  Tensor grad_x =
      lora_grad_x(grad_y, q, weight, lora_a, gate, scaling, dropout_seed, dropout_p, std::nullopt);
  Tensor grad_a =
      lora_grad(x, q, gate, scaling, false, dropout_seed, dropout_p, lora_a.scalar_type());
  return {grad_x, grad_a, grad_b, q};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_backward_coded(
    const Tensor& grad_y, const Tensor& x, const std::vector<Tensor>& weight,
    const std::vector<int64_t>& layout, double offset, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& p, const std::optional<Tensor>& gate, double scaling,
    const std::optional<Tensor>& dropout_seed, double dropout_p) {
  auto [q, grad_b] = lora_down_grad(grad_y, lora_b, p, gate, scaling, lora_b.scalar_type());
  Tensor grad_x = lora_grad_x_coded(grad_y, q, weight, layout, offset, lora_a, gate, scaling,
                                    dropout_seed, dropout_p, std::nullopt);
  Tensor grad_a =
      lora_grad(x, q, gate, scaling, false, dropout_seed, dropout_p, lora_a.scalar_type());
  return {grad_x, grad_a, grad_b, q};
}

// ---- the dropout mask ---------------------------------------------------------------------------

void check_mask_arguments(const char* op, const Tensor& seed, int64_t rows, int64_t columns,
                          double p) {
  lrk::check_dropout_p(op, p);
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, op,
                  ": expected seed as an int64 tensor with one element, got ",
                  lrk::name_of(seed.scalar_type()), " of shape ", lrk::shape_of(seed));
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": expected rows and columns of 0 or more, got ",
                  rows, " and ", columns);
}

Tensor dropout_keep_mask(const Tensor& seed, int64_t rows, int64_t columns, double p) {
  check_mask_arguments("dropout_keep_mask", seed, rows, columns, p);
  Tensor out = empty({rows, columns}, ScalarType::Bool);
  lrk::dropout_keep_mask(runtime(), static_cast<uint8_t*>(out.mutable_data_ptr()), rows, columns,
                         lrk::dropout_from(*static_cast<const int64_t*>(seed.const_data_ptr()), p));
  return out;
}

#if defined(LRK_WITH_CUDA)

Tensor dropout_keep_mask_cuda(const Tensor& seed, int64_t rows, int64_t columns, double p) {
  const char* op = "dropout_keep_mask";
  check_mask_arguments(op, seed, rows, columns, p);
  const int32_t device = seed.get_device_index();
  void* stream = lrk::current_stream(op, device);
  const int64_t sizes[2] = {rows, columns};
  const int64_t strides[2] = {columns > 0 ? columns : 1, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_bool(),
                                                  aoti_torch_device_type_cuda(), device, &handle));
  Tensor out(handle);
  const char* error =
      lrk::launch_dropout_keep_mask(static_cast<uint8_t*>(out.mutable_data_ptr()),
                                    static_cast<const int64_t*>(seed.const_data_ptr()), rows,
                                    columns, lrk::dropout_threshold(p), device, stream);
  lrk::check_launch(op, device, error);
  return out;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def(
      "lora_down(Tensor x, Tensor factor, bool factor_rank_last, Tensor? dropout_seed=None, "
      "float dropout_p=0.0) -> Tensor");
  m.def(
      "lora_linear_fused(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
      "Tensor? gate, float scaling, Tensor? dropout_seed, float dropout_p, Tensor? column_scale, "
      "bool keep_u) -> (Tensor y, Tensor p, Tensor u)");
  m.def(
      "lora_linear_inference(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
      "Tensor? gate, float scaling, Tensor? column_scale) -> Tensor");
  m.def(
      "lora_up_(Tensor(a!) y, Tensor p, Tensor factor, bool factor_rank_last, Tensor? gate=None, "
      "float scaling=1.0, Tensor? dropout_seed=None, float dropout_p=0.0) -> ()");
  m.def("frozen_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "lora_linear_coded(Tensor x, Tensor[] weight, int[] layout, float offset, Tensor lora_a, "
      "Tensor lora_b, Tensor? bias, Tensor? gate, float scaling, Tensor? dropout_seed, "
      "float dropout_p, Tensor? column_scale, bool keep_u) -> (Tensor y, Tensor p, Tensor u)");
  m.def(
      "frozen_product_coded(Tensor x, Tensor[] weight, int[] layout, float offset, Tensor? bias) "
      "-> Tensor");
  m.def("coded_rows(Tensor[] weight, int[] layout, float offset, int start, int stop) -> Tensor");
  m.def(
      "lora_grad_x_coded(Tensor grad_y, Tensor q, Tensor[] weight, int[] layout, float offset, "
      "Tensor lora_a, Tensor? gate, float scaling, Tensor? dropout_seed, float dropout_p, "
      "Tensor? row_scale=None) -> Tensor");
  m.def(
      "lora_grad_x(Tensor grad_y, Tensor q, Tensor weight, Tensor lora_a, Tensor? gate, "
      "float scaling, Tensor? dropout_seed, float dropout_p, Tensor? row_scale=None) -> Tensor");
  m.def(
      "lora_grad(Tensor big, Tensor p, Tensor? gate, float scaling, bool rank_last, "
      "Tensor? dropout_seed, float dropout_p, ScalarType out_dtype) -> Tensor");
  m.def(
      "lora_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor p, Tensor? gate, float scaling, Tensor? dropout_seed, float dropout_p) -> "
      "(Tensor grad_x, Tensor grad_a, Tensor grad_b, Tensor q)");
  m.def(
      "lora_backward_coded(Tensor grad_y, Tensor x, Tensor[] weight, int[] layout, float offset, "
      "Tensor lora_a, Tensor lora_b, Tensor p, Tensor? gate, float scaling, Tensor? dropout_seed, "
      "float dropout_p) -> (Tensor grad_x, Tensor grad_a, Tensor grad_b, Tensor q)");
  m.def(
      "lora_down_grad(Tensor grad_y, Tensor lora_b, Tensor p, Tensor? gate, float scaling, "
      "ScalarType grad_dtype) -> (Tensor q, Tensor grad_b)");
  m.def("dropout_keep_mask(Tensor seed, SymInt rows, SymInt columns, float p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("lora_down", TORCH_BOX(&lora_down));
  m.impl("lora_linear_fused", TORCH_BOX(&lora_linear_fused));
  m.impl("lora_linear_inference", TORCH_BOX(&lora_linear_inference));
  m.impl("lora_up_", TORCH_BOX(&lora_up_));
  m.impl("frozen_product", TORCH_BOX(&frozen_product));
  m.impl("lora_linear_coded", TORCH_BOX(&lora_linear_coded));
  m.impl("frozen_product_coded", TORCH_BOX(&frozen_product_coded));
  m.impl("coded_rows", TORCH_BOX(&coded_rows));
  m.impl("lora_grad_x_coded", TORCH_BOX(&lora_grad_x_coded));
  m.impl("lora_grad_x", TORCH_BOX(&lora_grad_x));
  m.impl("lora_grad", TORCH_BOX(&lora_grad));
  m.impl("lora_backward", TORCH_BOX(&lora_backward));
  m.impl("lora_backward_coded", TORCH_BOX(&lora_backward_coded));
  m.impl("lora_down_grad", TORCH_BOX(&lora_down_grad));
  m.impl("dropout_keep_mask", TORCH_BOX(&dropout_keep_mask));
}

#if defined(LRK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CUDA, m) {
  m.impl("dropout_keep_mask", TORCH_BOX(&dropout_keep_mask_cuda));
}
#endif
