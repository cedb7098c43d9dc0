// SVFT on a CPU: rows times a sparse matrix, and the gradient at its own places.
#pragma once

#include "matrix.h"

namespace lrk {

// A sparse matrix by its rows, or by its columns: the values of one lie from starts[i] to
// starts[i + 1], at `order` (null: as they are), each with its `source`, a column or a row.
struct SparseLines {
  const float* values;
  const int32_t* order;
  const int32_t* starts;
  const int32_t* source;
};

// out[m][i] = the sum over the values of i of value * in[m][source], in float32, rounded once. A
// row's result depends on no other row.
void svft_multiply(const Runtime& runtime, const Matrix& out, const Matrix& in,
                   const SparseLines& lines);

// out[e] = the sum over m of grad[m][row[e]] * t[m][column[e]], in float32; the order of the sums
// is a function of the number of rows alone.
void svft_grad(const Runtime& runtime, float* out, const Matrix& grad, const Matrix& t,
               const int32_t* row, const int32_t* column, int64_t count);

}  // namespace lrk
