// A tensor's rows as the CPU kernels see them, and how they share work out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"

namespace lrk {

struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows;
  int64_t cols;
  int64_t stride;   // elements from one row to the next; columns are adjacent
  int64_t row = 0;  // of a coded weight, whose `data` is the whole: where this matrix begins
  int64_t col = 0;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

inline const void* element(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const char*>(m.data) + (row * m.stride + col) * dtype_bytes(m.dtype);
}
inline void* mutable_element(const Matrix& m, int64_t row, int64_t col) {
  return const_cast<void*>(element(m, row, col));
}

inline Matrix part(const Matrix& m, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  if (m.dtype == Dtype::kCoded) {
    return {m.data, m.dtype, rows, cols, m.stride, m.row + row, m.col + col};
  }
  return {mutable_element(m, row, col), m.dtype, rows, cols, m.stride};
}

inline Source rectangle(const Matrix& m, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  const void* data = m.dtype == Dtype::kCoded ? m.data : element(m, row, col);
  return {data, m.dtype, m.stride, rows, cols, cols, nullptr, m.row + row, m.col + col, nullptr};
}

inline void zero(const Matrix& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    std::memset(mutable_element(m, i, 0), 0, static_cast<size_t>(m.cols * dtype_bytes(m.dtype)));
  }
}

// A rectangle of a matrix. Unlike `part` it knows its place in the whole, which decides what
// dropout draws.
struct Region {
  const Matrix& whole;
  int64_t row, col, rows, cols;
};

// Into float32 panels. A few rows at a time: a cache line may serve two panels, and rows that lie a
// power of two apart push each other out of the cache.
inline void stage_panels(const KernelTable& kernels, float* panels, int64_t panel_stride,
                         const Region& from) {
  constexpr int64_t kRows = 8, kWide = 4 * kPanel;
  const bool coded = from.whole.dtype == Dtype::kCoded;
  float wide[kRows * kWide];
  for (int64_t i = 0; i < from.rows; i += kRows) {
    const int64_t rows = std::min(kRows, from.rows - i);
    // Codes are decoded over the width of several panels, for each of which their blocks' scales
    // would be worked out again.
    for (int64_t j = 0; coded && j < from.cols; j += kWide) {
      const int64_t cols = std::min(kWide, from.cols - j);
      Source s = rectangle(from.whole, from.row + i, from.col + j, rows, cols);
      s.padded_cols = round_up(cols, kPanel);
      kernels.stage_float(wide, kWide, s);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < cols; k += kPanel) {
          std::memcpy(panels + (j + k) / kPanel * panel_stride + (i + r) * kPanel,
                      wide + r * kWide + k, kPanel * sizeof(float));
        }
      }
    }
    for (int64_t j = 0; !coded && j < from.cols; j += kPanel) {
      const int64_t cols = std::min(kPanel, from.cols - j);
      Source s = rectangle(from.whole, from.row + i, from.col + j, rows, cols);
      s.padded_cols = kPanel;
      kernels.stage_float(panels + j / kPanel * panel_stride + i * kPanel, kPanel, s);
    }
  }
}

// A block of float32 sums; the columns of a row are adjacent.
struct Sums {
  float* data;
  int64_t stride;  // from one row to the next
};

// How to run tasks in parallel: calls body(begin, end, context) over [0, tasks), in any number of
// contiguous ranges. Supplied by the caller, so that no framework appears here.
using ParallelFor = void (*)(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context);

struct Runtime {
  const KernelTable& kernels;
  ParallelFor parallel;
};

// True if products of this dtype run on bfloat16 tiles; all others run in float32.
inline bool on_tiles(const Runtime& runtime, Dtype dtype) {
  return dtype == Dtype::kBFloat16 && runtime.kernels.multiply_bfloat16;
}

template <typename Body>
void run(const Runtime& runtime, int64_t tasks, bool parallel, const Body& body) {
  if (tasks <= 0) return;
  if (!parallel || tasks == 1) return body(int64_t{0}, tasks);
  runtime.parallel(
      tasks,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace lrk
