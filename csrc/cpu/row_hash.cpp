#include "row_hash.h"

#include <algorithm>
#include <cstring>

#define LRK_ISA hash_plain
#define LRK_TARGET
#define LRK_W 4
#include "row_hash.inl"
#if defined(__x86_64__)
#  define LRK_ISA hash_avx2
#  define LRK_TARGET __attribute__((target("avx2,fma")))
#  define LRK_W 8
#  include "row_hash.inl"
#  define LRK_ISA hash_avx512
#  define LRK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#  define LRK_W 16
#  include "row_hash.inl"
#endif

namespace lrk {

RowHash row_hash(const KernelTable& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx2")) return hash_avx2::row_hash;
  if (!std::strcmp(kernels.name, "avx512") || !std::strcmp(kernels.name, "amx")) {
    return hash_avx512::row_hash;
  }
#endif
  (void)kernels;
  return hash_plain::row_hash;
}

void hash_rows(const Runtime& runtime, const Matrix& m, uint64_t* hashes) {
  constexpr int64_t kRows = 16;
  constexpr int64_t kSerialBytes = int64_t{1} << 18;
  const RowHash hash = row_hash(runtime.kernels);
  run(runtime, ceil_div(m.rows, kRows), m.rows * m.cols * dtype_bytes(m.dtype) > kSerialBytes,
      [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kRows, last = std::min(end * kRows, m.rows);
        hash_rows(hash, m, first, last - first, hashes + first);
      });
}

}  // namespace lrk
