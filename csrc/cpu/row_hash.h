// Hashes by which a later call tells that rows of a matrix are what they were.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace lrk {

// 64 bits of a row's values, in the instruction set of the table.
using RowHash = uint64_t (*)(const void* row, int64_t bytes);
RowHash row_hash(const KernelTable& kernels);

// hashes[i] = that of row first + i, for `rows` rows.
inline void hash_rows(RowHash hash, const Matrix& m, int64_t first, int64_t rows,
                      uint64_t* hashes) {
  for (int64_t i = 0; i < rows; ++i) {
    hashes[i] = hash(element(m, first + i, 0), m.cols * dtype_bytes(m.dtype));
  }
}

// The hashes of all rows, in parallel.
void hash_rows(const Runtime& runtime, const Matrix& m, uint64_t* hashes);

}  // namespace lrk
