// The primitives for AVX-512 (F, BW, DQ, VL).
#include "kernel_table.h"

#if defined(__x86_64__)
#  define LRK_ISA avx512
#  define LRK_ISA_NAME "avx512"
#  define LRK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#  define LRK_W 16
#  define LRK_HAS_AVX512 1
#  include "simd_kernels.inl"
#endif

namespace lrk {

const KernelTable* avx512_table() {
#if defined(__x86_64__)
  static constexpr KernelTable table = avx512::float_table();
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace lrk
