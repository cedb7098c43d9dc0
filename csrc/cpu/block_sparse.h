// Sparse Matrix Tuning on a CPU: gradients of chosen blocks of W, and a step of AdamW on them.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace lrk {

// `count` blocks of rows x cols, contiguous; index[2 b], index[2 b + 1]: block b's place in W in
// whole blocks. A block may stick out of W.
struct Blocks {
  void* data;
  Dtype dtype;
  int64_t count, rows, cols;
  const int32_t* index;
};

// out[b] = dY[:, rows of b]^T x[:, columns of b]; x (M, K), grad_y (M, N). Accumulates in float32;
// how the sum over tokens is cut depends on shapes alone.
void block_grad(const Runtime& runtime, const Blocks& out, const Matrix& x, const Matrix& grad_y);

// The blocks into the weight, rounded to its dtype.
void write_blocks(const Runtime& runtime, const Blocks& blocks, const Matrix& weight);

struct AdamW {
  float rate;  // lr / (1 - beta1^t)
  float beta1, beta2, eps;
  float keep;             // 1 - lr * weight decay
  float root_correction;  // sqrt(1 - beta2^t)
  bool stochastic;        // bfloat16 blocks are rounded by Philox words of (key, block, element)
  uint32_t key0, key1;
};

// One step on the blocks and their moments (float32, contiguous), and the blocks into the weight.
// grad is contiguous, of any dtype.
void block_adamw(const Runtime& runtime, const Blocks& blocks, const void* grad, Dtype grad_dtype,
                 float* exp_avg, float* exp_avg_sq, const Matrix& weight, const AdamW& settings);

}  // namespace lrk
