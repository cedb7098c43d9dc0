// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
//
// The dropout contract of the package, the same in every backend:
//   key      = the int64 seed seen as unsigned, (low word, high word)
//   counter  = (column / 4, row, 0, 0)
//   word     = output[column % 4]
//   keep     = word >= floor(p * 2^32)
// The mask is a function of (seed, row, column) alone, so no pass stores it and any tiling draws
// the same bits. Nothing here depends on torch: the host compiler and nvcc both read this file.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#  define LRK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#  define LRK_HOST_DEVICE inline
#endif

namespace lrk {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

// The four words that decide columns 4 * counter .. 4 * counter + 3 of a row.
LRK_HOST_DEVICE PhiloxWords philox_words(uint32_t key0, uint32_t key1, uint32_t counter,
                                         uint32_t row) {
  uint32_t c0 = counter, c1 = row, c2 = 0, c3 = 0;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMul0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMul1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// floor(p * 2^32) for 0 <= p < 1; the product is exact in double.
LRK_HOST_DEVICE uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(p * 4294967296.0);
}

}  // namespace lrk
