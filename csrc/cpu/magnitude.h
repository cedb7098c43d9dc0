// How many elements there are of each magnitude.
#pragma once

#include "matrix.h"

namespace lrk {

// counts[d] += the elements of one row of values whose |x| as float32 has the bits `leading` from
// shift + bits on, and d in the `bits` below: 2^bits counts. Each value is read once.
void magnitude_histogram(const Runtime& runtime, const Matrix& values, int bits, int shift,
                         uint32_t leading, int64_t* counts);

}  // namespace lrk
