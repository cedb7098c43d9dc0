// The dropout mask itself, for whoever wants to see what the passes keep.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace lrk {

// out (rows, cols) bytes, 1 where kept.
void dropout_keep_mask(const Runtime& runtime, uint8_t* out, int64_t rows, int64_t cols,
                       const Dropout& dropout);

}  // namespace lrk
