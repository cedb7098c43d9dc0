// A frozen weight that is stored in few bits: its codes as they lie in the file of the package that
// made them, and how a value is made of a code and the scale of its block. A Matrix of dtype
// kPacked points to one; `stage_float` and `stage_bfloat16` are all that reads it.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace lrk {

// The code of element i of the flattened weight: a nibble of byte i / 2, or byte i.
enum class Codes : int { kHighNibbleFirst, kLowNibbleFirst, kInt8, kFloat8 };

// A block's scale: as it is; map[byte] * nested[block >> nested_shift] + offset, rounded twice (a
// double quantisation); 2^(byte - 127), NaN for 255; or float8 (e4m3fn) over `offset`.
enum class Scales : int { kFloat32, kNested, kExponent, kFloat8 };

// w = book[code] * scale, or code * scale, rounded to `value`.
struct Packed {
  Codes codes;
  Scales scales;
  Dtype value;
  const uint8_t* data;
  const float* book;  // of the 16 nibbles
  const void* scale;
  const float* nested;
  const float* map;
  float offset;
  int64_t nested_shift;
  int64_t cols;  // K
  // Blocks of `run` elements of the flattened weight, or, where that is 0, of block_rows x
  // block_cols of W, `grid` of them beside each other.
  int64_t run, block_rows, block_cols, grid;
};

}  // namespace lrk
