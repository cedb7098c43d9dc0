// Device code of the dropout mask. No torch header and no CUDA library: it also compiles for the
// host, against any header that supplies threadIdx and its kin.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace lrk {

// Grid: x covers groups of four columns, y strides over rows. One thread draws one Philox counter,
// which decides four neighbouring columns.
__global__ void dropout_keep_mask_kernel(uint8_t* __restrict__ mask,
                                         const int64_t* __restrict__ seed, int64_t rows,
                                         int64_t columns, uint32_t threshold) {
  const uint64_t bits = static_cast<uint64_t>(*seed);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (4 * group >= columns) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const PhiloxWords words =
        philox_words(static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
                     static_cast<uint32_t>(group), static_cast<uint32_t>(row));
    for (int i = 0; i < 4; ++i) {
      const int64_t column = 4 * group + i;
      if (column < columns) mask[row * columns + column] = words.word[i] >= threshold;
    }
  }
}

}  // namespace lrk
