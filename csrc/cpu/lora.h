// The thin passes of a LoRA layer on a CPU. Notation: M tokens, K in, N out, R rank, A (R, K),
// B (N, R), s the scaling, P = drop(x) A^T, Q = dY B.
//
// All passes accumulate in float32 and round once. How a sum is cut depends on shapes alone, never
// on the number of threads, nor on the other rows of the batch but for this: up to 8 rows are
// summed another way than more, in lora_grad_x, and without tile instructions in lora_down with an
// A-like factor and in lora_linear without norms.
#pragma once

#include <cstdint>

#include "dora_norm.h"
#include "matrix.h"

namespace lrk {

// Which way a factor lies: A-like is (R, width), B-like is (width, R).
struct Factor {
  Matrix matrix;
  bool rank_last;
  int64_t rank() const { return rank_last ? matrix.cols : matrix.rows; }
  int64_t width() const { return rank_last ? matrix.rows : matrix.cols; }
};

// out (M, R) = scale * drop(x) factor^T. row_scale: null, or, with rank_last, `width` floats by
// which the rows of the factor are multiplied.
void lora_down(const Runtime& runtime, const Matrix& out, const Matrix& x, const Factor& factor,
               float scale, const Dropout* dropout, const float* row_scale = nullptr);

// What happens to a finished sum u, column by column: y = scale * u + bias (scale null: 1, bias
// null: 0). Where `u` has data, u itself is kept there.
struct Epilogue {
  const float* scale = nullptr;
  const float* bias = nullptr;
  Matrix u{nullptr, Dtype::kFloat32, 0, 0, 0};
};

// y (M, N) from u = x weight^T + scale * (p * gate) lora_b^T; p (M, R) is there already.
// gate: R floats or null. norm: null, or norms to be computed from the same pass over the weight;
// epilogue.scale may be their column_scale. weight_hashes: null, or N places for those of the rows
// of the weight, each taken as the row is multiplied.
void lora_linear(const Runtime& runtime, const Matrix& y, const Matrix& p, const Matrix& x,
                 const Matrix& weight, const Matrix& lora_b, const float* gate, float scale,
                 const Epilogue& epilogue, const DoraNorm* norm = nullptr,
                 uint64_t* weight_hashes = nullptr);

// grad_x (M, K) = grad_y weight + scale * keep * ((q * gate) lora_a), summed before it is rounded.
// row_scale: null, or N floats by which the rows of weight are multiplied.
void lora_grad_x(const Runtime& runtime, const Matrix& grad_x, const Matrix& q,
                 const Matrix& grad_y, const Matrix& weight, const Matrix& lora_a,
                 const float* gate, float scale, const Dropout* dropout,
                 const float* row_scale = nullptr);

// y (M, width) += scale * keep * ((p * gate) factor). gate: R floats or null. With `column_scale`
// (and `bias`, or null), `scaled` = column_scale * y + bias as well; it may be y.
void lora_up(const Runtime& runtime, const Matrix& y, const Matrix& p, const Factor& factor,
             const float* gate, float scale, const Dropout* dropout,
             const float* column_scale = nullptr, const float* bias = nullptr,
             const Matrix* scaled = nullptr);

// Back through DoRA's column scale: grad_u (M, N) = column_scale * grad_y, and grad_m (N floats) =
// the sums over rows of grad_y * u, divided by norm, or 0 where that is 0; u and grad_m may be
// null.
struct ScaleGrad {
  Matrix grad_u;
  const Matrix* u;
  const float* column_scale;
  const float* norm;
  float* grad_m;
};

void dora_scale_grad(const Runtime& runtime, const ScaleGrad& scale_grad, const Matrix& grad_y);

// out (R, width), or (width, R) with rank_last: scale * (p * gate)^T drop(big) * column_scale,
// which is `width` floats or null.
void lora_grad(const Runtime& runtime, const Factor& out, const Matrix& big, const Matrix& p,
               const float* gate, float scale, const Dropout* dropout,
               const float* column_scale = nullptr);

// q (M, R) = grad_y lora_b and grad_b (N, R) = scale * grad_y^T (p * gate), in one pass over
// grad_y. With `scale_grad` both are those of its grad_u, which comes from the same pass where it
// is wanted.
void lora_down_grad(const Runtime& runtime, const Matrix& q, const Matrix& grad_b,
                    const Matrix& grad_y, const Matrix& lora_b, const Matrix& p, const float* gate,
                    float scale, const ScaleGrad* scale_grad = nullptr);

// out (rows, cols) bytes, 1 where kept.
void dropout_keep_mask(const Runtime& runtime, uint8_t* out, int64_t rows, int64_t cols,
                       const Dropout& dropout);

}  // namespace lrk
