// Sums of squares of a row slice, once per instruction set. The including file defines LRK_ISA (a
// namespace), LRK_TARGET (the attribute that enables the instructions, may be empty) and LRK_W
// (floats in a register). The order of a sum depends on its length alone.

namespace lrk {
namespace LRK_ISA {

typedef float SumF __attribute__((vector_size(4 * LRK_W)));
typedef uint32_t SumU __attribute__((vector_size(4 * LRK_W)));

LRK_TARGET static float sum_lanes(SumF v) {
  float lane[LRK_W];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int width = LRK_W / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

LRK_TARGET static float squares_float(const float* p, int64_t n) {
  SumF acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * LRK_W <= n; i += 4 * LRK_W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      SumF v;
      __builtin_memcpy(&v, p + i + j * LRK_W, sizeof(v));
      acc[j] += v * v;
    }
  }
  for (; i < n; i += LRK_W) {
    SumF v = {};
    const int64_t count = n - i < LRK_W ? n - i : LRK_W;
    __builtin_memcpy(&v, p + i, static_cast<size_t>(count) * sizeof(float));
    acc[0] += v * v;
  }
  return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// A 32-bit word holds two bfloat16: each half, the other bits zero, is its float.
LRK_TARGET static float squares_bfloat16(const uint16_t* p, int64_t n) {
  SumF acc[4] = {};
  int64_t i = 0;
  for (; i < n; i += 4 * LRK_W) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + 2 * j * LRK_W, count = n - at;
      SumU v = {};
      if (count >= 2 * LRK_W) {
        __builtin_memcpy(&v, p + at, sizeof(v));
      } else if (count > 0) {
        __builtin_memcpy(&v, p + at, static_cast<size_t>(count) * sizeof(uint16_t));
      }
      const SumF even = (SumF)(v << 16), odd = (SumF)(v & 0xffff0000u);
      acc[2 * j] += even * even;
      acc[2 * j + 1] += odd * odd;
    }
  }
  return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_ISA
#undef LRK_TARGET
#undef LRK_W
