// The CPU passes of a LoRA layer. Notation: M tokens, K in, N out, R rank, A (R, K), B (N, R),
// s the scaling, P = drop(x) A^T, Q = dY B.
//
//   lora_down_up.cpp  thin products: P = drop(x) A^T and y += s P B^T
//   lora_linear.cpp   the frozen product with the correction in its accumulators, and its gradient
//                     with respect to x
//   lora_grad.cpp     the gradients of the factors
//
// All passes accumulate in float32 and round once. How a sum is cut depends on shapes alone, never
// on the number of threads. It does not depend on the other rows of the batch either, with one
// exception: up to 8 rows are summed in another order than more are, in lora_grad_x, and where
// there are no tile instructions also in lora_down with an A-like factor and in lora_linear without
// norms.
//
// DoRA scales the columns of LoRA's result; the passes take that scale, and the operands of the
// norms behind it, where one reading of memory serves both (see dora.h).
#pragma once

#include <cstdint>

#include "dora.h"
#include "matrix.h"

namespace lrk {

// Which way a factor lies: A-like is (R, width), B-like is (width, R).
struct Factor {
  Matrix matrix;
  bool rank_last;
  int64_t rank() const { return rank_last ? matrix.cols : matrix.rows; }
  int64_t width() const { return rank_last ? matrix.rows : matrix.cols; }
};

// ---- thin products ------------------------------------------------------------------------------

// out (M, R) = scale * drop(x) factor^T. row_scale: null, or, with rank_last, `width` floats by
// which the rows of the factor are multiplied.
void lora_down(const Runtime& runtime, const Matrix& out, const Matrix& x, const Factor& factor,
               float scale, const Dropout* dropout, const float* row_scale = nullptr);

// out = scale * y + bias, column by column, from y as it is stored.
struct ColumnScale {
  const float* scale;
  const float* bias;  // or null
  Matrix out;         // may be y
};

// y (M, width) += scale * keep * ((p * gate) factor), and then `columns` of y.
struct LoraUp {
  Matrix y;
  Matrix p;  // (M, R)
  Factor factor;
  const float* gate = nullptr;  // R floats, or null for ones
  float scale = 1.0f;
  const Dropout* dropout = nullptr;
  const ColumnScale* columns = nullptr;
};

void lora_up(const Runtime& runtime, const LoraUp& up);

// ---- the frozen product and the correction together ---------------------------------------------

// What happens to a finished sum u, column by column: y = scale * u + bias (scale null: 1, bias
// null: 0). Where `u` has data, u itself is kept there.
struct Epilogue {
  const float* scale = nullptr;
  const float* bias = nullptr;
  Matrix u{nullptr, Dtype::kFloat32, 0, 0, 0};
};

// y (M, N) from u = x weight^T + scale * (p * gate) lora_b^T.
struct LoraLinear {
  Matrix y;
  Matrix p;  // (M, R), computed before
  Matrix x;
  Matrix weight;
  Matrix lora_b;
  const float* gate = nullptr;  // R floats, or null for ones
  float scale = 1.0f;
  Epilogue epilogue{};
  // Null, or norms to compute from the same reading of the weight; epilogue.scale may be their
  // column_scale.
  const DoraNorm* norm = nullptr;
  // Null, or N places for the hashes of the weight's rows, each taken as the row is multiplied.
  uint64_t* weight_hashes = nullptr;
};

void lora_linear(const Runtime& runtime, const LoraLinear& linear);

// y = x weight^T + bias (N floats, or null): lora_linear of rank 0.
void frozen_linear(const Runtime& runtime, const Matrix& y, const Matrix& x, const Matrix& weight,
                   const float* bias);

// out = the rows of a coded weight, rounded to its values' dtype already.
void decode(const Runtime& runtime, const Matrix& out, const Matrix& weight);

// grad_x (M, K) = grad_y weight + scale * keep * ((q * gate) lora_a), summed before it is rounded.
struct LoraGradX {
  Matrix grad_x;
  Matrix q;  // (M, R)
  Matrix grad_y;
  Matrix weight;
  Matrix lora_a;
  const float* gate = nullptr;  // R floats, or null for ones
  float scale = 1.0f;
  const Dropout* dropout = nullptr;
  const float* row_scale = nullptr;  // N floats that multiply the weight's rows, or null
};

void lora_grad_x(const Runtime& runtime, const LoraGradX& grad);

// ---- gradients of the factors -------------------------------------------------------------------

// out (R, width), or (width, R) with rank_last: scale * (p * gate)^T drop(big) * column_scale.
struct LoraGrad {
  Factor out;
  Matrix big;                   // (M, width)
  Matrix p;                     // (M, R)
  const float* gate = nullptr;  // R floats, or null for ones
  float scale = 1.0f;
  const Dropout* dropout = nullptr;
  const float* column_scale = nullptr;  // `width` floats, or null for ones
};

void lora_grad(const Runtime& runtime, const LoraGrad& grad);

// q (M, R) = grad_y lora_b and grad_b (N, R) = scale * grad_y^T (p * gate), from one reading of
// grad_y. With `scale_grad` its grad_u stands in place of grad_y; it comes from the same reading,
// and is stored only if it has memory.
struct LoraDownGrad {
  Matrix q;
  Matrix grad_b;
  Matrix grad_y;
  Matrix lora_b;
  Matrix p;
  const float* gate = nullptr;  // R floats, or null for ones
  float scale = 1.0f;
  const ScaleGrad* scale_grad = nullptr;
};

void lora_down_grad(const Runtime& runtime, const LoraDownGrad& grad);

}  // namespace lrk
