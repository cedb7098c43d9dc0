// The few primitives from which the four LoRA passes are built, once per instruction set.
//
// Every pass is the same block product C += L * G in which one side is thin:
//   L  row-major rows, read where they lie (or staged: converted, masked, zero-padded)
//   G  "panels" of 16 columns, so that one panel row is one AVX-512 register or half a tile row
//   C  float32, a block that stays in cache
// There are two element types for L and G. float is multiplied by FMA and serves every dtype;
// bfloat16 is multiplied by AMX tiles, whose G panels hold two consecutive rows interleaved
// ("VNNI": row pair, column, row parity). In both, row k of a panel starts at element 16 * k.
#pragma once

#include <cstdint>

namespace lrk {

// kCoded: a weight of coded.h, which is staged, and the factor of dot_rows and mix_rows.
enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kCoded };

constexpr int64_t kPanel = 16;

inline int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Philox key and threshold of one dropout pass; see philox.h.
struct Dropout {
  uint32_t key0;
  uint32_t key1;
  uint32_t threshold;
};

// A rectangle of a tensor that is to be converted. `row` and `col` are its place in the whole
// tensor, which dropout needs; `col` is a multiple of 4 whenever `dropout` is set.
struct Source {
  const void* data;  // of a coded weight: the weight itself, of which row and col tell the place
  Dtype dtype;
  int64_t stride;  // elements from one row to the next; columns are adjacent
  int64_t rows;
  int64_t cols;
  int64_t padded_cols;     // columns written; those past `cols` are zero
  const Dropout* dropout;  // null: keep everything
  int64_t row;
  int64_t col;
  const float* col_scale;  // null, or one factor per column (the gate)
};

template <typename Elem>
struct BlockProduct {
  int64_t rows;
  int64_t panels;  // C has 16 * panels columns
  int64_t depth;   // bfloat16: even up to 32, else a multiple of 32
  const Elem* l;
  int64_t l_stride;
  const Elem* g;
  int64_t g_stride;      // float only: from one depth row to the next (16 when packed)
  int64_t panel_stride;  // from one panel to the next
  float* c;
  int64_t c_stride;
  bool accumulate;  // false: C is overwritten
};

// One pointer for each row of x, and the rows of a factor.
struct Dots {
  const float* const* x;
  const void* factor;
  Dtype dtype;
  int64_t stride;
  int64_t cols;
  int64_t row = 0;  // of a coded weight, which is the factor: the first of its rows
};

// rows x cols of a result from `rank` rows of a factor; its own columns lie behind one another.
struct Mix {
  float* out;
  int64_t out_stride;
  const float* p;
  int64_t p_stride;
  int64_t rows;
  const void* factor;
  Dtype dtype;
  int64_t factor_stride;
  int64_t rank;
  int64_t cols;
  bool accumulate;           // false: out is overwritten
  int64_t row = 0, col = 0;  // of a coded weight, which is the factor: the first of its own
};

struct KernelTable {
  const char* name;

  // Convert to the element type of a block product. bfloat16 rounds to nearest even.
  void (*stage_float)(float* dst, int64_t stride, const Source& src);
  void (*stage_bfloat16)(uint16_t* dst, int64_t stride, const Source& src);

  void (*multiply_float)(const BlockProduct<float>& block);
  // Null without AMX, as are `interleave` and `release`. `tile_shape` remembers the tile
  // configuration between calls of one thread; start it at 0 and call `release` at the end.
  void (*multiply_bfloat16)(const BlockProduct<uint16_t>& block, uint32_t* tile_shape);
  void (*release)();

  // dst[c][r] = src[r][c] on 32-bit words.
  void (*transpose)(uint32_t* dst, int64_t dst_stride, const uint32_t* src, int64_t src_stride,
                    int64_t rows, int64_t cols);
  // Rows to bfloat16 panels; rows up to `padded_rows` and columns up to a full panel become zero.
  // row_scale: null, or a factor per row.
  void (*interleave)(uint16_t* dst, int64_t panel_stride, const uint16_t* src, int64_t src_stride,
                     int64_t rows, int64_t padded_rows, int64_t cols, const float* row_scale);

  // dst = scale * src, rounded once.
  void (*store)(void* dst, Dtype dtype, int64_t dst_stride, const float* src, int64_t src_stride,
                int64_t rows, int64_t cols, float scale);
  // dst += scale * keep * src, rounded once.
  void (*add)(void* dst, Dtype dtype, int64_t dst_stride, const float* src, int64_t src_stride,
              int64_t rows, int64_t cols, float scale, const Dropout* dropout, int64_t row,
              int64_t col);

  // dst = scale ∘ src + bias, a factor and a summand per column; either may be null, dst may be
  // src.
  void (*scale_columns)(void* dst, Dtype dtype, int64_t dst_stride, const void* src,
                        int64_t src_stride, int64_t rows, int64_t cols, const float* scale,
                        const float* bias);
  // dst = scale ∘ src, and inner[j] += the sum over rows of src * u; dst may be null, or u and
  // inner.
  void (*scale_grad)(void* dst, Dtype dtype, int64_t dst_stride, const void* src,
                     int64_t src_stride, const void* u, int64_t u_stride, int64_t rows,
                     int64_t cols, const float* scale, float* inner);

  void (*keep_mask)(uint8_t* dst, int64_t dst_stride, int64_t rows, int64_t cols,
                    const Dropout& dropout, int64_t row);

  // Products with a factor that is read once where it lies, for few rows of the other side. A coded
  // weight is a factor where read_in_place() says so; mix_rows takes it for one row alone.
  // out[i][r] = the sum over k of x[i][k] * factor[r][k], of `dots` and then, in the same sum, of
  // `more`, whose factor is float32, or null.
  void (*dot_rows)(float* out, int64_t out_stride, int64_t rows, int64_t rank, const Dots& dots,
                   const Dots* more);
  // out[i][j] = the sum over r of p[i][r] * factor[r][j].
  void (*mix_rows)(const Mix& mix);
};

// The best table that this processor runs and LRK_CPU_ISA (generic, avx2, avx512, amx) allows.
// Chosen once, at the first call. Python refuses other names before it loads this library.
const KernelTable& kernel_table();

// Null where the compiler or the architecture cannot build the table.
const KernelTable* generic_table();
const KernelTable* avx2_table();
const KernelTable* avx512_table();
const KernelTable* amx_table();

}  // namespace lrk
