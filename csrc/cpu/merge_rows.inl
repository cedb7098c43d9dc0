// What merging does to a row of W beside the product, once per instruction set; the loops are for
// the compiler to vectorise. The including file defines LRK_ISA (a namespace) and LRK_TARGET (the
// attribute that enables the instructions, may be empty).

namespace lrk {
namespace LRK_ISA {

// c = after * (before * w + scale * c)
LRK_TARGET static void combine(float* __restrict c, const float* __restrict w, int64_t n,
                               float scale, float before, float after) {
  for (int64_t i = 0; i < n; ++i) c[i] = after * (before * w[i] + scale * c[i]);
}

// c to the bfloat16 below or above it, as float32: the word's upper half is added to the bits that
// go, and its carry into those that stay. Column `col` of the matrix, a multiple of 4, is c[0].
LRK_TARGET static void round_stochastically(float* c, int64_t n, uint32_t key0, uint32_t key1,
                                            uint32_t row, int64_t col) {
  constexpr int kCounters = 16;
  uint32_t words[4][kCounters];
  for (int64_t j = 0; j < n; j += 4 * kCounters) {
    uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      c0[i] = static_cast<uint32_t>((col + j) / 4 + i);
      c1[i] = row;
      c2[i] = c3[i] = 0;
    }
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kCounters; ++i) {
        const uint64_t product0 = static_cast<uint64_t>(kPhiloxMul0) * c0[i];
        const uint64_t product1 = static_cast<uint64_t>(kPhiloxMul1) * c2[i];
        c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ k0;
        c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
        c1[i] = static_cast<uint32_t>(product1);
        c3[i] = static_cast<uint32_t>(product0);
      }
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    __builtin_memcpy(words[0], c0, sizeof(c0));
    __builtin_memcpy(words[1], c1, sizeof(c1));
    __builtin_memcpy(words[2], c2, sizeof(c2));
    __builtin_memcpy(words[3], c3, sizeof(c3));
    const int64_t live = n - j < 4 * kCounters ? n - j : 4 * kCounters;
    for (int64_t i = 0; i < live; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, c + j + i, sizeof(bits));
      const uint32_t rounded = (bits + (words[i % 4][i / 4] >> 16)) & 0xffff0000u;
      if ((bits & 0x7fffffffu) <= 0x7f800000u) bits = rounded;  // NaN could carry into infinity
      __builtin_memcpy(c + j + i, &bits, sizeof(bits));
    }
  }
}

}  // namespace LRK_ISA
}  // namespace lrk

#undef LRK_ISA
#undef LRK_TARGET
