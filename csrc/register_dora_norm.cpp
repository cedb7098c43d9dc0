// The torch op of the DoRA norm, for the CPU and for CUDA, on LibTorch's stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dora_norm.h"
#include "stable_tensor.h"

#if defined(LRK_WITH_CUDA)
#  include "cuda/dora_norm.h"

// Weak, because the same binary must load where torch has no CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "dora_norm";

using lrk::shape_of;

void check_device(const char* name, const Tensor& t, const Tensor& weight) {
  const bool same = t.is_cpu() ? weight.is_cpu()
                               : t.is_cuda() && weight.is_cuda() &&
                                     t.get_device_index() == weight.get_device_index();
  STD_TORCH_CHECK(same, kOp, ": expected ", name, " on the device of the weight");
}

lrk::Matrix matrix(const char* name, const Tensor& t, const Tensor& weight) {
  check_device(name, t, weight);
  return lrk::matrix_anywhere(kOp, name, t);
}

struct Operands {
  lrk::Matrix weight, lora_a, lora_b;
};

Operands operands(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b) {
  const Operands o{matrix("weight", weight, weight), matrix("lora_a", lora_a, weight),
                   matrix("lora_b", lora_b, weight)};
  STD_TORCH_CHECK(o.weight.cols > 0, kOp, ": expected weight of shape (N, K) with K of 1 or more");
  STD_TORCH_CHECK(o.lora_a.cols == o.weight.cols, kOp, ": expected lora_a of shape (R, K) = (R, ",
                  o.weight.cols, "), got ", shape_of(lora_a));
  STD_TORCH_CHECK(o.lora_a.rows >= 1, kOp, ": expected a rank of at least 1, got ", o.lora_a.rows);
  STD_TORCH_CHECK(o.lora_b.rows == o.weight.rows && o.lora_b.cols == o.lora_a.rows, kOp,
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

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

using Result = std::tuple<Tensor, Tensor, Tensor>;

// ---- CPU ----------------------------------------------------------------------------------------

Result dora_norm(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling,
                 const std::optional<Tensor>& weight_sq_norm,
                 const std::optional<Tensor>& magnitude, bool) {
  const Operands o = operands(weight, lora_a, lora_b);
  const int64_t n = o.weight.rows;
  const std::vector<float> squares =
      lrk::float_values(kOp, "weight_sq_norm", "N", weight_sq_norm, n);
  const std::vector<float> magnitudes = lrk::float_values(kOp, "magnitude", "N", magnitude, n);
  const int32_t cpu = aoti_torch_device_type_cpu();
  Tensor norm = empty_floats(n, cpu, 0), sq_norm = empty_floats(n, cpu, 0);
  Tensor scale = empty_floats(magnitude.has_value() ? n : 0, cpu, 0);
  lrk::dora_norm(lrk::runtime(), o.weight,
                 {o.lora_a, o.lora_b, scaling, squares.empty() ? nullptr : squares.data(),
                  magnitudes.empty() ? nullptr : magnitudes.data(), floats(norm), floats(sq_norm),
                  floats(scale)});
  return {norm, sq_norm, scale};
}

// ---- CUDA ---------------------------------------------------------------------------------------

#if defined(LRK_WITH_CUDA)

constexpr int64_t kMaxRank = 512;

lrk::DoraMatrix device_matrix(const lrk::Matrix& m) { return {m.data, m.dtype, m.stride}; }

void check_vector(const char* name, const Tensor& t, const Tensor& weight) {
  check_device(name, t, weight);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == weight.size(0), kOp, ": expected ", name,
                  " of shape (N,) = (", weight.size(0), ",), got ", shape_of(t));
}

lrk::DoraMatrix device_vector(const char* name, const std::optional<Tensor>& t,
                              const Tensor& weight) {
  if (!t.has_value()) return {nullptr, lrk::Dtype::kFloat32, 0};
  check_vector(name, *t, weight);
  return {t->const_data_ptr(), lrk::dtype_of(kOp, name, (*t).scalar_type()), t->stride(0)};
}

Result dora_norm_cuda(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                      double scaling, const std::optional<Tensor>& weight_sq_norm,
                      const std::optional<Tensor>& magnitude, bool clusters) {
  const Operands o = operands(weight, lora_a, lora_b);
  STD_TORCH_CHECK(o.lora_a.rows <= kMaxRank, kOp, ": expected a rank of 1 to ", kMaxRank,
                  " on a GPU, got ", o.lora_a.rows);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, kOp,
                  ": this torch has no CUDA support; install a CUDA build of torch");
  const int32_t device = weight.get_device_index(), cuda = aoti_torch_device_type_cuda();
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
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = lrk::launch_dora_norm(problem, clusters, device, stream);
  STD_TORCH_CHECK(error == nullptr, kOp, ": the launch failed on device ", device, ": ", error);
  return {norm, sq_norm, scale};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def(
      "dora_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, "
      "Tensor? weight_sq_norm, Tensor? magnitude, bool clusters=True) -> "
      "(Tensor norm, Tensor weight_sq_norm, Tensor column_scale)");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) { m.impl("dora_norm", TORCH_BOX(&dora_norm)); }

#if defined(LRK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CUDA, m) {
  m.impl("dora_norm", TORCH_BOX(&dora_norm_cuda));
}
#endif
