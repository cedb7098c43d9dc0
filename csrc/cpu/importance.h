// Sums over rows or columns of LoRAPrune's importance, without a matrix of W's size.
#pragma once

#include "matrix.h"

namespace lrk {

// A (R, K), B (N, R) and the gradients of both.
struct ImportanceFactors {
  Matrix lora_a, lora_b, grad_a, grad_b;
  float scale;
};

// I = ((gB (A - gA) + B gA) * (W + scale * B A))^2, W (N, K): its sums over each row (`by_row`, N
// floats) or over each column (K floats), written to `out`. W is read once where it lies. The order
// of every sum is a function of shapes alone.
void importance_sums(const Runtime& runtime, const Matrix& weight, const ImportanceFactors& factors,
                     bool by_row, float* out);

}  // namespace lrk
