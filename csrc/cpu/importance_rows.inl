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

// B A, B gA and gB (A - gA) of `Rows` rows in as many columns as a register holds.
template <int Rows>
struct Products {
  VecF own[Rows], grad[Rows], rest[Rows];
};

// Over the ranks from r to end.
template <int Rows>
LRK_TARGET __attribute__((always_inline)) static inline Products<Rows> multiply(
    const ImportanceRows& rows, int64_t col, int64_t r, int64_t end) {
  const int64_t rank = rows.rank, size = rank * kPanel;
  const float* panel = rows.panels + col / kPanel * 3 * size + col % kPanel;
  Products<Rows> sums = {};
  for (; r < end; ++r) {
    const VecF a = load(panel + r * kPanel), grad_a = load(panel + size + r * kPanel);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const VecF b = rows.factors[2 * i * rank + r] - VecF{};
      sums.own[i] += b * a;
      sums.grad[i] += b * grad_a;
    }
    const VecF rest = load(panel + 2 * size + r * kPanel);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) sums.rest[i] += rows.factors[(2 * i + 1) * rank + r] * rest;
  }
  return sums;
}

// square[i] = I of `Rows` rows in as many columns as a register holds, of which `live` are there,
// and 0 in the others. `Short`: at most kRankBlock ranks.
template <int Rows, bool Short>
LRK_TARGET __attribute__((always_inline)) static inline void square_columns(
    VecF (&square)[Rows], const ImportanceRows& rows, int64_t col, int64_t live) {
  const int64_t rank = rows.rank;
  Products<Rows> sums = multiply<Rows>(rows, col, 0, Short ? rank : kRankBlock);
  for (int64_t r = kRankBlock; !Short && r < rank; r += kRankBlock) {
    const int64_t end = rank - r < kRankBlock ? rank : r + kRankBlock;
    const Products<Rows> more = multiply<Rows>(rows, col, r, end);
    for (int i = 0; i < Rows; ++i) {
      sums.own[i] += more.own[i];
      sums.grad[i] += more.grad[i];
      sums.rest[i] += more.rest[i];
    }
  }
  const float* w = rows.w + col;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i, w += rows.w_stride) {
    const VecF own = live < LRK_W ? load_part(w, live) : load(w);
    const VecF root = (sums.grad[i] + sums.rest[i]) * (own + rows.scale * sums.own[i]);
    square[i] = root * root;
    if (live < LRK_W) {  // an infinite factor makes NaN of the zeros behind the last column
      float lanes[LRK_W];
      store(lanes, square[i]);
      square[i] = load_part(lanes, live);
    }
  }
}

template <int Rows, bool Short>
LRK_TARGET __attribute__((always_inline)) static inline void add_columns(VecF (&total)[Rows],
                                                                         const ImportanceRows& rows,
                                                                         int64_t col,
                                                                         int64_t live) {
  VecF square[Rows];
  square_columns<Rows, Short>(square, rows, col, live);
  if (rows.row_sums) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) total[i] += square[i];
    return;
  }
  VecF sum = square[0];
  for (int i = 1; i < Rows; ++i) sum += square[i];
  store(rows.column_sums + col, load(rows.column_sums + col) + sum);
}

template <int Rows, bool Short>
LRK_TARGET static void add_rows(const ImportanceRows& rows) {
  VecF total[Rows] = {};
  int64_t col = 0;
  for (; col + LRK_W <= rows.cols; col += LRK_W) {
    add_columns<Rows, Short>(total, rows, col, LRK_W);
  }
  if (col < rows.cols) add_columns<Rows, Short>(total, rows, col, rows.cols - col);
  for (int i = 0; rows.row_sums && i < Rows; ++i) {
    float lanes[LRK_W];
    store(lanes, total[i]);
    for (int width = LRK_W / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    rows.row_sums[i] = lanes[0];
  }
}

// The passes over kRows rows and over one, for factors of this rank.
inline RowPass row_pass(int64_t rank) {
  if (rank <= kRankBlock) return {add_rows<kRows, true>, add_rows<1, true>, kRows};
  return {add_rows<kRows, false>, add_rows<1, false>, kRows};
}

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_ISA
#undef LRK_TARGET
#undef LRK_W
