// Tensors of LibTorch's stable ABI as the kernels take them, and the words for those that do not
// fit. For the registration files alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/lora.h"

namespace lrk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// The same, on the CPU.
inline Matrix matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": expected ", name, " on the CPU, like the other tensors");
  return matrix_anywhere(op, name, t);
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

}  // namespace lrk
