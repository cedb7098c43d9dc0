// The row norms of W + s B A on a CPU, without the dense sum.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"
#include "scratch.h"

namespace lrk {

// n_i^2 = |W_i|^2 + 2 s sum_r B_ir (W A^T)_ir + s^2 B_i (A A^T) B_i^T, clamped at 0; g = m / n, 0
// where n is 0. W (N, K), A (R, K), B (N, R).
struct DoraNorm {
  Matrix lora_a, lora_b;
  double scaling;
  const float* weight_sq_norm;  // N floats, or null: computed
  const float* magnitude;       // N floats, or null: no column_scale
  float* norm;                  // N floats, written, as are the others
  float* sq_norm;               // or null
  float* column_scale;
};

// W is read once where it lies. Every product keeps float32's digits: a bfloat16 W goes through
// bfloat16 tiles with A split into as many bfloat16 parts as its dtype needs (1, 2 or 3), anything
// else through float32 FMA. The order of every sum is a function of shapes alone.
void dora_norm(const Runtime& runtime, const Matrix& weight, const DoraNorm& norm);

// For a pass that multiplies W anyway: with A beside its other operand it yields U = W A^T, and
// this turns U into norms.
class RowNorms {
 public:
  // `tiles`: W is multiplied as bfloat16, else as float. Adds what it needs to the call's layout.
  RowNorms(const DoraNorm& norm, bool tiles, Layout* layout);

  // Columns of U: a multiple of 16 for each part of A.
  int64_t columns() const { return parts_ * width_; }
  // A, parts below each other; without the last rows of zeros where it is whole.
  const Matrix& a() const { return a_; }
  // Packs A into panels of the engine's depth, columns() in all. `base` is the call's scratch.
  template <typename Elem>
  void prepare(const Runtime& runtime, void* base, Elem* panels);

  // squares[i] += that of columns [col, col + cols) of row `row` + i of the weight, unless the norm
  // has a weight_sq_norm.
  void add_squares(const KernelTable& kernels, const Matrix& weight, int64_t row, int64_t rows,
                   int64_t col, int64_t cols, double* squares) const;

  int64_t scratch_floats() const;
  // The norms of `rows` rows (at most kRowBlock) from their U, |W_i|^2 from `squares` where the
  // norm has no weight_sq_norm.
  void finish(const KernelTable& kernels, int64_t row, int64_t rows, const float* u,
              int64_t u_stride, const double* squares, float* scratch) const;

 private:
  DoraNorm norm_;
  int64_t parts_, width_;
  size_t gram_at_, split_at_, wide_at_;
  Matrix a_;
  float* gram_ = nullptr;  // A A^T as a triangle, row-major, rows of width_
};

}  // namespace lrk
