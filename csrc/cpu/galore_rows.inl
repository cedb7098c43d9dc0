// The products of a GaLore step and what it does element by element, once per instruction set. The
// including file defines LRK_ISA (a namespace), LRK_TARGET (the attribute that enables the
// instructions, may be empty) and LRK_W (floats in a register).

namespace lrk {
namespace LRK_ISA {

typedef float VecF __attribute__((vector_size(4 * LRK_W)));

// A tile of C in registers: its rows, the panels of 16 columns that it covers, and their registers.
constexpr int kTileRows = LRK_W == 16 ? 12 : (LRK_W == 8 ? 6 : 2);
constexpr int kTilePanels = LRK_W == 16 ? 2 : 1;
constexpr int kVecs = kTilePanels * static_cast<int>(kPanel) / LRK_W;

LRK_TARGET __attribute__((always_inline)) static inline VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

LRK_TARGET __attribute__((always_inline)) static inline void store(float* p, VecF v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <int Rows, int Panels>
LRK_TARGET __attribute__((always_inline)) static inline void product_tile(const ThinProduct& b,
                                                                          int64_t row,
                                                                          int64_t panel) {
  constexpr int kOwn = Panels * static_cast<int>(kPanel) / LRK_W, kEach = kPanel / LRK_W;
  const float* l = b.l + row * b.l_stride;
  const float* g = b.g + panel * b.panel_stride;
  float* c = b.c + row * b.c_stride + panel * kPanel;
  if (b.into == Into::kWeight) {  // of W, the tile after the next on the right
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) __builtin_prefetch(c + i * b.c_stride + 2 * Panels * kPanel, 1);
  }
  VecF acc[Rows][kOwn] = {};
  for (int64_t k = 0; k < b.depth; ++k) {
    VecF right[kOwn];
#pragma GCC unroll 8
    for (int v = 0; v < kOwn; ++v) {
      right[v] = load(g + k * kPanel + (v / kEach) * b.panel_stride + (v % kEach) * LRK_W);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const VecF left = l[i * b.l_stride + k] - VecF{};
#pragma GCC unroll 8
      for (int v = 0; v < kOwn; ++v) acc[i][v] += left * right[v];
    }
  }
  const VecF keep = b.keep - VecF{};
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kOwn; ++v) {
      float* out = c + i * b.c_stride + v * LRK_W;
      if (b.into == Into::kAdd) {
        store(out, load(out) + acc[i][v]);
      } else if (b.into == Into::kWeight) {
        store(out, keep * load(out) - acc[i][v]);
      } else {
        store(out, acc[i][v]);
      }
    }
  }
}

template <int Rows>
LRK_TARGET static void product_panels(const ThinProduct& b, int64_t row) {
  int64_t panel = 0;
  for (; panel + kTilePanels <= b.panels; panel += kTilePanels) {
    product_tile<Rows, kTilePanels>(b, row, panel);
  }
  for (; panel < b.panels; ++panel) product_tile<Rows, 1>(b, row, panel);
}

// A few rows of C at a time, over all panels: so they lie in memory.
LRK_TARGET void product(const ThinProduct& b) {
  const int64_t lines_in_row = (b.ahead.width + 63) / 64;
  const int64_t tiles = (b.rows + kTileRows - 1) / kTileRows;
  const int64_t rows_ahead = (b.ahead.rows + tiles - 1) / tiles;
  int64_t row = 0, asked = 0;
  while (row < b.rows) {
    for (int64_t end = std::min(asked + rows_ahead, b.ahead.rows); asked < end; ++asked) {
      const char* line = b.ahead.data + asked * b.ahead.stride;
      for (int64_t i = 0; i < lines_in_row; ++i) __builtin_prefetch(line + 64 * i);
    }
    const int64_t left = b.rows - row;
    if (left >= kTileRows) {
      product_panels<kTileRows>(b, row);
      row += kTileRows;
    } else if (kTileRows > 4 && left >= 4) {
      product_panels<4>(b, row);
      row += 4;
    } else if (kTileRows > 2 && left >= 2) {
      product_panels<2>(b, row);
      row += 2;
    } else {
      product_panels<1>(b, row);
      row += 1;
    }
  }
}

// Adam on a row of the projected gradient, in place: it becomes rate * D.
LRK_TARGET void adam_row(float* __restrict low, float* __restrict m, float* __restrict v,
                         int64_t cols, const GaLoreStep& step) {
  const float rate = step.rate, beta1 = step.beta1, beta2 = step.beta2, eps = step.eps;
  const float inverse_root = step.inverse_root;
  for (int64_t j = 0; j < cols; ++j) {
    const float l = low[j];
    const float mean = beta1 * m[j] + (1.0f - beta1) * l;
    const float square = beta2 * v[j] + (1.0f - beta2) * l * l;
    m[j] = mean;
    v[j] = square;
    low[j] = rate * mean / (__builtin_sqrtf(square) * inverse_root + eps);
  }
}

// w = keep * w - change.
LRK_TARGET void combine_row(float* __restrict w, const float* __restrict change, int64_t cols,
                            float keep) {
  for (int64_t j = 0; j < cols; ++j) w[j] = keep * w[j] - change[j];
}

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_ISA
#undef LRK_TARGET
#undef LRK_W
