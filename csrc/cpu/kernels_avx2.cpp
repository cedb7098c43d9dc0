// The primitives for AVX2 with FMA and F16C.
#include "kernel_table.h"

#if defined(__x86_64__)
#  define LRK_ISA avx2
#  define LRK_ISA_NAME "avx2"
#  define LRK_TARGET __attribute__((target("avx2,fma,f16c")))
#  define LRK_W 8
#  define LRK_HAS_AVX2 1
#  include "simd_kernels.inl"
#endif

namespace lrk {

const KernelTable* avx2_table() {
#if defined(__x86_64__)
  static constexpr KernelTable table = avx2::float_table();
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace lrk
