// Arguments of torch ops as the kernels take them: checked, or refused in words that name the op
// and the argument. For the registration files (register_*.cpp) alone.
//
// They speak to torch through LibTorch's stable ABI, so that one binary serves every torch
// from 2.10 on: no symbol of at:: or c10:: may be used.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/lora.h"
#include "philox.h"

namespace lrk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- torch as the kernels see it ----------------------------------------------------------------

inline void parallel_for(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    if (begin < end) body(begin, end, context);
  });
}

inline Runtime runtime() { return {kernel_table(), parallel_for}; }

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << (t.dim() == 1 ? ",)" : ")");
  return out.str();
}

// ---- tensors ------------------------------------------------------------------------------------

inline Dtype dtype_of(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": expected ", name,
                      " of dtype float32, bfloat16 or float16, got ", name_of(type));
  }
  return Dtype::kFloat32;
}

// A 2-D tensor with adjacent columns, on any device.
inline Matrix matrix_anywhere(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " with 2 dimensions, got shape ",
                  shape_of(t));
  const int64_t rows = t.size(0), cols = t.size(1);
  STD_TORCH_CHECK(rows == 0 || cols <= 1 || t.stride(1) == 1, op, ": expected ", name,
                  " with adjacent columns (stride 1), got stride ", t.stride(1),
                  "; pass a contiguous tensor");
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(op, name, t.scalar_type()), rows, cols,
          rows > 1 ? t.stride(0) : cols};
}

// A 2-D CPU tensor with adjacent columns.
inline Matrix matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": expected ", name, " on the CPU, like the other tensors");
  return matrix_anywhere(op, name, t);
}

inline void check_shape(const char* op, const char* name, const char* letters, const Matrix& m,
                        int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(m.rows == rows && m.cols == cols, op, ": expected ", name, " of shape ", letters,
                  " = (", rows, ", ", cols, "), got (", m.rows, ", ", m.cols, ")");
}

// A matrix that is written: its rows may not overlap.
inline Matrix target(const char* op, const char* name, Tensor t) {
  Matrix result = matrix(op, name, t);
  result.data = t.mutable_data_ptr();
  STD_TORCH_CHECK(result.rows <= 1 || result.stride >= result.cols, op, ": expected ", name,
                  " whose rows do not overlap, got row stride ", result.stride, " for ",
                  result.cols, " columns");
  return result;
}

// (..., columns) as its rows: of any stride where it is a matrix, else contiguous.
inline Matrix rows_of(const char* op, const char* name, const Tensor& t, int64_t columns) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims > 0 && t.size(dims - 1) == columns, op, ": expected ", name, " of ", columns,
                  " columns, got ", shape_of(t));
  if (dims == 2) return matrix(op, name, t);
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), op, ": expected ", name,
                  " on the CPU, and contiguous where it is no matrix");
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(op, name, t.scalar_type()),
          columns ? t.numel() / columns : 0, columns, columns};
}

// The sizes of t with another last one.
inline std::vector<int64_t> shape_with_columns(const Tensor& t, int64_t columns) {
  std::vector<int64_t> shape(static_cast<size_t>(t.dim()));
  for (int64_t i = 0; i + 1 < t.dim(); ++i) shape[static_cast<size_t>(i)] = t.size(i);
  shape.back() = columns;
  return shape;
}

// A contiguous CPU tensor without values.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  const int32_t code = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : type == ScalarType::Bool     ? aoti_torch_dtype_bool()
                       : type == ScalarType::Long     ? aoti_torch_dtype_int64()
                                                      : aoti_torch_dtype_float16();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The values of a contiguous CPU tensor of one dtype and at least `least` elements.
template <typename T>
const T* values(const char* op, const char* name, const Tensor& t, ScalarType type, int64_t least) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.is_contiguous() && t.numel() >= least,
                  op, ": expected ", name, " to be contiguous, on the CPU, of ", name_of(type),
                  " and of ", least, " or more elements, got ", name_of(t.scalar_type()),
                  " of shape ", shape_of(t));
  return static_cast<const T*>(t.const_data_ptr());
}

// A vector such as the gate as float32, whatever its float dtype and stride; empty when there is
// none.
inline std::vector<float> float_values(const char* op, const char* name, const char* letter,
                                       const std::optional<Tensor>& t, int64_t size) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == size, op, ": expected ", name,
                  " of shape (", letter, ",) = (", size, ",) on the CPU, got ", shape_of(*t));
  std::vector<float> values(static_cast<size_t>(size));
  if (size == 0) return values;
  if (t->scalar_type() == ScalarType::Double) {
    const double* wide = static_cast<const double*>(t->const_data_ptr());
    for (int64_t i = 0; i < size; ++i) values[i] = static_cast<float>(wide[i * t->stride(0)]);
    return values;
  }
  // One row of adjacent elements, or a column of others.
  const bool adjacent = t->stride(0) == 1;
  const int64_t rows = adjacent ? 1 : size, cols = adjacent ? size : 1;
  kernel_table().stage_float(values.data(), cols,
                             {t->const_data_ptr(), dtype_of(op, name, t->scalar_type()),
                              t->stride(0), rows, cols, cols, nullptr, 0, 0, nullptr});
  return values;
}

inline const float* pointer(const std::vector<float>& values) {
  return values.empty() ? nullptr : values.data();
}

// ---- factors and dropout ------------------------------------------------------------------------

inline Factor factor_argument(const char* op, const Tensor& factor, bool rank_last, int64_t width) {
  const Factor result{matrix(op, "factor", factor), rank_last};
  STD_TORCH_CHECK(result.width() == width, op, ": expected factor of shape ",
                  rank_last ? "(width, R) = (" : "(R, width) = (",
                  rank_last ? width : result.rank(), ", ", rank_last ? result.rank() : width,
                  "), got ", shape_of(factor));
  return result;
}

inline void check_dropout_p(const char* op, double p) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": expected 0 <= dropout_p < 1, got ", p);
}

// Dropout as an op has it; without dropout `get()` is null.
struct DropoutArgument {
  Dropout value{};
  bool on = false;
  double inverse_keep = 1.0;  // 1 / (1 - p); 1 without dropout
  const Dropout* get() const { return on ? &value : nullptr; }
};

inline Dropout dropout_from(int64_t seed, double p) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), dropout_threshold(p)};
}

inline DropoutArgument dropout_argument(const char* op, const std::optional<Tensor>& seed,
                                        double p) {
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

// The operands of `lora_down_grad` and `dora_down_grad`, checked, and the results that both have,
// allocated.
struct DownGradArgument {
  Tensor q, grad_b;
  LoraDownGrad value;

  DownGradArgument(const char* op, const Tensor& grad_y, const Tensor& lora_b, const Tensor& p,
                   ScalarType grad_dtype) {
    const Matrix dy = matrix(op, "grad_y", grad_y), b = matrix(op, "lora_b", lora_b);
    const Matrix saved_p = matrix(op, "p", p);
    check_shape(op, "lora_b", "(N, R)", b, dy.cols, b.cols);
    check_shape(op, "p", "(M, R)", saved_p, dy.rows, b.cols);
    dtype_of(op, "grad_dtype", grad_dtype);
    q = empty({dy.rows, b.cols}, grad_y.scalar_type());
    grad_b = empty({dy.cols, b.cols}, grad_dtype);
    value = {matrix(op, "q", q), matrix(op, "grad_b", grad_b), dy, b, saved_p};
  }
};

}  // namespace lrk
