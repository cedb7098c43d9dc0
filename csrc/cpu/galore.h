// A step of GaLore on a CPU: project the gradient, Adam on the projection, and W.
#pragma once

#include "matrix.h"

namespace lrk {

struct GaLoreStep {
  float rate;  // lr * alpha / (1 - beta1^t)
  float beta1, beta2, eps;
  float keep;          // 1 - lr * weight decay
  float inverse_root;  // 1 / sqrt(1 - beta2^t)
};

// W (rows, cols), G like it, P orthonormal columns, m and v float32.
//   wide: P (rows, R), m and v (R, cols), L = P^T G, W = keep W - rate P D
//   tall: P (cols, R), m and v (rows, R), L = G P,   W = keep W - rate D P^T
// with m += (1 - beta1) (L - m), v = beta2 v + (1 - beta2) L^2, D = m / (sqrt(v) inverse_root +
// eps). G is read once, W read and written once and rounded once; the order of every sum is a
// function of shapes alone.
void galore_step(const Runtime& runtime, const Matrix& weight, const Matrix& grad,
                 const Matrix& basis, const Matrix& exp_avg, const Matrix& exp_avg_sq, bool tall,
                 const GaLoreStep& step);

}  // namespace lrk
