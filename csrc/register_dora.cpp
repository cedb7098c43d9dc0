// The torch ops of a DoRA layer: its linear, the ways back, and the norm on a CPU and on a GPU. The
// passes that LoRA and DoRA share are in register_lora.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/dora.h"
#include "cpu/lora.h"
#include "cpu/row_hash.h"
#include "lora_ops.h"

#if defined(LRK_WITH_CUDA)
#  include "cuda/dora_norm.h"
#  include "cuda_arguments.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using lrk::check_shape;
using lrk::empty;
using lrk::factor_argument;
using lrk::float_values;
using lrk::matrix;
using lrk::pointer;
using lrk::rows_of;
using lrk::runtime;
using lrk::shape_of;
using lrk::target;

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// ---- forward ------------------------------------------------------------------------------------

// (y, p, u, norm, g) of y = g * u + bias, u = x W^T + s p B^T, p = drop(x) A^T: lora_linear_fused
// with DoRA's column scale, whose norms come from the same pass over the weight.
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
  const lrk::DropoutArgument dropout = lrk::dropout_argument(op, dropout_seed, dropout_p);
  Tensor p = empty({input.rows, a.rows}, x.scalar_type());
  lrk::lora_down(runtime(), matrix(op, "p", p), input, {a, false},
                 static_cast<float>(dropout.inverse_keep), dropout.get());
  Tensor y = empty({input.rows, w.rows}, x.scalar_type());
  Tensor u = empty({keep_u ? input.rows : 0, w.rows}, x.scalar_type());
  Tensor norm = empty({w.rows}, ScalarType::Float), scale = empty({w.rows}, ScalarType::Float);
  const lrk::DoraNorm norms{
      a, b, scaling, pointer(squares), pointer(magnitudes), floats(norm), nullptr, floats(scale)};
  lrk::LoraLinear linear{matrix(op, "output", y), matrix(op, "p", p), input, w, b};
  linear.scale = static_cast<float>(scaling);
  linear.epilogue.scale = norms.column_scale;
  linear.epilogue.bias = pointer(biases);
  if (keep_u) linear.epilogue.u = matrix(op, "u", u);
  linear.norm = &norms;
  lrk::lora_linear(runtime(), linear);
  return {y, p, u, norm, scale};
}

// u += s p B^T, then y = column_scale * u + bias; without y this goes to u itself.
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
  lrk::ColumnScale columns{pointer(scales), pointer(biases), sum};
  if (y.has_value()) {
    columns.out = target(op, "y", *y);
    check_shape(op, "y", "(M, N)", columns.out, sum.rows, sum.cols);
    STD_TORCH_CHECK(columns.out.dtype == sum.dtype, op, ": expected y of u's dtype");
  }
  lrk::LoraUp up{sum, left, f};
  up.scale = static_cast<float>(scaling);
  up.columns = &columns;
  lrk::lora_up(runtime(), up);
}

// ---- a column scale that is kept between calls --------------------------------------------------

// The operands of a column scale g, with hashes by which a later call tells whether a g that it
// kept is still theirs: one for each row of W, B and A, and one of m together with s and the
// dtypes.
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
    uint64_t* factors = weight_hashes() + weight_.rows;
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
  // Where the hashes of the rows of W are to be written.
  uint64_t* weight_hashes() { return static_cast<uint64_t*>(hashes_.mutable_data_ptr()); }

  // The kept g if A, B, m and s are what they were then, whatever W is; else null.
  const float* kept_scale() {
    const int64_t n = weight_.rows, all = hashes_.numel();
    return kept_ && std::equal(kept_ + n, kept_ + all, weight_hashes() + n) ? kept_scale_ : nullptr;
  }
  // Whether W is, too; once its hashes are written, and there is a kept g.
  bool weight_is_what_it_was() { return std::equal(kept_, kept_ + weight_.rows, weight_hashes()); }

  // Computes g by a pass of its own, so that its bits do not depend on the product beside it.
  const float* compute_scale() {
    float* scale = floats(column_scale_);
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

// (y, g, hashes) of y = g * (x W^T + s x A^T B^T) + bias. Given the g and hashes of an earlier
// call, and operands that all have their hashes still, that g is used, and the last two results are
// empty. Else g is computed. W is hashed as it is multiplied, so y may have to be computed again.
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
  lrk::LoraLinear linear{rows_of(op, "output", y, w.rows), p, input, w, operands.lora_b()};
  linear.scale = static_cast<float>(scaling);
  linear.epilogue.bias = pointer(biases);
  linear.weight_hashes = operands.weight_hashes();
  const auto product = [&](const float* scale) {
    linear.epilogue.scale = scale;
    lrk::lora_linear(runtime(), linear);
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

// (g, hashes) alone, where torch multiplies; both empty where those of an earlier call hold.
std::tuple<Tensor, Tensor> dora_column_scale_remembering(const Tensor& weight, const Tensor& lora_a,
                                                         const Tensor& lora_b,
                                                         const Tensor& magnitude, double scaling,
                                                         const std::optional<Tensor>& column_scale,
                                                         const std::optional<Tensor>& hashes) {
  ScaleOperands operands("dora_column_scale_remembering", weight, lora_a, lora_b, magnitude,
                         scaling, column_scale, hashes);
  lrk::hash_rows(runtime(), operands.weight(), operands.weight_hashes());
  if (operands.kept_scale() && operands.weight_is_what_it_was()) {
    return {nothing(ScalarType::Float), nothing(ScalarType::Long)};
  }
  operands.compute_scale();
  return {operands.column_scale(), operands.hashes()};
}

// ---- backward -----------------------------------------------------------------------------------

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
    value.grad_m = floats(grad_m);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_down_grad(const Tensor& grad_y,
                                                          const std::optional<Tensor>& u,
                                                          const Tensor& column_scale,
                                                          const Tensor& norm, const Tensor& lora_b,
                                                          const Tensor& p, double scaling,
                                                          ScalarType grad_dtype, bool keep_grad_u) {
  const char* op = "dora_down_grad";
  lrk::DownGradArgument argument(op, grad_y, lora_b, p, grad_dtype);
  const ScaleGradArgument to(op, grad_y, u, column_scale, norm, keep_grad_u);
  argument.value.scale = static_cast<float>(scaling);
  argument.value.scale_grad = &to.value;
  lrk::lora_down_grad(runtime(), argument.value);
  return {to.grad_u, to.grad_m, argument.q, argument.grad_b};
}

// (dX, dA, dB, dm): all of a backward whose products are the extension's, in one call.
std::tuple<Tensor, Tensor, Tensor, Tensor> dora_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& norm, const Tensor& column_scale, const Tensor& p,
    const std::optional<Tensor>& u, double scaling, const std::optional<Tensor>& dropout_seed,
    double dropout_p) {
  const auto [grad_u, grad_m, q, grad_b] = dora_down_grad(grad_y, u, column_scale, norm, lora_b, p,
                                                          scaling, lora_b.scalar_type(), false);
  const Tensor grad_x = lrk::ops::lora_grad_x(grad_y, q, weight, lora_a, std::nullopt, scaling,
                                              dropout_seed, dropout_p, column_scale);
  const Tensor grad_a = lrk::ops::lora_grad(x, q, std::nullopt, scaling, false, dropout_seed,
                                            dropout_p, lora_a.scalar_type());
  return {grad_x, grad_a, grad_b, grad_m};
}

// ---- the norm -----------------------------------------------------------------------------------

constexpr const char* kNormOp = "dora_norm";

void check_device(const char* name, const Tensor& t, const Tensor& weight) {
  const bool same = t.is_cpu() ? weight.is_cpu()
                               : t.is_cuda() && weight.is_cuda() &&
                                     t.get_device_index() == weight.get_device_index();
  STD_TORCH_CHECK(same, kNormOp, ": expected ", name, " on the device of the weight");
}

lrk::Matrix norm_matrix(const char* name, const Tensor& t, const Tensor& weight) {
  check_device(name, t, weight);
  return lrk::matrix_anywhere(kNormOp, name, t);
}

struct NormOperands {
  lrk::Matrix weight, lora_a, lora_b;
};

NormOperands norm_operands(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b) {
  const NormOperands o{norm_matrix("weight", weight, weight), norm_matrix("lora_a", lora_a, weight),
                       norm_matrix("lora_b", lora_b, weight)};
  STD_TORCH_CHECK(o.weight.cols > 0, kNormOp,
                  ": expected weight of shape (N, K) with K of 1 or more");
  STD_TORCH_CHECK(o.lora_a.cols == o.weight.cols, kNormOp,
                  ": expected lora_a of shape (R, K) = (R, ", o.weight.cols, "), got ",
                  shape_of(lora_a));
  STD_TORCH_CHECK(o.lora_a.rows >= 1, kNormOp, ": expected a rank of at least 1, got ",
                  o.lora_a.rows);
  STD_TORCH_CHECK(o.lora_b.rows == o.weight.rows && o.lora_b.cols == o.lora_a.rows, kNormOp,
                  ": expected lora_b of shape (N, R) = (", o.weight.rows, ", ", o.lora_a.rows,
                  "), got ", shape_of(lora_b));
  return o;
}

Tensor empty_floats(int64_t size, int32_t device_type, int32_t device_index) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_float32(),
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

using NormResult = std::tuple<Tensor, Tensor, Tensor>;

// On the CPU.
NormResult dora_norm(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                     double scaling, const std::optional<Tensor>& weight_sq_norm,
                     const std::optional<Tensor>& magnitude, bool) {
  const NormOperands o = norm_operands(weight, lora_a, lora_b);
  const int64_t n = o.weight.rows;
  const std::vector<float> squares =
      float_values(kNormOp, "weight_sq_norm", "N", weight_sq_norm, n);
  const std::vector<float> magnitudes = float_values(kNormOp, "magnitude", "N", magnitude, n);
  const int32_t cpu = aoti_torch_device_type_cpu();
  Tensor norm = empty_floats(n, cpu, 0), sq_norm = empty_floats(n, cpu, 0);
  Tensor scale = empty_floats(magnitude.has_value() ? n : 0, cpu, 0);
  lrk::dora_norm(runtime(), o.weight,
                 {o.lora_a, o.lora_b, scaling, pointer(squares), pointer(magnitudes), floats(norm),
                  floats(sq_norm), floats(scale)});
  return {norm, sq_norm, scale};
}

#if defined(LRK_WITH_CUDA)

// On a GPU.
constexpr int64_t kMaxRank = 512;

lrk::DoraMatrix device_matrix(const lrk::Matrix& m) { return {m.data, m.dtype, m.stride}; }

void check_vector(const char* name, const Tensor& t, const Tensor& weight) {
  check_device(name, t, weight);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == weight.size(0), kNormOp, ": expected ", name,
                  " of shape (N,) = (", weight.size(0), ",), got ", shape_of(t));
}

lrk::DoraMatrix device_vector(const char* name, const std::optional<Tensor>& t,
                              const Tensor& weight) {
  if (!t.has_value()) return {nullptr, lrk::Dtype::kFloat32, 0};
  check_vector(name, *t, weight);
  return {t->const_data_ptr(), lrk::dtype_of(kNormOp, name, (*t).scalar_type()), t->stride(0)};
}

NormResult dora_norm_cuda(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                          double scaling, const std::optional<Tensor>& weight_sq_norm,
                          const std::optional<Tensor>& magnitude, bool clusters) {
  const NormOperands o = norm_operands(weight, lora_a, lora_b);
  STD_TORCH_CHECK(o.lora_a.rows <= kMaxRank, kNormOp, ": expected a rank of 1 to ", kMaxRank,
                  " on a GPU, got ", o.lora_a.rows);
  const int32_t device = weight.get_device_index(), cuda = aoti_torch_device_type_cuda();
  void* stream = lrk::current_stream(kNormOp, device);
  const int64_t n = o.weight.rows, k = o.weight.cols, rank = o.lora_a.rows;
  lrk::DoraNormProblem problem{};
  problem.weight = device_matrix(o.weight);
  problem.lora_a = device_matrix(o.lora_a);
  problem.lora_b = device_matrix(o.lora_b);
  problem.weight_sq_norm = device_vector("weight_sq_norm", weight_sq_norm, weight);
  problem.magnitude = device_vector("magnitude", magnitude, weight);
  problem.n = n;
  problem.k = k;
  problem.rank = static_cast<int>(rank);
  problem.scaling = static_cast<float>(scaling);
  Tensor norm = empty_floats(n, cuda, device), sq_norm = empty_floats(n, cuda, device);
  Tensor scale = empty_floats(magnitude.has_value() ? n : 0, cuda, device);
  // The caching allocator gives 512-byte alignment, and frees in stream order.
  Tensor scratch = empty_floats(lrk::dora_norm_scratch_bytes(k, problem.rank) / 4, cuda, device);
  problem.norm = floats(norm);
  problem.sq_norm = floats(sq_norm);
  problem.column_scale = floats(scale);
  problem.scratch = scratch.mutable_data_ptr();
  lrk::check_launch(kNormOp, device, lrk::launch_dora_norm(problem, clusters, device, stream));
  return {norm, sq_norm, scale};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def(
      "dora_linear_fused(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
      "Tensor? weight_sq_norm, Tensor? bias, float scaling, Tensor? dropout_seed, float dropout_p, "
      "bool keep_u) -> (Tensor y, Tensor p, Tensor u, Tensor norm, Tensor column_scale)");
  m.def(
      "dora_up_(Tensor(a!) u, Tensor p, Tensor lora_b, float scaling, Tensor column_scale, "
      "Tensor? bias, Tensor(b!)? y) -> ()");
  m.def(
      "dora_linear_remembering(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor magnitude, Tensor? bias, float scaling, Tensor? column_scale, Tensor? hashes) -> "
      "(Tensor y, Tensor column_scale, Tensor hashes)");
  m.def(
      "dora_column_scale_remembering(Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor magnitude, float scaling, Tensor? column_scale, Tensor? hashes) -> "
      "(Tensor column_scale, Tensor hashes)");
  m.def(
      "dora_scale_grad(Tensor grad_y, Tensor? u, Tensor column_scale, Tensor norm) -> "
      "(Tensor grad_u, Tensor grad_m)");
  m.def(
      "dora_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor norm, Tensor column_scale, Tensor p, Tensor? u, float scaling, "
      "Tensor? dropout_seed, float dropout_p) -> "
      "(Tensor grad_x, Tensor grad_a, Tensor grad_b, Tensor grad_m)");
  m.def(
      "dora_down_grad(Tensor grad_y, Tensor? u, Tensor column_scale, Tensor norm, Tensor lora_b, "
      "Tensor p, float scaling, ScalarType grad_dtype, bool keep_grad_u) -> "
      "(Tensor grad_u, Tensor grad_m, Tensor q, Tensor grad_b)");
  m.def(
      "dora_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, "
      "Tensor? weight_sq_norm, Tensor? magnitude, bool clusters=True) -> "
      "(Tensor norm, Tensor weight_sq_norm, Tensor column_scale)");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("dora_linear_fused", TORCH_BOX(&dora_linear_fused));
  m.impl("dora_up_", TORCH_BOX(&dora_up_));
  m.impl("dora_linear_remembering", TORCH_BOX(&dora_linear_remembering));
  m.impl("dora_column_scale_remembering", TORCH_BOX(&dora_column_scale_remembering));
  m.impl("dora_scale_grad", TORCH_BOX(&dora_scale_grad));
  m.impl("dora_backward", TORCH_BOX(&dora_backward));
  m.impl("dora_down_grad", TORCH_BOX(&dora_down_grad));
  m.impl("dora_norm", TORCH_BOX(&dora_norm));
}

#if defined(LRK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CUDA, m) {
  m.impl("dora_norm", TORCH_BOX(&dora_norm_cuda));
}
#endif
