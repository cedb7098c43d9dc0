// The primitives for AVX-512 with BF16 conversions, and the bfloat16 block product on AMX tiles.
//
// Tile registers: C in 0..3, L in 4 and 5, G in 6 and 7. The compiler's tile loads are volatile asm
// without a memory clobber, so stores to a staging buffer could sink below them: hence the fences.
#include "kernel_table.h"

// GCC gained AMX in 11; the tile intrinsics exist only for 64-bit x86.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#  define LRK_BUILD_AMX 1
#  define LRK_ISA amx
#  define LRK_ISA_NAME "amx"
#  define LRK_TARGET \
    __attribute__((  \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")))
#  define LRK_W 16
#  define LRK_HAS_AVX512 1
#  define LRK_HAS_AVX512_BF16 1
#  include "simd_kernels.inl"

#  define LRK_FN LRK_TARGET static
#  define LRK_INLINE LRK_TARGET __attribute__((always_inline)) static inline

namespace lrk {
namespace amx {

constexpr int64_t kTileRows16 = 16;
constexpr int64_t kTileDepth = 32;

LRK_INLINE void fence() { __asm__ volatile("" ::: "memory"); }

// The 64-byte operand of ldtilecfg, palette 1.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// C rows x 16, L rows x depth, G depth / 2 x (16 pairs).
LRK_FN void configure(int64_t rows, int64_t depth, uint32_t* tile_shape) {
  const uint32_t shape = static_cast<uint32_t>(rows << 8 | depth);
  if (*tile_shape == shape) return;
  *tile_shape = shape;
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : depth / 2);
    config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 2 * depth : 64);
  }
  fence();
  _tile_loadconfig(&config);
}

LRK_FN void release() { _tile_release(); }

#  define LRK_TILE_INIT(tile, ptr)                       \
    if (accumulate) {                                    \
      _tile_loadd(tile, ptr, static_cast<int>(c_bytes)); \
    } else {                                             \
      _tile_zero(tile);                                  \
    }

// Two row tiles by two panels: four products for four loads.
LRK_FN void tile_2x2(const BlockProduct<uint16_t>& b, int64_t row, int64_t panel, int64_t step) {
  const bool accumulate = b.accumulate;
  const int64_t l_bytes = 2 * b.l_stride, c_bytes = 4 * b.c_stride;
  const uint16_t* l0 = b.l + row * b.l_stride;
  const uint16_t* l1 = l0 + kTileRows16 * b.l_stride;
  const uint16_t* g0 = b.g + panel * b.panel_stride;
  const uint16_t* g1 = g0 + b.panel_stride;
  float* c0 = b.c + row * b.c_stride + panel * kPanel;
  float* c1 = c0 + kTileRows16 * b.c_stride;
  LRK_TILE_INIT(0, c0);
  LRK_TILE_INIT(1, c0 + kPanel);
  LRK_TILE_INIT(2, c1);
  LRK_TILE_INIT(3, c1 + kPanel);
  for (int64_t k = 0; k < b.depth; k += step) {
    _tile_loadd(4, l0 + k, static_cast<int>(l_bytes));
    _tile_loadd(6, g0 + kPanel * k, 64);
    _tile_loadd(7, g1 + kPanel * k, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, l1 + k, static_cast<int>(l_bytes));
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c0, static_cast<int>(c_bytes));
  _tile_stored(1, c0 + kPanel, static_cast<int>(c_bytes));
  _tile_stored(2, c1, static_cast<int>(c_bytes));
  _tile_stored(3, c1 + kPanel, static_cast<int>(c_bytes));
}

// Two row tiles by two panels when the whole depth is one tile: L stays in its tiles for all
// panels.
LRK_FN void tile_2xall(const BlockProduct<uint16_t>& b, int64_t row) {
  const int64_t l_bytes = 2 * b.l_stride, c_bytes = 4 * b.c_stride;
  const uint16_t* l = b.l + row * b.l_stride;
  _tile_loadd(4, l, static_cast<int>(l_bytes));
  _tile_loadd(5, l + kTileRows16 * b.l_stride, static_cast<int>(l_bytes));
  const uint16_t* g = b.g;
  float* c0 = b.c + row * b.c_stride;
  float* c1 = c0 + kTileRows16 * b.c_stride;
  for (int64_t panel = 0; panel < b.panels; panel += 2) {
    _tile_loadd(6, g, 64);
    _tile_loadd(7, g + b.panel_stride, 64);
    _tile_zero(0);
    _tile_dpbf16ps(0, 4, 6);
    _tile_zero(1);
    _tile_dpbf16ps(1, 4, 7);
    _tile_zero(2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_zero(3);
    _tile_dpbf16ps(3, 5, 7);
    _tile_stored(0, c0, static_cast<int>(c_bytes));
    _tile_stored(1, c0 + kPanel, static_cast<int>(c_bytes));
    _tile_stored(2, c1, static_cast<int>(c_bytes));
    _tile_stored(3, c1 + kPanel, static_cast<int>(c_bytes));
    g += 2 * b.panel_stride;
    c0 += 2 * kPanel;
    c1 += 2 * kPanel;
  }
}

// Two row tiles by one panel.
LRK_FN void tile_2x1(const BlockProduct<uint16_t>& b, int64_t row, int64_t panel, int64_t step) {
  const bool accumulate = b.accumulate;
  const int64_t l_bytes = 2 * b.l_stride, c_bytes = 4 * b.c_stride;
  const uint16_t* l0 = b.l + row * b.l_stride;
  const uint16_t* l1 = l0 + kTileRows16 * b.l_stride;
  const uint16_t* g0 = b.g + panel * b.panel_stride;
  float* c0 = b.c + row * b.c_stride + panel * kPanel;
  float* c1 = c0 + kTileRows16 * b.c_stride;
  LRK_TILE_INIT(0, c0);
  LRK_TILE_INIT(2, c1);
  for (int64_t k = 0; k < b.depth; k += step) {
    _tile_loadd(6, g0 + kPanel * k, 64);
    _tile_loadd(4, l0 + k, static_cast<int>(l_bytes));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, l1 + k, static_cast<int>(l_bytes));
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, c0, static_cast<int>(c_bytes));
  _tile_stored(2, c1, static_cast<int>(c_bytes));
}

// One row tile by four panels, for the thin left operand of a factor gradient.
LRK_FN void tile_1x4(const BlockProduct<uint16_t>& b, int64_t row, int64_t panel, int64_t step) {
  const bool accumulate = b.accumulate;
  const int64_t l_bytes = 2 * b.l_stride, c_bytes = 4 * b.c_stride;
  const uint16_t* l = b.l + row * b.l_stride;
  const uint16_t* g = b.g + panel * b.panel_stride;
  float* c = b.c + row * b.c_stride + panel * kPanel;
  LRK_TILE_INIT(0, c);
  LRK_TILE_INIT(1, c + kPanel);
  LRK_TILE_INIT(2, c + 2 * kPanel);
  LRK_TILE_INIT(3, c + 3 * kPanel);
  for (int64_t k = 0; k < b.depth; k += step) {
    const uint16_t* gk = g + kPanel * k;
    _tile_loadd(4, l + k, static_cast<int>(l_bytes));
    _tile_loadd(6, gk, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, gk + b.panel_stride, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, gk + 2 * b.panel_stride, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, gk + 3 * b.panel_stride, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, c, static_cast<int>(c_bytes));
  _tile_stored(1, c + kPanel, static_cast<int>(c_bytes));
  _tile_stored(2, c + 2 * kPanel, static_cast<int>(c_bytes));
  _tile_stored(3, c + 3 * kPanel, static_cast<int>(c_bytes));
}

LRK_FN void tile_1x1(const BlockProduct<uint16_t>& b, int64_t row, int64_t panel, int64_t step) {
  const bool accumulate = b.accumulate;
  const int64_t c_bytes = 4 * b.c_stride;
  const uint16_t* l = b.l + row * b.l_stride;
  const uint16_t* g = b.g + panel * b.panel_stride;
  float* c = b.c + row * b.c_stride + panel * kPanel;
  LRK_TILE_INIT(0, c);
  for (int64_t k = 0; k < b.depth; k += step) {
    _tile_loadd(4, l + k, static_cast<int>(2 * b.l_stride));
    _tile_loadd(6, g + kPanel * k, 64);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, c, static_cast<int>(c_bytes));
}

#  undef LRK_TILE_INIT

LRK_FN void multiply_bfloat16(const BlockProduct<uint16_t>& b, uint32_t* tile_shape) {
  const int64_t step = b.depth < kTileDepth ? b.depth : kTileDepth;
  fence();
  int64_t row = 0;
  if (b.rows >= kTileRows16) {
    configure(kTileRows16, step, tile_shape);
    for (; row + 2 * kTileRows16 <= b.rows; row += 2 * kTileRows16) {
      if (b.depth == step && !b.accumulate && b.panels % 2 == 0) {
        tile_2xall(b, row);
        continue;
      }
      int64_t panel = 0;
      for (; panel + 2 <= b.panels; panel += 2) tile_2x2(b, row, panel, step);
      if (panel < b.panels) tile_2x1(b, row, panel, step);
    }
  }
  for (; row < b.rows; row += kTileRows16) {
    configure(b.rows - row < kTileRows16 ? b.rows - row : kTileRows16, step, tile_shape);
    int64_t panel = 0;
    for (; panel + 4 <= b.panels; panel += 4) tile_1x4(b, row, panel, step);
    for (; panel < b.panels; ++panel) tile_1x1(b, row, panel, step);
  }
  fence();
}

LRK_INLINE __m512i scaled(__m512i row, float scale) {
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512 low = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(row)), 16));
  const __m512 high = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(row, 1)), 16));
  const __m512bh product =
      _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
  __m512i bits;
  static_assert(sizeof(bits) == sizeof(product), "both are one register");
  __builtin_memcpy(&bits, &product, sizeof(bits));
  return bits;
}

LRK_FN void interleave(uint16_t* dst, int64_t panel_stride, const uint16_t* src, int64_t src_stride,
                       int64_t rows, int64_t padded_rows, int64_t cols, const float* row_scale) {
  alignas(64) static const uint16_t kOrder[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i first = _mm512_load_si512(kOrder), second = _mm512_load_si512(kOrder + 32);
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t j = 0; j < cols; j += 2 * kPanel) {
    const int64_t n = cols - j < 32 ? cols - j : 32;
    const __mmask32 in = static_cast<__mmask32>((1ull << n) - 1);
    uint16_t* out = dst + (j / kPanel) * panel_stride;
    for (int64_t i = 0; i < padded_rows; i += 2) {
      const uint16_t* p = src + i * src_stride + j;
      __m512i even = i < rows ? _mm512_maskz_loadu_epi16(in, p) : zero;
      __m512i odd = i + 1 < rows ? _mm512_maskz_loadu_epi16(in, p + src_stride) : zero;
      if (row_scale) {
        if (i < rows) even = scaled(even, row_scale[i]);
        if (i + 1 < rows) odd = scaled(odd, row_scale[i + 1]);
      }
      _mm512_storeu_si512(out + i * kPanel, _mm512_permutex2var_epi16(even, first, odd));
      if (n > kPanel) {
        _mm512_storeu_si512(out + panel_stride + i * kPanel,
                            _mm512_permutex2var_epi16(even, second, odd));
      }
    }
  }
}

constexpr KernelTable tile_table() {
  KernelTable table = float_table();
  table.multiply_bfloat16 = multiply_bfloat16;
  table.release = release;
  table.interleave = interleave;
  return table;
}

}  // namespace amx
}  // namespace lrk
#endif

namespace lrk {

const KernelTable* amx_table() {
#if defined(LRK_BUILD_AMX)
  static constexpr KernelTable table = amx::tile_table();
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace lrk
