#include "dropout_mask.h"

#include <algorithm>

#include "block_product.h"

namespace lrk {

void dropout_keep_mask(const Runtime& runtime, uint8_t* out, int64_t rows, int64_t cols,
                       const Dropout& dropout) {
  if (cols == 0) return;
  constexpr int64_t kMaskRows = 16;
  run(runtime, ceil_div(rows, kMaskRows), rows * cols > kSerialDropout,
      [&](int64_t begin, int64_t end) {
        const int64_t row = begin * kMaskRows, last = std::min(end * kMaskRows, rows);
        runtime.kernels.keep_mask(out + row * cols, cols, last - row, cols, dropout, row);
      });
}

}  // namespace lrk
