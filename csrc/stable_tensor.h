// Tensors of LibTorch's stable ABI as the kernels take them, and the words for those that do not
// fit. For the registration files alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <string>

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
  STD_TORCH_CHECK(cols <= 1 || t.stride(1) == 1, op, ": expected ", name,
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

}  // namespace lrk
