// What the host and the GPU agree on about a DoRA norm: its operands, and how the scratch memory is
// laid out.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"

#if defined(__CUDACC__)
#  define LRK_BOTH __host__ __device__ __forceinline__
#else
#  define LRK_BOTH inline
#endif

namespace lrk {

struct DoraMatrix {
  const void* data;
  Dtype dtype;
  int64_t stride;  // elements from one row (or one element of a vector) to the next
};

struct DoraNormProblem {
  DoraMatrix weight;          // (n, k)
  DoraMatrix lora_a;          // (rank, k)
  DoraMatrix lora_b;          // (n, rank)
  DoraMatrix weight_sq_norm;  // n, or null data: computed
  DoraMatrix magnitude;       // n, or null data: no column scale
  int64_t n;
  int64_t k;
  int rank;
  float scaling;
  float* norm;
  float* sq_norm;
  float* column_scale;
  void* scratch;  // dora_norm_scratch_bytes(k, rank), 16-byte aligned
};

constexpr int kDoraRows = 32;   // rows of W in one block of the mma kernel
constexpr int kDoraChunk = 32;  // reduction columns of one chunk: two mma steps
constexpr int kDoraFold = 16;   // chunks after which U is folded into the row sums
constexpr int kDoraStages = 4;  // pieces of A on their way to a warp of a cluster
constexpr int kDoraFmaThreads = 128;
constexpr int kDoraFmaRows = 4;    // rows of one warp
constexpr int kDoraFmaRanks = 16;  // ranks that one pass over W takes

// Whether code for this compute capability (90: 9.0) has blocks that fetch A together: Hopper, and
// Blackwell of data centres. Elsewhere a copy to several blocks is missing or slow.
LRK_BOTH constexpr bool has_clusters(int capability) {
  return capability / 10 == 9 || capability / 10 == 10;
}
LRK_BOTH int64_t dora_ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
// Panels of eight ranks, to an even number.
LRK_BOTH int64_t dora_rank_tiles(int64_t rank) { return dora_ceil_div(rank, 16) * 2; }
// Parts of A as the mma kernel reads it: 1 for the commonest pair of dtypes, else as many as any
// needs.
LRK_BOTH int dora_parts(Dtype weight, Dtype lora_a) {
  return weight == Dtype::kBFloat16 && lora_a == Dtype::kBFloat16 ? 1 : 3;
}
// 16-byte words of A (or, with the rank as k, of A A^T) in that order.
LRK_BOTH int64_t dora_packed_words(int64_t k, int64_t rank, int parts) {
  return dora_ceil_div(k, kDoraChunk) * dora_rank_tiles(rank) * parts * 32;
}
// Floats in a row of A as the FMA kernel reads it.
LRK_BOTH int64_t dora_float_stride(int64_t k) { return dora_ceil_div(k, 8) * 8; }
LRK_BOTH int64_t dora_norm_scratch_bytes(int64_t k, int64_t rank) {
  const int64_t packed = 16 * (dora_packed_words(k, rank, 3) + dora_packed_words(rank, rank, 3));
  const int64_t plain = 4 * rank * (dora_float_stride(k) + rank);
  return packed > plain ? packed : plain;
}
// Whether the first launch makes A A^T for the mma kernel by its tiles too: a block then makes 32 x
// 32 of it, else 4 x 4, of which few read A too often.
LRK_BOTH bool dora_gram_by_tiles(int64_t rank, bool packed) { return packed && rank > 64; }
// Blocks along each side of A A^T, to a multiple of 32 of it.
LRK_BOTH int64_t dora_gram_side(int64_t rank, bool by_tiles) {
  return dora_ceil_div(rank, kDoraChunk) * (by_tiles ? 1 : kDoraChunk / 4);
}
// Blocks of the first launch: those of A A^T come first, then those that reorder A.
LRK_BOTH int64_t dora_prepare_blocks(int64_t k, int64_t rank, bool packed, int threads) {
  const int64_t side = dora_gram_side(rank, dora_gram_by_tiles(rank, packed));
  const int64_t items = packed ? dora_ceil_div(k, kDoraChunk) * dora_rank_tiles(rank) * 32
                               : rank * (dora_float_stride(k) / 8);
  return side * side + dora_ceil_div(items, threads);
}

}  // namespace lrk
