// What device code asks of the processor, and of nvcc. On the host a header that is included before
// supplies the same names (tests/host_executor).
#pragma once

#include <cstdint>

#include "dora_norm_problem.h"

#if defined(__CUDACC__)
#  define LRK_DEVICE __device__ __forceinline__
#  define LRK_UNROLL _Pragma("unroll")
#endif

namespace lrk {

struct alignas(16) Words4 {
  uint32_t word[4];
};

#if defined(__CUDACC__)

namespace device {

LRK_DEVICE Words4 load_16_bytes(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
LRK_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
LRK_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }
LRK_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
LRK_DEVICE float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

#  if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Two floats to bfloat16, to nearest even, `low` in the low half.
LRK_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// d (16 x 8) += a (16 x 16) b (16 x 8), each lane holding its share.
LRK_DEVICE void multiply_tile(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                              uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#  else
LRK_DEVICE uint32_t pack_bfloat16(float, float) { return 0; }  // the FMA kernel runs here
LRK_DEVICE void multiply_tile(float (&)[4], uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
                              uint32_t) {}
#  endif

#  if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = has_clusters(__CUDA_ARCH__ / 10);

using Arrivals = uint64_t;  // an mbarrier: counts arrivals and bytes of one phase after another

LRK_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
LRK_DEVICE Words4* dynamic_shared() {
  extern __shared__ Words4 words[];
  return words;
}
LRK_DEVICE void start_arrivals(Arrivals* arrivals, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;"
               :
               : "r"(shared_address(arrivals)), "r"(count)
               : "memory");
}
// Makes what `start_arrivals` wrote known to the cluster; `synchronize_cluster` follows.
LRK_DEVICE void publish_arrivals() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}
LRK_DEVICE void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release;" : : : "memory");
  asm volatile("barrier.cluster.wait.acquire;" : : : "memory");
}
LRK_DEVICE void synchronize_warp() { __syncwarp(); }
// Arrives here, and makes the phase wait for so many bytes.
LRK_DEVICE void expect(Arrivals* arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(arrivals)), "r"(bytes)
               : "memory");
}
// Arrives at the same place of another block of the cluster.
LRK_DEVICE void arrive_at(Arrivals* arrivals, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}"
      :
      : "r"(shared_address(arrivals)), "r"(block)
      : "memory");
}
// Until the phase of this parity is complete.
LRK_DEVICE void wait(Arrivals* arrivals, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}"
      :
      : "r"(shared_address(arrivals)), "r"(parity)
      : "memory");
}
// Global memory to this place in the shared memory of the first `blocks` blocks of the cluster; the
// bytes arrive at each block's own `arrivals`. For sm_100 ptxas advises against it, for the sake of
// later architectures: those never launch it (has_clusters).
LRK_DEVICE void copy_to_cluster(Words4* to, const Words4* from, int bytes, Arrivals* arrivals,
                                int blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes),
        "r"(shared_address(arrivals)), "h"(static_cast<uint16_t>((1 << blocks) - 1))
      : "memory");
}
LRK_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
#  else
constexpr bool kHasClusters = false;

using Arrivals = uint64_t;
LRK_DEVICE Words4* dynamic_shared() { return nullptr; }
LRK_DEVICE void start_arrivals(Arrivals*, int) {}
LRK_DEVICE void publish_arrivals() {}
LRK_DEVICE void synchronize_cluster() {}
LRK_DEVICE void synchronize_warp() {}
LRK_DEVICE void expect(Arrivals*, int) {}
LRK_DEVICE void arrive_at(Arrivals*, int) {}
LRK_DEVICE void wait(Arrivals*, int) {}
LRK_DEVICE void copy_to_cluster(Words4*, const Words4*, int, Arrivals*, int) {}
LRK_DEVICE int cluster_rank() { return 0; }
#  endif

}  // namespace device

#endif

}  // namespace lrk
