// The torch ops of the extension, on LibTorch's stable ABI: checks, allocation, dispatch.
// One binary serves every torch from 2.10 on and every CPython from 3.10 on, so nothing here may
// use a symbol of at:: or c10::.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "build_info.h"
#include "cpu/row_hash.h"
#include "philox.h"
#include "stable_tensor.h"

#if defined(LRK_WITH_CUDA)
#  include "cuda/dropout_mask.h"

// Weak, because the same binary must load where torch has no CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using lrk::dtype_of;
using lrk::empty;
using lrk::float_values;
using lrk::matrix;
using lrk::name_of;
using lrk::pointer;
using lrk::rows_of;
using lrk::runtime;
using lrk::shape_of;

void check_shape(const char* op, const char* name, const char* letters, const lrk::Matrix& m,
                 int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(m.rows == rows && m.cols == cols, op, ": expected ", name, " of shape ", letters,
                  " = (", rows, ", ", cols, "), got (", m.rows, ", ", m.cols, ")");
}

void check_dropout_p(const char* op, double p) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": expected 0 <= dropout_p < 1, got ", p);
}

// Dropout as an optional value with a pointer to it: null is "off".
struct DropoutArgument {
  lrk::Dropout value{};
  bool on = false;
  double inverse_keep = 1.0;  // 1 / (1 - p)
  const lrk::Dropout* get() const { return on ? &value : nullptr; }
};

lrk::Dropout dropout_from(int64_t seed, double p) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
          lrk::dropout_threshold(p)};
}

DropoutArgument dropout_argument(const char* op, const std::optional<Tensor>& seed, double p) {
  check_dropout_p(op, p);
  DropoutArgument result;
  if (p == 0.0) return result;
  STD_TORCH_CHECK(seed.has_value(), op, ": expected a dropout_seed since dropout_p is ", p,
                  "; pass an int64 tensor with one element");
  STD_TORCH_CHECK(seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                  op, ": expected dropout_seed as an int64 CPU tensor with one element, got ",
                  name_of(seed->scalar_type()), " of shape ", shape_of(*seed));
  result.value = dropout_from(*static_cast<const int64_t*>(seed->const_data_ptr()), p);
  result.on = true;
  result.inverse_keep = 1.0 / (1.0 - p);
  return result;
}

lrk::Factor factor_argument(const char* op, const Tensor& factor, bool rank_last, int64_t width) {
  const lrk::Factor result{matrix(op, "factor", factor), rank_last};
  STD_TORCH_CHECK(result.width() == width, op, ": expected factor of shape ",
                  rank_last ? "(width, R) = (" : "(R, width) = (",
                  rank_last ? width : result.rank(), ", ", rank_last ? result.rank() : width,
                  "), got ", shape_of(factor));
  return result;
}

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

std::tuple<Tensor, Tensor, Tensor> lora_linear_fused(
    const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, double scaling,
    const std::optional<Tensor>& dropout_seed, double dropout_p,
    const std::optional<Tensor>& column_scale, bool keep_u) {
  const char* op = "lora_linear_fused";
  const lrk::Matrix input = matrix(op, "x", x);
  const lrk::Matrix w = matrix(op, "weight", weight);
  check_shape(op, "weight", "(N, K)", w, w.rows, input.cols);
  const lrk::Matrix b = matrix(op, "lora_b", lora_b);
  check_shape(op, "lora_b", "(N, R)", b, w.rows, lora_a.size(0));
  const std::vector<float> biases = float_values(op, "bias", "N", bias, w.rows);
  const std::vector<float> gates = float_values(op, "gate", "R", gate, b.cols);
  const std::vector<float> scales = float_values(op, "column_scale", "N", column_scale, w.rows);
  Tensor p = lora_down(x, lora_a, false, dropout_seed, dropout_p);
  Tensor y = empty({input.rows, w.rows}, x.scalar_type());
  Tensor u = empty({keep_u ? input.rows : 0, w.rows}, x.scalar_type());
  lrk::Epilogue epilogue;
  epilogue.scale = pointer(scales);
  epilogue.bias = pointer(biases);
  if (keep_u) epilogue.u = matrix(op, "u", u);
  lrk::lora_linear(runtime(), matrix(op, "output", y), matrix(op, "p", p), input, w, b,
                   pointer(gates), static_cast<float>(scaling), epilogue);
  return {y, p, u};
}

// The same without dropout, for x (..., K) that is contiguous or a matrix, where y alone is wanted.
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
  // In x's dtype, as where it is saved: the same y.
  std::vector<float> values(static_cast<size_t>(input.rows * b.cols));
  const lrk::Matrix p{values.data(), input.dtype, input.rows, b.cols, b.cols};
  lrk::lora_down(runtime(), p, input, a, 1.0f, nullptr);
  Tensor y = empty(lrk::shape_with_columns(x, w.rows), x.scalar_type());
  lrk::Epilogue epilogue;
  epilogue.scale = pointer(scales);
  epilogue.bias = pointer(biases);
  lrk::lora_linear(runtime(), rows_of(op, "output", y, w.rows), p, input, w, b, pointer(gates),
                   static_cast<float>(scaling), epilogue);
  return y;
}

// (y, p, u, norm, column_scale): lora_linear_fused with DoRA's column scale, which comes from the
// same pass over the weight.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dora_linear_fused(
    const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& magnitude, const std::optional<Tensor>& weight_sq_norm,
    const std::optional<Tensor>& bias, double scaling, const std::optional<Tensor>& dropout_seed,
    double dropout_p, bool keep_u) {
  const char* op = "dora_linear_fused";
  const lrk::Matrix input = matrix(op, "x", x);
  const lrk::Matrix w = matrix(op, "weight", weight);
  check_shape(op, "weight", "(N, K)", w, w.rows, input.cols);
  const lrk::Matrix a = matrix(op, "lora_a", lora_a);
  check_shape(op, "lora_a", "(R, K)", a, a.rows, input.cols);
  STD_TORCH_CHECK(a.rows > 0 && a.cols > 0, op, ": expected R and K of 1 or more, got ",
                  shape_of(lora_a));
  const lrk::Matrix b = matrix(op, "lora_b", lora_b);
  check_shape(op, "lora_b", "(N, R)", b, w.rows, a.rows);
  const std::vector<float> biases = float_values(op, "bias", "N", bias, w.rows);
  const std::vector<float> magnitudes = float_values(op, "magnitude", "N", magnitude, w.rows);
  const std::vector<float> squares =
      float_values(op, "weight_sq_norm", "N", weight_sq_norm, w.rows);
  Tensor p = lora_down(x, lora_a, false, dropout_seed, dropout_p);
  Tensor y = empty({input.rows, w.rows}, x.scalar_type());
  Tensor u = empty({keep_u ? input.rows : 0, w.rows}, x.scalar_type());
  Tensor norm = empty({w.rows}, ScalarType::Float), scale = empty({w.rows}, ScalarType::Float);
  const lrk::DoraNorm norms{a,
                            b,
                            scaling,
                            pointer(squares),
                            pointer(magnitudes),
                            static_cast<float*>(norm.mutable_data_ptr()),
                            nullptr,
                            static_cast<float*>(scale.mutable_data_ptr())};
  lrk::Epilogue epilogue;
  epilogue.scale = norms.column_scale;
  epilogue.bias = pointer(biases);
  if (keep_u) epilogue.u = matrix(op, "u", u);
  lrk::lora_linear(runtime(), matrix(op, "output", y), matrix(op, "p", p), input, w, b, nullptr,
                   static_cast<float>(scaling), epilogue, &norms);
  return {y, p, u, norm, scale};
}

// What a column scale g was computed from, told by hashes: of the rows of W, B and A, and of m with
// s and the dtypes.
class ScaleOperands {
 public:
  ScaleOperands(const char* op, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                const Tensor& magnitude, double scaling, const std::optional<Tensor>& column_scale,
                const std::optional<Tensor>& hashes)
      : weight_(matrix(op, "weight", weight)),
        a_(matrix(op, "lora_a", lora_a)),
        b_(matrix(op, "lora_b", lora_b)),
        magnitude_(float_values(op, "magnitude", "N", magnitude, weight_.rows)),
        scaling_(scaling),
        hashes_(empty({2 * weight_.rows + a_.rows + 1}, ScalarType::Long)),
        column_scale_(empty({weight_.rows}, ScalarType::Float)) {
    check_shape(op, "lora_a", "(R, K)", a_, a_.rows, weight_.cols);
    check_shape(op, "lora_b", "(N, R)", b_, weight_.rows, a_.rows);
    STD_TORCH_CHECK(a_.rows > 0 && a_.cols > 0, op, ": expected R and K of 1 or more, got ",
                    shape_of(lora_a));
    uint64_t* factors = of_weight() + weight_.rows;
    lrk::hash_rows(runtime(), b_, factors);
    lrk::hash_rows(runtime(), a_, factors + weight_.rows);
    std::vector<float> rest = magnitude_;
    rest.resize(rest.size() + 5);
    const int32_t dtypes[3] = {static_cast<int32_t>(weight_.dtype), static_cast<int32_t>(a_.dtype),
                               static_cast<int32_t>(b_.dtype)};
    std::memcpy(rest.data() + magnitude_.size(), &scaling, sizeof(scaling));
    std::memcpy(rest.data() + magnitude_.size() + 2, dtypes, sizeof(dtypes));
    factors[weight_.rows + a_.rows] =
        lrk::row_hash(runtime().kernels)(rest.data(), static_cast<int64_t>(4 * rest.size()));
    if (column_scale.has_value() && hashes.has_value()) {
      const bool fits =
          hashes->is_cpu() && hashes->is_contiguous() &&
          hashes->scalar_type() == ScalarType::Long && hashes->numel() == hashes_.numel() &&
          column_scale->is_cpu() && column_scale->is_contiguous() &&
          column_scale->scalar_type() == ScalarType::Float && column_scale->numel() == weight_.rows;
      if (fits) {
        kept_scale_ = static_cast<const float*>(column_scale->const_data_ptr());
        kept_ = static_cast<const uint64_t*>(hashes->const_data_ptr());
      }
    }
  }

  const lrk::Matrix& weight() const { return weight_; }
  const lrk::Matrix& lora_a() const { return a_; }
  const lrk::Matrix& lora_b() const { return b_; }
  // Where the hashes of the rows of W belong.
  uint64_t* of_weight() { return static_cast<uint64_t*>(hashes_.mutable_data_ptr()); }

  // g as it was kept, if A, B, m and s are what they were then; else null.
  const float* kept_scale() {
    const int64_t n = weight_.rows, all = hashes_.numel();
    return kept_ && std::equal(kept_ + n, kept_ + all, of_weight() + n) ? kept_scale_ : nullptr;
  }
  bool weight_is_what_it_was() { return std::equal(kept_, kept_ + weight_.rows, of_weight()); }

  // g, made anew. By a pass of its own, so that its bits do not depend on the product beside it.
  const float* compute_scale() {
    float* scale = static_cast<float*>(column_scale_.mutable_data_ptr());
    std::vector<float> norms(static_cast<size_t>(weight_.rows));
    lrk::dora_norm(runtime(), weight_,
                   {a_, b_, scaling_, nullptr, pointer(magnitude_), norms.data(), nullptr, scale});
    return scale;
  }
  const Tensor& column_scale() const { return column_scale_; }
  const Tensor& hashes() const { return hashes_; }

 private:
  lrk::Matrix weight_, a_, b_;
  std::vector<float> magnitude_;
  double scaling_;
  Tensor hashes_, column_scale_;
  const uint64_t* kept_ = nullptr;
  const float* kept_scale_ = nullptr;
};

Tensor nothing(ScalarType type) { return empty({0}, type); }

// (y, g, hashes) of y = g * (x W^T + s x A^T B^T) + bias. With g and hashes of an earlier call g is
// used as it is where every operand still has its hash, that of W being taken as W is multiplied:
// the last two results are then empty. Else g is computed with y.
std::tuple<Tensor, Tensor, Tensor> dora_linear_remembering(
    const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& magnitude, const std::optional<Tensor>& bias, double scaling,
    const std::optional<Tensor>& column_scale, const std::optional<Tensor>& hashes) {
  const char* op = "dora_linear_remembering";
  ScaleOperands operands(op, weight, lora_a, lora_b, magnitude, scaling, column_scale, hashes);
  const lrk::Matrix& w = operands.weight();
  const lrk::Matrix input = rows_of(op, "x", x, w.cols);
  const std::vector<float> biases = float_values(op, "bias", "N", bias, w.rows);
  std::vector<float> values(static_cast<size_t>(input.rows * operands.lora_a().rows));
  const lrk::Matrix p{values.data(), input.dtype, input.rows, operands.lora_a().rows,
                      operands.lora_a().rows};
  lrk::lora_down(runtime(), p, input, {operands.lora_a(), false}, 1.0f, nullptr);
  Tensor y = empty(lrk::shape_with_columns(x, w.rows), x.scalar_type());
  const lrk::Matrix out = rows_of(op, "output", y, w.rows);
  lrk::Epilogue epilogue;
  epilogue.bias = pointer(biases);
  const auto product = [&](const float* scale) {
    epilogue.scale = scale;
    lrk::lora_linear(runtime(), out, p, input, w, operands.lora_b(), nullptr,
                     static_cast<float>(scaling), epilogue, nullptr, operands.of_weight());
  };
  if (const float* scale = operands.kept_scale()) {
    product(scale);
    if (operands.weight_is_what_it_was()) {
      return {y, nothing(ScalarType::Float), nothing(ScalarType::Long)};
    }
  }
  product(operands.compute_scale());
  return {y, operands.column_scale(), operands.hashes()};
}

// (g, hashes) alone, for a product of the library's; both empty where those of an earlier call
// hold.
std::tuple<Tensor, Tensor> dora_column_scale_remembering(const Tensor& weight, const Tensor& lora_a,
                                                         const Tensor& lora_b,
                                                         const Tensor& magnitude, double scaling,
                                                         const std::optional<Tensor>& column_scale,
                                                         const std::optional<Tensor>& hashes) {
  ScaleOperands operands("dora_column_scale_remembering", weight, lora_a, lora_b, magnitude,
                         scaling, column_scale, hashes);
  lrk::hash_rows(runtime(), operands.weight(), operands.of_weight());
  if (operands.kept_scale() && operands.weight_is_what_it_was()) {
    return {nothing(ScalarType::Float), nothing(ScalarType::Long)};
  }
  operands.compute_scale();
  return {operands.column_scale(), operands.hashes()};
}

// A matrix that is written: its rows may not overlap.
lrk::Matrix target(const char* op, const char* name, Tensor t) {
  lrk::Matrix result = matrix(op, name, t);
  result.data = t.mutable_data_ptr();
  STD_TORCH_CHECK(result.rows <= 1 || result.stride >= result.cols, op, ": expected ", name,
                  " whose rows do not overlap, got row stride ", result.stride, " for ",
                  result.cols, " columns");
  return result;
}

Tensor lora_grad_x(const Tensor& grad_y, const Tensor& q, const Tensor& weight,
                   const Tensor& lora_a, const std::optional<Tensor>& gate, double scaling,
                   const std::optional<Tensor>& dropout_seed, double dropout_p,
                   const std::optional<Tensor>& row_scale) {
  const char* op = "lora_grad_x";
  const lrk::Matrix dy = matrix(op, "grad_y", grad_y);
  const lrk::Matrix w = matrix(op, "weight", weight);
  check_shape(op, "weight", "(N, K)", w, dy.cols, w.cols);
  const lrk::Matrix a = matrix(op, "lora_a", lora_a);
  check_shape(op, "lora_a", "(R, K)", a, a.rows, w.cols);
  const lrk::Matrix left = matrix(op, "q", q);
  check_shape(op, "q", "(M, R)", left, dy.rows, a.rows);
  const std::vector<float> gates = float_values(op, "gate", "R", gate, a.rows);
  const DropoutArgument dropout = dropout_argument(op, dropout_seed, dropout_p);
  const std::vector<float> scales = float_values(op, "row_scale", "N", row_scale, w.rows);
  Tensor grad_x = empty({dy.rows, w.cols}, grad_y.scalar_type());
  lrk::lora_grad_x(runtime(), matrix(op, "output", grad_x), left, dy, w, a, pointer(gates),
                   static_cast<float>(scaling * dropout.inverse_keep), dropout.get(),
                   pointer(scales));
  return grad_x;
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
  lrk::lora_up(runtime(), sum, left, f, pointer(gates),
               static_cast<float>(scaling * dropout.inverse_keep), dropout.get());
}

void dora_up_(Tensor u, const Tensor& p, const Tensor& lora_b, double scaling,
              const Tensor& column_scale, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& y) {
  const char* op = "dora_up_";
  const lrk::Matrix sum = target(op, "u", u);
  const lrk::Factor f = factor_argument(op, lora_b, true, sum.cols);
  const lrk::Matrix left = matrix(op, "p", p);
  check_shape(op, "p", "(M, R)", left, sum.rows, f.rank());
  const std::vector<float> scales = float_values(op, "column_scale", "N", column_scale, sum.cols);
  const std::vector<float> biases = float_values(op, "bias", "N", bias, sum.cols);
  lrk::Matrix scaled = sum;
  if (y.has_value()) {
    scaled = target(op, "y", *y);
    check_shape(op, "y", "(M, N)", scaled, sum.rows, sum.cols);
    STD_TORCH_CHECK(scaled.dtype == sum.dtype, op, ": expected y of u's dtype");
  }
  lrk::lora_up(runtime(), sum, left, f, nullptr, static_cast<float>(scaling), nullptr,
               pointer(scales), pointer(biases), &scaled);
}

// The operands of a ScaleGrad, checked, and its results, allocated.
struct ScaleGradArgument {
  std::vector<float> column_scale, norm;
  Tensor grad_u, grad_m;
  lrk::Matrix u{};
  lrk::ScaleGrad value{};

  ScaleGradArgument(const char* op, const Tensor& grad_y, const std::optional<Tensor>& saved_u,
                    const Tensor& scale, const Tensor& norms, bool keep_u = true)
      : column_scale(float_values(op, "column_scale", "N", scale, grad_y.size(1))),
        norm(float_values(op, "norm", "N", norms, grad_y.size(1))),
        grad_u(empty({keep_u ? grad_y.size(0) : 0, grad_y.size(1)}, grad_y.scalar_type())),
        grad_m(empty({saved_u.has_value() ? grad_y.size(1) : 0}, ScalarType::Float)) {
    value = {matrix(op, "grad_u", grad_u), nullptr, column_scale.data(), norm.data(), nullptr};
    if (!keep_u) value.grad_u.data = nullptr;
    if (!saved_u.has_value()) return;
    u = matrix(op, "u", *saved_u);
    check_shape(op, "u", "(M, N)", u, grad_y.size(0), grad_y.size(1));
    STD_TORCH_CHECK(u.dtype == value.grad_u.dtype, op, ": expected u of grad_y's dtype");
    value.u = &u;
    value.grad_m = static_cast<float*>(grad_m.mutable_data_ptr());
  }
  ScaleGradArgument(const ScaleGradArgument&) = delete;
};

std::tuple<Tensor, Tensor> dora_scale_grad(const Tensor& grad_y, const std::optional<Tensor>& u,
                                           const Tensor& column_scale, const Tensor& norm) {
  const char* op = "dora_scale_grad";
  const lrk::Matrix from = matrix(op, "grad_y", grad_y);
  const ScaleGradArgument to(op, grad_y, u, column_scale, norm);
  lrk::dora_scale_grad(runtime(), to.value, from);
  return {to.grad_u, to.grad_m};
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
  lrk::lora_grad(runtime(), {matrix(op, "output", out), rank_last}, wide, left, pointer(gates),
                 static_cast<float>(scaling * dropout.inverse_keep), dropout.get());
  return out;
}

// What `lora_down_grad` and `dora_down_grad` have in common.
struct DownGradArgument {
  lrk::Matrix grad_y, lora_b, p;
  Tensor q, grad_b;

  DownGradArgument(const char* op, const Tensor& dy, const Tensor& b, const Tensor& saved_p,
                   ScalarType grad_dtype)
      : grad_y(matrix(op, "grad_y", dy)),
        lora_b(matrix(op, "lora_b", b)),
        p(matrix(op, "p", saved_p)) {
    check_shape(op, "lora_b", "(N, R)", lora_b, grad_y.cols, lora_b.cols);
    check_shape(op, "p", "(M, R)", p, grad_y.rows, lora_b.cols);
    dtype_of(op, "grad_dtype", grad_dtype);
    q = empty({grad_y.rows, lora_b.cols}, dy.scalar_type());
    grad_b = empty({grad_y.cols, lora_b.cols}, grad_dtype);
  }
};

std::tuple<Tensor, Tensor> lora_down_grad(const Tensor& grad_y, const Tensor& lora_b,
                                          const Tensor& p, const std::optional<Tensor>& gate,
                                          double scaling, ScalarType grad_dtype) {
  const char* op = "lora_down_grad";
  const DownGradArgument a(op, grad_y, lora_b, p, grad_dtype);
  const std::vector<float> gates = float_values(op, "gate", "R", gate, a.lora_b.cols);
  lrk::lora_down_grad(runtime(), matrix(op, "q", a.q), matrix(op, "grad_b", a.grad_b), a.grad_y,
                      a.lora_b, a.p, pointer(gates), static_cast<float>(scaling));
  return {a.q, a.grad_b};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_down_grad(const Tensor& grad_y,
                                                          const std::optional<Tensor>& u,
                                                          const Tensor& column_scale,
                                                          const Tensor& norm, const Tensor& lora_b,
                                                          const Tensor& p, double scaling,
                                                          ScalarType grad_dtype, bool keep_grad_u) {
  const char* op = "dora_down_grad";
  const DownGradArgument a(op, grad_y, lora_b, p, grad_dtype);
  const ScaleGradArgument to(op, grad_y, u, column_scale, norm, keep_grad_u);
  lrk::lora_down_grad(runtime(), matrix(op, "q", a.q), matrix(op, "grad_b", a.grad_b), a.grad_y,
                      a.lora_b, a.p, nullptr, static_cast<float>(scaling), &to.value);
  return {to.grad_u, to.grad_m, a.q, a.grad_b};
}

void check_mask_arguments(const char* op, const Tensor& seed, int64_t rows, int64_t columns,
                          double p) {
  check_dropout_p(op, p);
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, op,
                  ": expected seed as an int64 tensor with one element, got ",
                  name_of(seed.scalar_type()), " of shape ", shape_of(seed));
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": expected rows and columns of 0 or more, got ",
                  rows, " and ", columns);
}

Tensor dropout_keep_mask(const Tensor& seed, int64_t rows, int64_t columns, double p) {
  check_mask_arguments("dropout_keep_mask", seed, rows, columns, p);
  Tensor out = empty({rows, columns}, ScalarType::Bool);
  lrk::dropout_keep_mask(runtime(), static_cast<uint8_t*>(out.mutable_data_ptr()), rows, columns,
                         dropout_from(*static_cast<const int64_t*>(seed.const_data_ptr()), p));
  return out;
}

#if defined(LRK_WITH_CUDA)

Tensor dropout_keep_mask_cuda(const Tensor& seed, int64_t rows, int64_t columns, double p) {
  const char* op = "dropout_keep_mask";
  check_mask_arguments(op, seed, rows, columns, p);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
                  ": this torch has no CUDA support; install a CUDA build of torch");
  const int32_t device = seed.get_device_index();
  const int64_t sizes[2] = {rows, columns};
  const int64_t strides[2] = {columns > 0 ? columns : 1, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_bool(),
                                                  aoti_torch_device_type_cuda(), device, &handle));
  Tensor out(handle);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error =
      lrk::launch_dropout_keep_mask(static_cast<uint8_t*>(out.mutable_data_ptr()),
                                    static_cast<const int64_t*>(seed.const_data_ptr()), rows,
                                    columns, lrk::dropout_threshold(p), device, stream);
  STD_TORCH_CHECK(error == nullptr, op, ": the launch failed on device ", device, ": ", error);
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
      "dora_linear_fused(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
      "Tensor? weight_sq_norm, Tensor? bias, float scaling, Tensor? dropout_seed, float dropout_p, "
      "bool keep_u) -> (Tensor y, Tensor p, Tensor u, Tensor norm, Tensor column_scale)");
  m.def(
      "dora_linear_remembering(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor magnitude, Tensor? bias, float scaling, Tensor? column_scale, Tensor? hashes) -> "
      "(Tensor y, Tensor column_scale, Tensor hashes)");
  m.def(
      "dora_column_scale_remembering(Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor magnitude, float scaling, Tensor? column_scale, Tensor? hashes) -> "
      "(Tensor column_scale, Tensor hashes)");
  m.def(
      "lora_grad_x(Tensor grad_y, Tensor q, Tensor weight, Tensor lora_a, Tensor? gate, "
      "float scaling, Tensor? dropout_seed, float dropout_p, Tensor? row_scale=None) -> Tensor");
  m.def(
      "dora_up_(Tensor(a!) u, Tensor p, Tensor lora_b, float scaling, Tensor column_scale, "
      "Tensor? bias, Tensor(b!)? y) -> ()");
  m.def(
      "dora_scale_grad(Tensor grad_y, Tensor? u, Tensor column_scale, Tensor norm) -> "
      "(Tensor grad_u, Tensor grad_m)");
  m.def(
      "lora_up_(Tensor(a!) y, Tensor p, Tensor factor, bool factor_rank_last, Tensor? gate=None, "
      "float scaling=1.0, Tensor? dropout_seed=None, float dropout_p=0.0) -> ()");
  m.def(
      "lora_grad(Tensor big, Tensor p, Tensor? gate, float scaling, bool rank_last, "
      "Tensor? dropout_seed, float dropout_p, ScalarType out_dtype) -> Tensor");
  m.def(
      "lora_down_grad(Tensor grad_y, Tensor lora_b, Tensor p, Tensor? gate, float scaling, "
      "ScalarType grad_dtype) -> (Tensor q, Tensor grad_b)");
  m.def(
      "dora_down_grad(Tensor grad_y, Tensor? u, Tensor column_scale, Tensor norm, Tensor lora_b, "
      "Tensor p, float scaling, ScalarType grad_dtype, bool keep_grad_u) -> "
      "(Tensor grad_u, Tensor grad_m, Tensor q, Tensor grad_b)");
  m.def("dropout_keep_mask(Tensor seed, SymInt rows, SymInt columns, float p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("lora_down", TORCH_BOX(&lora_down));
  m.impl("lora_linear_fused", TORCH_BOX(&lora_linear_fused));
  m.impl("lora_linear_inference", TORCH_BOX(&lora_linear_inference));
  m.impl("dora_linear_fused", TORCH_BOX(&dora_linear_fused));
  m.impl("dora_linear_remembering", TORCH_BOX(&dora_linear_remembering));
  m.impl("dora_column_scale_remembering", TORCH_BOX(&dora_column_scale_remembering));
  m.impl("lora_grad_x", TORCH_BOX(&lora_grad_x));
  m.impl("lora_up_", TORCH_BOX(&lora_up_));
  m.impl("dora_up_", TORCH_BOX(&dora_up_));
  m.impl("dora_scale_grad", TORCH_BOX(&dora_scale_grad));
  m.impl("lora_grad", TORCH_BOX(&lora_grad));
  m.impl("lora_down_grad", TORCH_BOX(&lora_down_grad));
  m.impl("dora_down_grad", TORCH_BOX(&dora_down_grad));
  m.impl("dropout_keep_mask", TORCH_BOX(&dropout_keep_mask));
}

#if defined(LRK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CUDA, m) {
  m.impl("dropout_keep_mask", TORCH_BOX(&dropout_keep_mask_cuda));
}
#endif

// Plain C entry points, for ctypes: they need no tensor and no second module.
extern "C" {

__attribute__((visibility("default"))) const char* lrk_build_info() { return LRK_BUILD_INFO_JSON; }

__attribute__((visibility("default"))) const char* lrk_cpu_isa() {
  return lrk::kernel_table().name;
}

// An empty module: importing it registers the ops above.
__attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
}
