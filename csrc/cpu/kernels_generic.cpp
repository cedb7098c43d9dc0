// The primitives for any processor: 128-bit vectors, which SSE2 and NEON both have.
#define LRK_ISA generic
#define LRK_ISA_NAME "generic"
#define LRK_TARGET
#define LRK_W 4
#include "simd_kernels.inl"

namespace lrk {

const KernelTable* generic_table() {
  static constexpr KernelTable table = generic::float_table();
  return &table;
}

}  // namespace lrk
