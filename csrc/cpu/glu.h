// The hidden columns of an MLP on a CPU, and their gradients, one element at a time.
#pragma once

#include "matrix.h"

namespace lrk {

enum class Activation : int { kSilu, kGeluTanh, kReluSquared };

// h = f(gate) * up, or f(gate) where up has no data; in float32, rounded once. All matrices are of
// one shape and dtype.
void glu(const Runtime& runtime, Activation f, const Matrix& h, const Matrix& gate,
         const Matrix& up);

// grad_gate = grad_h * up * f'(gate) and grad_up = grad_h * f(gate); the second only with an up.
// Either may be grad_h.
struct GluGrad {
  Activation f;
  Matrix grad_gate, grad_up;
  Matrix grad_h, gate, up;
};

void glu_grad(const Runtime& runtime, const GluGrad& grad);

}  // namespace lrk
