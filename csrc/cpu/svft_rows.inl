// Sixteen tokens at a time, which lie beside each other, once per instruction set. The including
// file defines LRK_ISA (a namespace), LRK_TARGET (the attribute that enables the instructions, may
// be empty) and LRK_W (floats in a register).

namespace lrk {
namespace LRK_ISA {

typedef float VecF __attribute__((vector_size(4 * LRK_W)));
constexpr int kVecs = static_cast<int>(kPanel) / LRK_W;

LRK_TARGET __attribute__((always_inline)) static inline VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

LRK_TARGET __attribute__((always_inline)) static inline void store(float* p, VecF v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// out (lines, 16) from in (sources, 16).
LRK_TARGET static void multiply(float* out, const float* in, const SparseLines& lines,
                                int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    VecF acc[kVecs] = {};
    for (int32_t e = lines.starts[i]; e < lines.starts[i + 1]; ++e) {
      const int32_t place = lines.order ? lines.order[e] : e;
      const float* from = in + lines.source[place] * kPanel;
      const VecF value = lines.values[place] - VecF{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[v] += value * load(from + v * LRK_W);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(out + i * kPanel + v * LRK_W, acc[v]);
  }
}

// out[e] += the products of row[e] of grad (., 16) and column[e] of t (., 16).
LRK_TARGET static void grad(float* out, const float* grad, const float* t, const int32_t* row,
                            const int32_t* column, int64_t count) {
  for (int64_t e = 0; e < count; ++e) {
    const float* a = grad + row[e] * kPanel;
    const float* b = t + column[e] * kPanel;
    VecF acc = load(a) * load(b);
#pragma GCC unroll 4
    for (int v = 1; v < kVecs; ++v) acc += load(a + v * LRK_W) * load(b + v * LRK_W);
    float lanes[LRK_W];
    store(lanes, acc);
#pragma GCC unroll 8
    for (int width = LRK_W / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    out[e] += lanes[0];
  }
}

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_ISA
#undef LRK_TARGET
#undef LRK_W
