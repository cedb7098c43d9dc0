// The row norms of W + s B A on a CPU, without the dense sum.
#pragma once

#include "lora.h"

namespace lrk {

// n_i^2 = |W_i|^2 + 2 s sum_r B_ir (W A^T)_ir + s^2 B_i (A A^T) B_i^T, clamped at 0; g = m / n, 0
// where n is 0. W (N, K) is read once where it lies; A (R, K), B (N, R). Every product keeps
// float32's digits: a bfloat16 W goes through bfloat16 tiles with A split into as many bfloat16
// parts as its dtype needs (1, 2 or 3), anything else through float32 FMA.
//
// weight_sq_norm: N floats or null (then it is computed); magnitude: N floats or null. norm,
// sq_norm and, with a magnitude, column_scale: N floats each, written. The order of every sum is a
// function of shapes alone.
void dora_norm(const Runtime& runtime, const Matrix& weight, const Matrix& lora_a,
               const Matrix& lora_b, double scaling, const float* weight_sq_norm,
               const float* magnitude, float* norm, float* sq_norm, float* column_scale);

}  // namespace lrk
