// Rows of I beside a slice of columns, once per instruction set. The including file defines LRK_ISA
// (a namespace), LRK_TARGET (the attribute that enables the instructions, may be empty) and LRK_W
// (floats in a register).

namespace lrk {
namespace LRK_ISA {

typedef float VecF __attribute__((vector_size(4 * LRK_W)));
constexpr int64_t kRankBlock =
    32;  // short float32 sums, added up, lose fewer digits than a long one
constexpr int kRows = LRK_W == 16 ? 8 : 4;  // at a time: their two sums each stay in registers

LRK_TARGET __attribute__((always_inline)) static inline VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// The first `live` lanes, and zeros.
LRK_TARGET __attribute__((always_inline)) static inline VecF load_part(const float* p,
                                                                       int64_t live) {
  VecF v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(live) * sizeof(float));
  return v;
}

LRK_TARGET __attribute__((always_inline)) static inline void store(float* p, VecF v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// square[i] = I of `Rows` rows in as many columns as a register holds, of which `live` are there,
// and 0 in the others.
template <int Rows>
LRK_TARGET __attribute__((always_inline)) static inline void square_columns(
    VecF (&square)[Rows], const ImportanceRows& rows, int64_t col, int64_t live) {
  const int64_t rank = rows.rank;
  const float* panel = rows.panels + col / kPanel * 3 * rank * kPanel + col % kPanel;
  const float* grads = panel + rank * kPanel;
  const float* rests = grads + rank * kPanel;
  VecF update[Rows] = {}, product[Rows] = {};
  for (int64_t r0 = 0; r0 < rank; r0 += kRankBlock) {
    const int64_t end = rank - r0 < kRankBlock ? rank : r0 + kRankBlock;
    VecF u[Rows] = {}, p[Rows] = {};
    for (int64_t r = r0; r < end; ++r) {
      const VecF a = load(panel + r * kPanel), grad = load(grads + r * kPanel);
      const VecF rest = load(rests + r * kPanel);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const float* factors = rows.factors + 2 * i * rank;
        p[i] += factors[r] * a;
        u[i] += factors[r] * grad;
        u[i] += factors[rank + r] * rest;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      update[i] += u[i];
      product[i] += p[i];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    const float* w = rows.w + i * rows.w_stride + col;
    const VecF own = live < LRK_W ? load_part(w, live) : load(w);
    const VecF root = update[i] * (own + rows.scale * product[i]);
    square[i] = root * root;
    if (live < LRK_W) {  // an infinite factor makes NaN of the zeros behind the last column
      float lanes[LRK_W];
      store(lanes, square[i]);
      square[i] = load_part(lanes, live);
    }
  }
}

template <int Rows>
LRK_TARGET static void add_rows(const ImportanceRows& rows) {
  VecF total[Rows] = {};
  for (int64_t col = 0; col < rows.cols; col += LRK_W) {
    VecF square[Rows];
    square_columns<Rows>(square, rows, col, rows.cols - col);
    if (rows.row_sums) {
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) total[i] += square[i];
      continue;
    }
    VecF sum = square[0];
    for (int i = 1; i < Rows; ++i) sum += square[i];
    store(rows.column_sums + col, load(rows.column_sums + col) + sum);
  }
  for (int i = 0; rows.row_sums && i < Rows; ++i) {
    float lanes[LRK_W];
    store(lanes, total[i]);
    for (int width = LRK_W / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    rows.row_sums[i] = lanes[0];
  }
}

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_ISA
#undef LRK_TARGET
#undef LRK_W
