// A frozen weight that is stored in few bits: its codes as they lie in the file of the package that
// made them, and how a value is made of a code and the scale of its block. A Matrix of dtype
// kCoded points to one, which `stage_float`, `stage_bfloat16`, `dot_rows` and `mix_rows` read.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace lrk {

// Where the code of an element lies.
enum class Codes : int {
  kHighNibbleFirst,  // of element i of the flattened weight, a nibble of byte i / 2
  kLowNibbleFirst,
  kInt8,  // its byte i
  kFloat8,
  kWordsDown,    // 8 elements of a row to a word of 32 bits, (k / 8, n), the lowest first
  kWordsAcross,  // 8 rows of a column to a word, (k, n / 8), in the order 0, 2, 4, 6, 1, 3, 5, 7
  kQ8_0,         // records of a GGUF file with their scales: 34 bytes for 32 elements of a row
  kQ4_K          // ... 144 bytes for 256
};

inline bool in_words(Codes codes) {
  return codes == Codes::kWordsDown || codes == Codes::kWordsAcross;
}
inline bool in_records(Codes codes) { return codes == Codes::kQ8_0 || codes == Codes::kQ4_K; }

// A block's scale: as it is; map[byte] * nested[block >> nested_shift] + offset, rounded twice (a
// double quantisation); 2^(byte - 127), NaN for 255; or float8 (e4m3fn) over `offset`.
enum class Scales : int { kFloat32, kNested, kExponent, kFloat8 };

// w = (book[code] - zero) * scale, or of 8 bits code * scale, rounded to `value`.
struct Coded {
  Codes codes;
  Scales scales;
  Dtype value;
  const uint8_t* data;
  const float* book;      // of the 16 nibbles; in words, they are 0 to 15
  const void* scale;      // in words: of block g and row n, number g * rows + n
  const uint8_t* zeros;   // beside the scales, or null
  const int32_t* groups;  // null, or the block of each column
  const float* nested;
  const float* map;
  float offset;
  int64_t nested_shift;
  int64_t rows, cols;  // N, K
  // Blocks of `run` elements of the flattened weight, or, where that is 0, of block_rows x
  // block_cols of W, `grid` of them beside each other.
  int64_t run, block_rows, block_cols, grid;
};

// Whether dot_rows and mix_rows read it: rows of 4-bit codes, whole bytes under one scale each,
// that stand for bfloat16. Others are decoded first.
inline bool read_in_place(const Coded& w) {
  const int64_t block = w.run ? w.run : w.block_cols;
  return w.codes <= Codes::kLowNibbleFirst && w.value == Dtype::kBFloat16 && !w.groups &&
         block % 32 == 0 && w.cols % block == 0;
}

}  // namespace lrk
