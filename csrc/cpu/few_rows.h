// Passes over few rows of x, where a factor or a weight is the long side: it is then read where it
// lies, without packing. For the lora_*.cpp files alone.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "scratch.h"

namespace lrk {

constexpr int64_t kFewRows = 128;                  // up to here one task takes all rows of y
constexpr int64_t kDotRows = 8;                    // up to here rows stay beside a row of W or A
constexpr int64_t kDotColumns = 16;                // columns of y, or ranks, in one task of such
constexpr int64_t kSerialDots = int64_t{1} << 16;  // multiply-adds of such worth a second thread

// The rows of a matrix, at most kDotRows, as float32: in place, or staged in the call's scratch.
struct FloatRows {
  CallScratch scratch;
  const float* rows[kDotRows];

  FloatRows(const KernelTable& kernels, const Matrix& m, const Dropout* dropout)
      : scratch(static_cast<size_t>(m.rows * m.cols) * sizeof(float)) {
    for (int64_t i = 0; i < m.rows; ++i) {
      rows[i] = static_cast<const float*>(element(m, i, 0));
      if (m.dtype == Dtype::kFloat32 && !dropout) continue;
      float* staged = static_cast<float*>(scratch.base()) + i * m.cols;
      Source source = rectangle(m, i, 0, 1, m.cols);
      source.dropout = dropout;
      kernels.stage_float(staged, m.cols, source);
      rows[i] = staged;
    }
  }
};

}  // namespace lrk
