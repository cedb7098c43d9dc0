// DoRA on a CPU: y = g * (x W^T + s x A^T B^T) with the column scale g = m / n. Here are the norms
// n of the rows of W + s B A, without the dense sum, and the way back through g. The products are
// LoRA's (lora.h), which take g.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"
#include "scratch.h"

namespace lrk {

// ---- norms --------------------------------------------------------------------------------------

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

// The same norms from a pass that multiplies W anyway: with A beside its other operand that pass
// yields U = W A^T, and this turns U into norms.
class RowNorms {
 public:
  // `tiles`: W is multiplied as bfloat16, else as float. Adds what it needs to the call's layout.
  RowNorms(const DoraNorm& norm, bool tiles, Layout* layout);

  // Columns of U: a multiple of 16 for each part of A.
  int64_t columns() const { return parts_ * width_; }
  // A, parts below each other; without the last rows of zeros where it is whole.
  const Matrix& a() const { return a_; }
  // Packs A into panels of the engine's depth, columns() in all. `base` is the start of the scratch
  // memory that `layout` describes.
  template <typename Elem>
  void prepare(const Runtime& runtime, void* base, Elem* panels);

  // squares[i] += the sum of squares of columns [col, col + cols) of the weight's row `row` + i;
  // nothing where the norm has a weight_sq_norm.
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

// ---- back through the column scale --------------------------------------------------------------

// grad_u (M, N) = column_scale * grad_y, and grad_m (N floats) = the sums over rows of grad_y * u,
// divided by norm, or 0 where that is 0.
struct ScaleGrad {
  Matrix grad_u;    // data null: not wanted
  const Matrix* u;  // null, as is grad_m then: the magnitude is not trained
  const float* column_scale;
  const float* norm;
  float* grad_m;
};

void dora_scale_grad(const Runtime& runtime, const ScaleGrad& scale_grad, const Matrix& grad_y);

// The parts of dora_scale_grad, for a pass that reads grad_y anyway.
// One region of grad_y: grad_u where it is wanted, and, where `inner` is not null, inner[column of
// the whole] += the sum over the region's rows of grad_y * u.
void scale_grad_block(const KernelTable& kernels, const ScaleGrad& to, const Region& grad_y,
                      float* inner);
// grad_m from the sums of `chunks` ranges of rows (n floats each), added in order.
void store_grad_m(const ScaleGrad& to, const float* inner, int64_t chunks, int64_t n);

}  // namespace lrk
