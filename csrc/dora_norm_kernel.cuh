// Device code of the DoRA norm, n_i^2 = |W_i|^2 + 2 s sum_r B_ir U_ir with
// U = W A^T + (s / 2) B (A A^T). No torch header and no CUDA library.
//
// Two launches: `dora_prepare_kernel` makes A A^T and puts A in the order in which the second reads
// it; one of the two norm kernels reads W once. The mma kernel multiplies bfloat16 tiles and is as
// exact as float32: an operand enters as the sum of the 1, 2 or 3 bfloat16 parts that its dtype
// needs, and the products of parts that reach float32's digits are all taken. The FMA kernel serves
// ranks below 16 and processors without bfloat16 tiles.
//
// From rank 65 on, what a block reads most of is A, R / 32 bytes for each byte of W. On processors
// with clusters the blocks of one fetch A together, each a share that is copied into the shared
// memory of all.
//
// The order of every sum depends on shapes alone; there are no atomics. The file compiles for the
// host as well, after a header that supplies the names which nvcc gives (tests/host_executor).
#pragma once

#include <cstdint>
#include <cstring>

#include "device_primitives.cuh"
#include "dora_norm_problem.h"

namespace lrk {

// ---- elements -----------------------------------------------------------------------------------

struct Bfloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

LRK_DEVICE float low_bfloat16(uint32_t word) { return device::bits_to_float(word << 16); }
LRK_DEVICE float high_bfloat16(uint32_t word) { return device::bits_to_float(word & 0xffff0000u); }

LRK_DEVICE float to_float(float value) { return value; }
LRK_DEVICE float to_float(Bfloat16Bits value) { return low_bfloat16(value.bits); }
LRK_DEVICE float to_float(HalfBits value) { return device::half_to_float(value.bits); }

LRK_DEVICE float load_any(const DoraMatrix& m, int64_t index) {
  if (m.dtype == Dtype::kFloat32) return static_cast<const float*>(m.data)[index];
  if (m.dtype == Dtype::kBFloat16) {
    return to_float(static_cast<const Bfloat16Bits*>(m.data)[index]);
  }
  return to_float(static_cast<const HalfBits*>(m.data)[index]);
}

// Eight neighbouring elements of a row as they lie in memory.
template <typename T>
struct Eight {
  Words4 words[sizeof(T) / 2];
};

// bfloat16 parts that make up a value, each the rounded rest of the ones before.
template <typename T>
struct Parts;
template <>
struct Parts<Bfloat16Bits> {
  static constexpr int kCount = 1;
};
template <>
struct Parts<HalfBits> {
  static constexpr int kCount = 2;
};
template <>
struct Parts<float> {
  static constexpr int kCount = 3;
};

LRK_DEVICE uint32_t element_bits(float value) { return device::float_to_bits(value); }
LRK_DEVICE uint32_t element_bits(Bfloat16Bits value) { return value.bits; }
LRK_DEVICE uint32_t element_bits(HalfBits value) { return value.bits; }

// Whether 16 bytes can be loaded from every eighth element of every row.
template <typename T>
LRK_DEVICE bool rows_aligned(const DoraMatrix& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
         m.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

// Columns [col, col + 8) of a row; zeros past `cols`, and throughout when `live` is false.
template <typename T>
LRK_DEVICE Eight<T> load_eight(const T* row, int64_t col, int64_t cols, bool live, bool aligned) {
  constexpr int kWords = static_cast<int>(sizeof(T) / 2);
  Eight<T> result;
  LRK_UNROLL
  for (int i = 0; i < kWords; ++i) result.words[i] = {{0, 0, 0, 0}};
  if (!live) return result;
  if (aligned && col + 8 <= cols) {
    LRK_UNROLL
    for (int i = 0; i < kWords; ++i) {
      result.words[i] = device::load_16_bytes(row + col + i * (8 / kWords));
    }
    return result;
  }
  LRK_UNROLL
  for (int j = 0; j < 8; ++j) {
    if (col + j < cols) {
      const int at = j * static_cast<int>(sizeof(T));
      result.words[at / 16].word[at % 16 / 4] |= element_bits(row[col + j]) << (at % 4 * 8);
    }
  }
  return result;
}

// Elements 2 i and 2 i + 1.
LRK_DEVICE void pair_of(const Eight<float>& e, int i, float& x, float& y) {
  x = device::bits_to_float(e.words[i / 2].word[i % 2 * 2]);
  y = device::bits_to_float(e.words[i / 2].word[i % 2 * 2 + 1]);
}
LRK_DEVICE void pair_of(const Eight<Bfloat16Bits>& e, int i, float& x, float& y) {
  x = low_bfloat16(e.words[0].word[i]);
  y = high_bfloat16(e.words[0].word[i]);
}
LRK_DEVICE void pair_of(const Eight<HalfBits>& e, int i, float& x, float& y) {
  x = device::half_to_float(static_cast<uint16_t>(e.words[0].word[i]));
  y = device::half_to_float(static_cast<uint16_t>(e.words[0].word[i] >> 16));
}

template <int kCount>
struct Split {
  Words4 part[kCount];
};

// Pair i of a split, from two floats.
template <int kCount>
LRK_DEVICE void split_pair(Split<kCount>& to, int i, float x, float y) {
  LRK_UNROLL
  for (int part = 0; part < kCount; ++part) {
    const uint32_t word = device::pack_bfloat16(x, y);
    to.part[part].word[i] = word;
    x -= low_bfloat16(word);
    y -= high_bfloat16(word);
  }
}

LRK_DEVICE float add_squares(const Split<1>& s, float sum) {
  LRK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float x = low_bfloat16(s.part[0].word[i]), y = high_bfloat16(s.part[0].word[i]);
    sum += x * x;
    sum += y * y;
  }
  return sum;
}

template <typename T>
LRK_DEVICE Split<Parts<T>::kCount> split_eight(const Eight<T>& e, float& squares) {
  Split<Parts<T>::kCount> result;
  LRK_UNROLL
  for (int i = 0; i < 4; ++i) {
    float x, y;
    pair_of(e, i, x, y);
    squares += x * x;
    squares += y * y;
    split_pair(result, i, x, y);
  }
  return result;
}
// bfloat16 is its own only part.
LRK_DEVICE Split<1> split_eight(const Eight<Bfloat16Bits>& e, float& squares) {
  const Split<1> result{{e.words[0]}};
  squares = add_squares(result, squares);
  return result;
}

// ---- the order of the packed factor -------------------------------------------------------------

// For a chunk of 32 reduction columns, a tile of 8 ranks and a part, lane l holds 16 bytes: rank
// l / 4, columns 8 (l % 4) .. + 7 of the chunk. A lane takes the same eight columns of W, so the
// two mma steps of a chunk meet the columns in an order of their own, the same on both sides.
LRK_DEVICE int64_t packed_word(int64_t chunk, int64_t tile, int part, int lane, int64_t rank_tiles,
                               int parts) {
  return ((chunk * rank_tiles + tile) * parts + part) * 32 + lane;
}

// ---- the result ---------------------------------------------------------------------------------

LRK_DEVICE void write_norm(const DoraNormProblem& p, int64_t row, float square, float cross) {
  const float total = square + 2.0f * p.scaling * cross;
  // A sum that cancelled below zero is a zero norm; a NaN is not below zero and stays.
  const float norm = sqrtf(total < 0.0f ? 0.0f : total);
  p.norm[row] = norm;
  p.sq_norm[row] = square;
  if (p.magnitude.data) {
    p.column_scale[row] =
        norm == 0.0f ? 0.0f : load_any(p.magnitude, row * p.magnitude.stride) / norm;
  }
}

// ---- bfloat16 tiles -----------------------------------------------------------------------------

// One lane's share of 32 rows by 32 columns: rows g, g + 8, g + 16, g + 24 with g = lane / 4.
template <int kCount>
struct Fragment {
  Split<kCount> row[4];
};

template <typename W>
struct RawFragment {
  Eight<W> row[4];
};

template <typename W>
LRK_DEVICE RawFragment<W> load_rows(const DoraMatrix& matrix, int64_t rows, int64_t cols,
                                    bool aligned, int64_t row0, int64_t chunk, int lane) {
  RawFragment<W> result;
  LRK_UNROLL
  for (int m = 0; m < 4; ++m) {
    const int64_t row = row0 + lane / 4 + 8 * m;
    result.row[m] = load_eight(static_cast<const W*>(matrix.data) + row * matrix.stride,
                               chunk * kDoraChunk + lane % 4 * 8, cols, row < rows, aligned);
  }
  return result;
}

template <typename W>
LRK_DEVICE Fragment<Parts<W>::kCount> split_rows(const RawFragment<W>& raw, float (&squares)[4]) {
  Fragment<Parts<W>::kCount> result;
  LRK_UNROLL
  for (int m = 0; m < 4; ++m) result.row[m] = split_eight(raw.row[m], squares[m]);
  return result;
}

// U += 32 rows times two tiles of eight rows of A for one chunk. Products of parts beyond float32's
// digits are left out.
template <int kTiles, int kWParts, int kAParts>
LRK_DEVICE void multiply_pair(float (&u)[2][kTiles][4], int pair, const Fragment<kWParts>& w,
                              const Words4 (&a)[2][kAParts]) {
  LRK_UNROLL
  for (int wp = kWParts - 1; wp >= 0; --wp) {
    LRK_UNROLL
    for (int ap = kAParts - 1; ap >= 0; --ap) {
      if (wp + ap > 2) continue;
      LRK_UNROLL
      for (int step = 0; step < 2; ++step) {
        LRK_UNROLL
        for (int j = 0; j < 2; ++j) {
          LRK_UNROLL
          for (int m = 0; m < 2; ++m) {
            const Words4 &low = w.row[2 * m].part[wp], &high = w.row[2 * m + 1].part[wp];
            device::multiply_tile(u[m][pair + j], low.word[2 * step], high.word[2 * step],
                                  low.word[2 * step + 1], high.word[2 * step + 1],
                                  a[j][ap].word[2 * step], a[j][ap].word[2 * step + 1]);
          }
        }
      }
    }
  }
}

// ---- first launch -------------------------------------------------------------------------------

// An element of A A^T times s / 2, in three parts where the mma kernel looks for them, and its
// mirror image.
LRK_DEVICE void put_gram(const DoraNormProblem& p, Words4* packed_gram, int64_t r, int64_t t,
                         float value, bool mirrored) {
  const int64_t rank_tiles = dora_rank_tiles(p.rank);
  uint16_t* out = reinterpret_cast<uint16_t*>(packed_gram);
  float rest = 0.5f * p.scaling * value;
  for (int part = 0; part < 3; ++part) {
    const uint32_t word = device::pack_bfloat16(rest, 0.0f);
    rest -= low_bfloat16(word);
    for (int mirror = 0; mirror < (mirrored ? 2 : 1); ++mirror) {
      const int64_t n = mirror ? t : r, k = mirror ? r : t;
      if (n < rank_tiles * 8) {
        const int lane = static_cast<int>(n % 8 * 4 + k % 32 / 8);
        out[packed_word(k / 32, n / 8, part, lane, rank_tiles, 3) * 8 + k % 8] =
            static_cast<uint16_t>(word);
      }
    }
  }
}

// 4 x 4 of A A^T in float32, from (r0, t0) on; the threads share the columns.
template <typename T, int kThreads>
LRK_DEVICE void gram_by_fma(const DoraNormProblem& p, bool packed, int64_t r0, int64_t t0) {
  constexpr int kTile = 4, kShare = kThreads / (kTile * kTile);
  __shared__ float partial[kTile * kTile][kThreads + 1];
  const T* a = static_cast<const T*>(p.lora_a.data);
  const int64_t rank = p.rank;
  const int tid = static_cast<int>(threadIdx.x);
  float sum[kTile][kTile] = {};
  if (t0 < rank) {
    for (int64_t col = tid; col < p.k; col += kThreads) {
      float left[kTile], right[kTile];
      LRK_UNROLL
      for (int i = 0; i < kTile; ++i) {
        left[i] = r0 + i < rank ? to_float(a[(r0 + i) * p.lora_a.stride + col]) : 0.0f;
        right[i] = t0 + i < rank ? to_float(a[(t0 + i) * p.lora_a.stride + col]) : 0.0f;
      }
      LRK_UNROLL
      for (int i = 0; i < kTile; ++i) {
        LRK_UNROLL
        for (int j = 0; j < kTile; ++j) sum[i][j] += left[i] * right[j];
      }
    }
  }
  LRK_UNROLL
  for (int i = 0; i < kTile * kTile; ++i) partial[i][tid] = sum[i / kTile][i % kTile];
  __syncthreads();
  const int element = tid / kShare;
  float value = 0.0f;
  for (int i = tid % kShare; i < kThreads; i += kShare) value += partial[element][i];
  LRK_UNROLL
  for (int mask = 1; mask < kShare; mask *= 2) value += device::shuffle_xor(value, mask);
  if (tid % kShare != 0) return;
  const int64_t r = r0 + element / kTile, t = t0 + element % kTile;
  if (packed) {
    Words4* packed_a = static_cast<Words4*>(p.scratch);
    const int parts = dora_parts(p.weight.dtype, p.lora_a.dtype);
    put_gram(p, packed_a + dora_packed_words(p.k, rank, parts), r, t, value, r0 < t0);
  } else if (r < rank && t < rank) {
    float* gram = static_cast<float*>(p.scratch) + rank * dora_float_stride(p.k);
    gram[r * rank + t] = value;
    if (r0 < t0) gram[t * rank + r] = value;
  }
}

// 32 x 32 of it by bfloat16 tiles, as exact: the threads of a warp hold both sides as they hold
// rows of W, the warps share the columns.
template <typename T, int kThreads>
LRK_DEVICE void gram_by_tiles(const DoraNormProblem& p, int64_t r0, int64_t t0) {
  constexpr int kParts = Parts<T>::kCount, kWarps = kThreads / 32, kSums = 32;
  __shared__ float partial[kWarps][kSums][32];
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t chunks = dora_ceil_div(p.k, kDoraChunk);
  const bool aligned = rows_aligned<T>(p.lora_a);
  const auto load = [&](int64_t row0, int64_t chunk) {
    return load_rows<T>(p.lora_a, p.rank, p.k, aligned, row0, chunk, lane);
  };
  LRK_UNROLL
  for (int i = 0; i < kSums; ++i) partial[warp][i][lane] = 0.0f;
  RawFragment<T> next_left = load(r0, warp), next_right = load(t0, warp);
  for (int64_t chunk = warp; chunk < chunks;) {
    float u[2][4][4] = {};
    for (int i = 0; i < kDoraFold && chunk < chunks; ++i, chunk += kWarps) {
      float unused[4] = {};
      const Fragment<kParts> left = split_rows(next_left, unused);
      const Fragment<kParts> right = split_rows(next_right, unused);
      next_left = load(r0, chunk + kWarps);  // past the last one zeros
      next_right = load(t0, chunk + kWarps);
      LRK_UNROLL
      for (int pair = 0; pair < 4; pair += 2) {
        Words4 tiles[2][kParts];
        LRK_UNROLL
        for (int j = 0; j < 2; ++j) {
          LRK_UNROLL
          for (int part = 0; part < kParts; ++part) tiles[j][part] = right.row[pair + j].part[part];
        }
        multiply_pair(u, pair, left, tiles);
      }
    }
    LRK_UNROLL
    for (int i = 0; i < kSums; ++i) partial[warp][i][lane] += u[i / 16][i / 4 % 4][i % 4];
  }
  __syncthreads();
  Words4* packed_a = static_cast<Words4*>(p.scratch);
  const int parts = dora_parts(p.weight.dtype, p.lora_a.dtype);
  for (int i = warp; i < kSums; i += kWarps) {
    float value = 0.0f;
    for (int w = 0; w < kWarps; ++w) value += partial[w][i][lane];
    // As mma.sync leaves it: u[i / 16][i / 4 % 4][i % 4] of this lane.
    const int row = i / 16 * 16 + i % 4 / 2 * 8 + lane / 4,
              col = i / 4 % 4 * 8 + lane % 4 * 2 + i % 2;
    put_gram(p, packed_a + dora_packed_words(p.k, p.rank, parts), r0 + row, t0 + col, value,
             r0 < t0);
  }
}

// The first blocks, dora_gram_side squared: A A^T, both triangles from the upper one. The rest: A
// itself. `packed`: for the mma kernel, A A^T times s / 2; otherwise float32 rows, A A^T as it is.
// kTiles: dora_gram_by_tiles of the problem.
template <typename T, bool kTiles, int kThreads>
__global__ void __launch_bounds__(kThreads) dora_prepare_kernel(DoraNormProblem p, bool packed) {
  const int64_t rank = p.rank, side = dora_gram_side(rank, kTiles);
  if (blockIdx.x < side * side) {
    constexpr int kTile = kTiles ? 32 : 4;
    const int64_t r0 = blockIdx.x / side * kTile, t0 = blockIdx.x % side * kTile;
    if (r0 > t0) return;
    if constexpr (kTiles) {
      gram_by_tiles<T, kThreads>(p, r0, t0);
    } else {
      gram_by_fma<T, kThreads>(p, packed, r0, t0);
    }
    return;
  }
  const T* a = static_cast<const T*>(p.lora_a.data);
  const int64_t item = (blockIdx.x - side * side) * kThreads + static_cast<int64_t>(threadIdx.x);
  if (packed) {
    const int64_t rank_tiles = dora_rank_tiles(rank);
    const int parts = dora_parts(p.weight.dtype, p.lora_a.dtype);
    Words4* packed_a = static_cast<Words4*>(p.scratch);
    const int lane = static_cast<int>(item % 32);
    const int64_t tile = item / 32 % rank_tiles, chunk = item / 32 / rank_tiles;
    if (chunk >= dora_ceil_div(p.k, kDoraChunk)) return;
    const int64_t r = tile * 8 + lane / 4, col = chunk * kDoraChunk + lane % 4 * 8;
    const Eight<T> e =
        load_eight(a + r * p.lora_a.stride, col, p.k, r < rank, rows_aligned<T>(p.lora_a));
    Split<3> split;
    LRK_UNROLL
    for (int i = 0; i < 4; ++i) {
      float x, y;
      pair_of(e, i, x, y);
      split_pair(split, i, x, y);
    }
    LRK_UNROLL
    for (int part = 0; part < 3; ++part) {
      if (part < parts) {
        packed_a[packed_word(chunk, tile, part, lane, rank_tiles, parts)] = split.part[part];
      }
    }
  } else {
    float* float_a = static_cast<float*>(p.scratch);
    const int64_t stride = dora_float_stride(p.k), r = item / (stride / 8);
    const int64_t col = item % (stride / 8) * 8;
    if (r >= rank) return;
    const Eight<T> e =
        load_eight(a + r * p.lora_a.stride, col, p.k, true, rows_aligned<T>(p.lora_a));
    LRK_UNROLL
    for (int i = 0; i < 4; ++i) {
      float x, y;
      pair_of(e, i, x, y);
      float_a[r * stride + col + 2 * i] = x;
      float_a[r * stride + col + 2 * i + 1] = y;
    }
  }
}

// ---- second launch, bfloat16 tiles --------------------------------------------------------------

// U += 32 rows times all of a warp's ranks for one chunk, A read from global memory.
template <int kTiles, int kWParts, int kAParts>
LRK_DEVICE void multiply_chunk(float (&u)[2][kTiles][4], const Fragment<kWParts>& w,
                               const Words4* packed, int64_t chunk, int first_tile, int rank_tiles,
                               int lane) {
  LRK_UNROLL
  for (int pair = 0; pair < kTiles; pair += 2) {
    if (first_tile + pair >= rank_tiles) break;
    Words4 a[2][kAParts];
    LRK_UNROLL
    for (int j = 0; j < 2; ++j) {
      LRK_UNROLL
      for (int part = 0; part < kAParts; ++part) {
        a[j][part] = device::load_16_bytes(
            packed + packed_word(chunk, first_tile + pair + j, part, lane, rank_tiles, kAParts));
      }
    }
    multiply_pair(u, pair, w, a);
  }
}

// A warp's ranks of A, then of A A^T, chunk after chunk, as they arrive in shared memory. A piece
// is what one stage holds: of A in one part all the warp's tiles of a chunk, in three parts a pair
// of them. The same warps of a cluster's blocks want the same pieces: each fetches its share of one
// and sends it to all. A stage is free again when all of them have let go of it. Whoever waits,
// waits for what others do before they come as far, so no wait is for ever.
template <int kAParts, int kTiles, int kCluster>
struct FactorStream {
  static constexpr int kStageWords = kTiles * 32;  // one part of all tiles, or three of two
  static_assert(2 * 3 * 32 <= kStageWords);

  // Fetching starts: `tiles` of `rank_tiles` from `first_tile` on, of chunks `first_chunk`,
  // `first_chunk + step`, ...
  LRK_DEVICE FactorStream(Words4* stages, device::Arrivals* full, device::Arrivals* free,
                          const Words4* packed_a, const Words4* packed_gram, int first_tile,
                          int tiles, int rank_tiles, int chunks, int factor_chunks, int first_chunk,
                          int step, int lane)
      : stages_(stages),
        full_(full),
        free_(free),
        packed_a_(packed_a),
        packed_gram_(packed_gram),
        first_tile_(first_tile),
        tiles_(tiles),
        rank_tiles_(rank_tiles),
        first_chunk_(first_chunk),
        step_(step) {
    of_a_ = (chunks - first_chunk + step - 1) / step * pieces_of_chunk(true);
    pieces_ = of_a_ + (factor_chunks - first_chunk + step - 1) / step * pieces_of_chunk(false);
    if (tiles <= 0) pieces_ = 0;
    for (int i = 0; i + 1 < kDoraStages; ++i) fetch(lane);
  }
  LRK_DEVICE const Words4* wait_for_piece() const {
    device::wait(full_ + taken_ % kDoraStages, taken_ / kDoraStages & 1);
    return stages_ + taken_ % kDoraStages * kStageWords;
  }
  // The values read from the stage have been multiplied, so no read of it is still under way.
  LRK_DEVICE void let_go(int lane) {
    device::synchronize_warp();
    if (lane < kCluster) device::arrive_at(free_ + taken_ % kDoraStages, lane);
    ++taken_;
    fetch(lane);
  }

 private:
  LRK_DEVICE int pieces_of_chunk(bool of_a) const { return of_a && kAParts == 1 ? 1 : tiles_ / 2; }
  LRK_DEVICE void fetch(int lane) {
    const int piece = fetched_++;
    if (piece >= pieces_ || lane != 0) return;
    const int stage = piece % kDoraStages;
    if (piece >= kDoraStages) device::wait(free_ + stage, (piece / kDoraStages - 1) & 1);
    const bool of_a = piece < of_a_;
    const int at = of_a ? piece : piece - of_a_, pieces = pieces_of_chunk(of_a);
    const int parts = of_a ? kAParts : 3, words = tiles_ / pieces * parts * 32;
    const int share = words / kCluster, offset = device::cluster_rank() * share;
    const Words4* from = (of_a ? packed_a_ : packed_gram_) +
                         packed_word(first_chunk_ + at / pieces * step_,
                                     first_tile_ + at % pieces * 2, 0, 0, rank_tiles_, parts);
    device::expect(full_ + stage, words * 16);
    device::copy_to_cluster(stages_ + stage * kStageWords + offset, from + offset, share * 16,
                            full_ + stage, kCluster);
  }

  Words4* stages_;
  device::Arrivals *full_, *free_;
  const Words4 *packed_a_, *packed_gram_;
  int first_tile_, tiles_, rank_tiles_, first_chunk_, step_;
  int of_a_, pieces_, fetched_ = 0, taken_ = 0;
};

// As `multiply_chunk`, A as it arrives.
template <int kWParts, int kParts, int kTiles, int kAParts, int kCluster>
LRK_DEVICE void multiply_arriving(float (&u)[2][kTiles][4], const Fragment<kWParts>& w,
                                  FactorStream<kAParts, kTiles, kCluster>& stream, int tiles,
                                  int lane) {
  constexpr int kPieceTiles = kParts == 1 ? kTiles : 2;
  const Words4* piece = nullptr;
  LRK_UNROLL
  for (int pair = 0; pair < kTiles; pair += 2) {
    if (pair >= tiles) break;
    if (pair % kPieceTiles == 0) piece = stream.wait_for_piece();
    Words4 a[2][kParts];
    LRK_UNROLL
    for (int j = 0; j < 2; ++j) {
      LRK_UNROLL
      for (int part = 0; part < kParts; ++part) {
        a[j][part] = piece[((pair % kPieceTiles + j) * kParts + part) * 32 + lane];
      }
    }
    multiply_pair(u, pair, w, a);
    if ((pair + 2) % kPieceTiles == 0 || pair + 2 >= tiles) stream.let_go(lane);
  }
}

// cross_i += sum_r B_ir U_ir, and U starts again: tensor cores round sums down, so none gets long.
template <int kTiles>
LRK_DEVICE void fold(const DoraNormProblem& p, float (&u)[2][kTiles][4], float (&cross)[4],
                     int64_t row0, int first_tile, int lane) {
  LRK_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    LRK_UNROLL
    for (int m = 0; m < 4; ++m) {
      const int64_t row = row0 + lane / 4 + 8 * m;
      LRK_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int r = (first_tile + i) * 8 + lane % 4 * 2 + c;
        if (r < p.rank && row < p.n) {
          cross[m] += u[m / 2][i][m % 2 * 2 + c] * load_any(p.lora_b, row * p.lora_b.stride + r);
        }
        u[m / 2][i][m % 2 * 2 + c] = 0.0f;
      }
    }
  }
}

// Columns of B in place of columns of W, for the product with A A^T.
LRK_DEVICE Fragment<3> load_factor_rows(const DoraNormProblem& p, int64_t row0, int64_t chunk,
                                        int lane) {
  Fragment<3> result;
  LRK_UNROLL
  for (int m = 0; m < 4; ++m) {
    const int64_t row = row0 + lane / 4 + 8 * m;
    const int64_t col = chunk * kDoraChunk + lane % 4 * 8, base = row * p.lora_b.stride + col;
    LRK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool x = row < p.n && col + 2 * i < p.rank, y = row < p.n && col + 2 * i + 1 < p.rank;
      split_pair(result.row[m], i, x ? load_any(p.lora_b, base + 2 * i) : 0.0f,
                 y ? load_any(p.lora_b, base + 2 * i + 1) : 0.0f);
    }
  }
  return result;
}

// Exchanged between the warps of a block: [row of four][part][lane].
template <int kCount>
LRK_DEVICE void put_fragment(Words4 (*slot)[32], const Fragment<kCount>& f, int lane) {
  LRK_UNROLL
  for (int m = 0; m < 4; ++m) {
    LRK_UNROLL
    for (int part = 0; part < kCount; ++part) slot[m * 3 + part][lane] = f.row[m].part[part];
  }
}
template <int kCount>
LRK_DEVICE Fragment<kCount> get_fragment(const Words4 (*slot)[32], int lane) {
  Fragment<kCount> f;
  LRK_UNROLL
  for (int m = 0; m < 4; ++m) {
    LRK_UNROLL
    for (int part = 0; part < kCount; ++part) f.row[m].part[part] = slot[m * 3 + part][lane];
  }
  return f;
}

// Dynamic shared memory of a block in a cluster.
LRK_BOTH constexpr int dora_cluster_bytes(int tiles, int warps) {
  return warps * (16 * 32 * (12 + kDoraStages * tiles) +
                  2 * kDoraStages * static_cast<int>(sizeof(device::Arrivals)));
}

// Grid: a block for every 32 rows, a multiple of kCluster. kCluster 0, up to 8 kTiles ranks: the
// warps share the columns, each reads, multiplies and folds chunks of its own. kCluster 1, more
// ranks: each warp still reads its own chunks, but they pass through shared memory and every warp
// multiplies them by the ranks that are its own; warps left over (a power of two) halve the chunks
// between them. kCluster 2 and more: the same, with A fetched by so many blocks together; of a
// block past the last row all rows are zeros. kAParts: dora_parts of the problem. Ranks up to
// 8 kTiles kWarps.
template <typename W, int kAParts, int kTiles, int kWarps, int kCluster>
__global__ void __launch_bounds__(kWarps * 32, 1) dora_norm_mma_kernel(DoraNormProblem p) {
  constexpr bool kClustered = kCluster > 1;
  if (kClustered && !device::kHasClusters) return;  // the launcher knows
  constexpr int kWParts = Parts<W>::kCount;
  constexpr int kSumWords = 2 * kWarps * kDoraRows / 4;
  constexpr int kExchange = kWarps * 12 * 32;
  static_assert(kExchange > kSumWords);
  __shared__ Words4 fixed[kClustered ? 1 : kCluster == 1 ? kExchange : kSumWords];
  Words4* shared = kClustered ? device::dynamic_shared() : fixed;
  Words4(*slots)[32] = reinterpret_cast<Words4(*)[32]>(shared);

  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kDoraRows;
  const int rank_tiles = static_cast<int>(dora_rank_tiles(p.rank));
  const int64_t chunks = dora_ceil_div(p.k, kDoraChunk);
  const int64_t factor_chunks = dora_ceil_div(p.rank, kDoraChunk);
  const bool aligned = rows_aligned<W>(p.weight);
  const Words4* packed_a = static_cast<const Words4*>(p.scratch);
  const Words4* packed_gram = packed_a + dora_packed_words(p.k, p.rank, kAParts);

  float u[2][kTiles][4] = {};
  float cross[4] = {}, squares[4] = {};
  if constexpr (kCluster == 0) {
    RawFragment<W> next = load_rows<W>(p.weight, p.n, p.k, aligned, row0, warp, lane);
    int64_t chunk = warp;
    do {
      for (int i = 0; i < kDoraFold && chunk < chunks; ++i, chunk += kWarps) {
        const Fragment<kWParts> w = split_rows(next, squares);
        if (chunk + kWarps < chunks)
          next = load_rows<W>(p.weight, p.n, p.k, aligned, row0, chunk + kWarps, lane);
        multiply_chunk<kTiles, kWParts, kAParts>(u, w, packed_a, chunk, 0, rank_tiles, lane);
      }
      if (chunk >= chunks) {
        for (int64_t i = warp; i < factor_chunks; i += kWarps) {
          const Fragment<3> b = load_factor_rows(p, row0, i, lane);
          multiply_chunk<kTiles, 3, 3>(u, b, packed_gram, i, 0, rank_tiles, lane);
        }
      }
      fold(p, u, cross, row0, 0, lane);
    } while (chunk < chunks);
  } else {
    int groups = 1;
    while (groups * kTiles < rank_tiles) groups *= 2;
    const int first_tile = warp % groups * kTiles;
    const int first_slot = warp / groups, slot_step = kWarps / groups;
    // Each chunk of W, then of B, comes through a slot to these two.
    const auto run = [&](auto&& multiply_w, auto&& multiply_b) {
      RawFragment<W> next = load_rows<W>(p.weight, p.n, p.k, aligned, row0, warp, lane);
      int64_t stage = 0;
      do {
        for (int i = 0; i < kDoraFold && stage < chunks; i += kWarps, stage += kWarps) {
          // Past the last chunk `next` is zeros, which add nothing.
          put_fragment(slots + warp * 12, split_rows(next, squares), lane);
          next = load_rows<W>(p.weight, p.n, p.k, aligned, row0, stage + kWarps + warp, lane);
          __syncthreads();
          for (int slot = first_slot; slot < kWarps && stage + slot < chunks; slot += slot_step) {
            multiply_w(get_fragment<kWParts>(slots + slot * 12, lane), stage + slot);
          }
          __syncthreads();
        }
        if (stage >= chunks) {
          for (int64_t i = 0; i < factor_chunks; i += kWarps) {
            if (i + warp < factor_chunks) {
              put_fragment(slots + warp * 12, load_factor_rows(p, row0, i + warp, lane), lane);
            }
            __syncthreads();
            for (int slot = first_slot; slot < kWarps && i + slot < factor_chunks;
                 slot += slot_step) {
              multiply_b(get_fragment<3>(slots + slot * 12, lane), i + slot);
            }
            __syncthreads();
          }
        }
        fold(p, u, cross, row0, first_tile, lane);
      } while (stage < chunks);
    };
    if constexpr (!kClustered) {
      run(
          [&](const Fragment<kWParts>& w, int64_t chunk) {
            multiply_chunk<kTiles, kWParts, kAParts>(u, w, packed_a, chunk, first_tile, rank_tiles,
                                                     lane);
          },
          [&](const Fragment<3>& b, int64_t chunk) {
            multiply_chunk<kTiles, 3, 3>(u, b, packed_gram, chunk, first_tile, rank_tiles, lane);
          });
    } else {
      using Stream = FactorStream<kAParts, kTiles, kCluster>;
      Words4* stages = shared + kExchange;
      device::Arrivals* arrivals =
          reinterpret_cast<device::Arrivals*>(stages + kWarps * kDoraStages * Stream::kStageWords);
      device::Arrivals *full = arrivals + 2 * kDoraStages * warp, *free = full + kDoraStages;
      if (lane < kDoraStages) {
        device::start_arrivals(full + lane, 1);
        device::start_arrivals(free + lane, kCluster);
        device::publish_arrivals();
      }
      device::synchronize_cluster();
      const int after = rank_tiles - first_tile, tiles = after < kTiles ? after : kTiles;
      Stream stream(stages + warp * kDoraStages * Stream::kStageWords, full, free, packed_a,
                    packed_gram, first_tile, tiles, rank_tiles, static_cast<int>(chunks),
                    static_cast<int>(factor_chunks), first_slot, slot_step, lane);
      run([&](const Fragment<kWParts>& w,
              int64_t) { multiply_arriving<kWParts, kAParts>(u, w, stream, tiles, lane); },
          [&](const Fragment<3>& b, int64_t) {
            multiply_arriving<3, 3>(u, b, stream, tiles, lane);
          });
      device::synchronize_cluster();  // none ends before what others send it has come
    }
  }

  // The four lanes of a row, then the warps in order.
  LRK_UNROLL
  for (int m = 0; m < 4; ++m) {
    cross[m] += device::shuffle_xor(cross[m], 1);
    cross[m] += device::shuffle_xor(cross[m], 2);
    squares[m] += device::shuffle_xor(squares[m], 1);
    squares[m] += device::shuffle_xor(squares[m], 2);
  }
  uint32_t* sums = shared[0].word;
  if (lane % 4 == 0) {
    LRK_UNROLL
    for (int m = 0; m < 4; ++m) {
      const int row = lane / 4 + 8 * m;
      sums[warp * kDoraRows + row] = device::float_to_bits(cross[m]);
      sums[(kWarps + warp) * kDoraRows + row] = device::float_to_bits(squares[m]);
    }
  }
  __syncthreads();
  const int64_t row = row0 + tid;
  if (tid >= kDoraRows || row >= p.n) return;
  float total = 0.0f, square = 0.0f;
  for (int i = 0; i < kWarps; ++i) {
    total += device::bits_to_float(sums[i * kDoraRows + tid]);
    square += device::bits_to_float(sums[(kWarps + i) * kDoraRows + tid]);
  }
  if (p.weight_sq_norm.data) square = load_any(p.weight_sq_norm, row * p.weight_sq_norm.stride);
  write_norm(p, row, square, total);
}

// ---- second launch, FMA -------------------------------------------------------------------------

// Grid: a block for every 16 rows, a warp for every 4; the lanes share the columns, eight at a
// time. W is read once for each 16 ranks.
template <typename W>
__global__ void __launch_bounds__(kDoraFmaThreads, 3) dora_norm_fma_kernel(DoraNormProblem p) {
  constexpr int kRows = kDoraFmaRows, kRanks = kDoraFmaRanks;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int64_t row0 =
      (static_cast<int64_t>(blockIdx.x) * (kDoraFmaThreads / 32) + tid / 32) * kRows;
  const int64_t stride = dora_float_stride(p.k);
  const float* a = static_cast<const float*>(p.scratch);
  const float* gram = a + p.rank * stride;
  const W* weight = static_cast<const W*>(p.weight.data);
  const bool aligned = rows_aligned<W>(p.weight);
  float cross[kRows] = {}, squares[kRows] = {};
  for (int r0 = 0; r0 < p.rank; r0 += kRanks) {
    float u[kRows][kRanks] = {};
    for (int64_t col = lane * 8; col < p.k; col += 256) {
      float w[kRows][8];
      LRK_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const Eight<W> e =
            load_eight(weight + (row0 + m) * p.weight.stride, col, p.k, row0 + m < p.n, aligned);
        LRK_UNROLL
        for (int i = 0; i < 4; ++i) {
          pair_of(e, i, w[m][2 * i], w[m][2 * i + 1]);
          if (r0 == 0) {
            squares[m] += w[m][2 * i] * w[m][2 * i];
            squares[m] += w[m][2 * i + 1] * w[m][2 * i + 1];
          }
        }
      }
      LRK_UNROLL
      for (int r = 0; r < kRanks; ++r) {
        if (r0 + r < p.rank) {
          LRK_UNROLL
          for (int half = 0; half < 2; ++half) {
            const Words4 v = device::load_16_bytes(a + (r0 + r) * stride + col + 4 * half);
            LRK_UNROLL
            for (int j = 0; j < 4; ++j) {
              LRK_UNROLL
              for (int m = 0; m < kRows; ++m) {
                u[m][r] += w[m][4 * half + j] * device::bits_to_float(v.word[j]);
              }
            }
          }
        }
      }
    }
    LRK_UNROLL
    for (int m = 0; m < kRows; ++m) {
      if (row0 + m < p.n) {
        LRK_UNROLL
        for (int r = 0; r < kRanks; ++r) {
          if (r0 + r < p.rank) {
            cross[m] += u[m][r] * load_any(p.lora_b, (row0 + m) * p.lora_b.stride + r0 + r);
          }
        }
      }
    }
  }
  // (s / 2) B (A A^T) B^T, its terms shared by the lanes.
  for (int i = lane; i < p.rank * p.rank; i += 32) {
    LRK_UNROLL
    for (int m = 0; m < kRows; ++m) {
      if (row0 + m < p.n) {
        const int64_t base = (row0 + m) * p.lora_b.stride;
        cross[m] += 0.5f * p.scaling * gram[i] * load_any(p.lora_b, base + i / p.rank) *
                    load_any(p.lora_b, base + i % p.rank);
      }
    }
  }
  LRK_UNROLL
  for (int m = 0; m < kRows; ++m) {
    LRK_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      cross[m] += device::shuffle_xor(cross[m], mask);
      squares[m] += device::shuffle_xor(squares[m], mask);
    }
    const int64_t row = row0 + m;
    if (lane == 0 && row < p.n) {
      float square = squares[m];
      if (p.weight_sq_norm.data) {
        square = load_any(p.weight_sq_norm, row * p.weight_sq_norm.stride);
      }
      write_norm(p, row, square, cross[m]);
    }
  }
}

}  // namespace lrk
