// A low-rank correction added into its weight, in place.
#pragma once

#include "matrix.h"

namespace lrk {

// What decides the bits that bfloat16 has not; the words are those of dropout (see philox.h).
struct StochasticRounding {
  uint32_t key0;
  uint32_t key1;
};

// W (N, K) = after * (before * W + scale * B A), row by row, in float32, rounded once to W's dtype.
// A (R, K), B (N, R). before, after: N floats, or null for ones. rounding: null for nearest even;
// else W is bfloat16. W is read and written once; the order of every sum is a function of R alone.
void merge_rows(const Runtime& runtime, const Matrix& weight, const Matrix& lora_a,
                const Matrix& lora_b, float scale, const float* before, const float* after,
                const StochasticRounding* rounding);

}  // namespace lrk
