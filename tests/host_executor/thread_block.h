// Runs CUDA device code on the host: one host thread for each CUDA thread of a block, blocks one
// after another. Include it before the device code; it supplies the names that nvcc would.
//
//   executor::launch(blocks, threads, [&] { kernel(arguments); });
//   executor::launch(blocks, threads, [&] { kernel(arguments); }, cluster, shared_bytes);
//
// The blocks of a cluster run together, each with dynamic shared memory of its own that starts as
// NaN. A bulk copy is done when it is asked for, earlier than a GPU promises: what reads without
// waiting for it, or writes over what another block still reads, is a race that ThreadSanitizer
// names.
//
// __syncthreads() is a barrier of the block. A warp exchange (shuffle, mma.sync) writes each
// lane's words to one of two slots in turn, waits at a barrier of the warp and reads: a lane that
// is two exchanges ahead cannot exist, so two slots are enough. __shared__ is static memory, which
// the threads of the one running block share, so ThreadSanitizer sees an exchange without a barrier
// as the data race that it is, and AddressSanitizer guards its ends.
//
// LRK_SKIP_BARRIER=n leaves out the n-th __syncthreads() of every block (from 0), LRK_SKIP_WAIT=n
// every wait for n arrivals: planted faults.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define LRK_DEVICE inline
#define LRK_UNROLL

namespace executor {

constexpr int kLanes = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// std::barrier with the least that orders threads: its sleepers pass through a pool shared by all
// barriers, which orders threads that did not meet, and so hides races from ThreadSanitizer.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void arrive_and_wait() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      for (int tries = 0; phase_.load(std::memory_order_acquire) == phase; ++tries) {
        if (tries < 16) {
          std::this_thread::yield();
        } else {
          std::this_thread::sleep_for(std::chrono::microseconds(20));
        }
      }
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

struct Warp {
  Barrier meet{kLanes};
  uint32_t slot[2][kLanes][6] = {};
};

struct Block {
  Block(int threads, size_t shared_bytes) : meet(threads), shared(new char[shared_bytes]) {
    for (int i = 0; i < threads; i += kLanes) warps.push_back(std::make_unique<Warp>());
    std::memset(shared.get(), 0xff, shared_bytes);
  }
  Barrier meet;  // __syncthreads
  std::unique_ptr<char[]> shared;
  std::vector<std::unique_ptr<Warp>> warps;
};

struct Cluster {
  explicit Cluster(int threads) : meet(threads), done(threads) {}
  Barrier meet;
  Barrier done;  // between clusters
  std::vector<std::unique_ptr<Block>> blocks;
  // The same place in the shared memory of another block.
  template <typename T>
  T* map(T* mine, int rank) const;
};

inline thread_local Index thread_index, block_index;
inline thread_local Block* block = nullptr;
inline thread_local Cluster* cluster = nullptr;
inline thread_local int cluster_rank = 0;
inline thread_local unsigned exchanges = 0, barriers = 0;

template <typename T>
T* Cluster::map(T* mine, int rank) const {
  char* other = blocks[static_cast<size_t>(rank)]->shared.get();
  return reinterpret_cast<T*>(other + (reinterpret_cast<char*>(mine) - block->shared.get()));
}

inline void synchronize() {
#if defined(LRK_SKIP_BARRIER)
  if (barriers++ == LRK_SKIP_BARRIER) return;
#endif
  block->meet.arrive_and_wait();
}

// Gives this lane's words to the warp; returns those of all lanes.
template <int kWords>
const uint32_t (*exchange(const uint32_t (&mine)[kWords]))[6] {
  static_assert(kWords <= 6);
  Warp& warp = *block->warps[thread_index.x / kLanes];
  auto& slot = warp.slot[exchanges++ % 2];
  for (int i = 0; i < kWords; ++i) slot[thread_index.x % kLanes][i] = mine[i];
  warp.meet.arrive_and_wait();
  return slot;
}

template <typename Kernel>
void launch(int64_t blocks, int threads, const Kernel& kernel, int cluster_blocks = 1,
            size_t shared_bytes = 0) {
  if (blocks % cluster_blocks != 0) std::abort();
  Cluster together(cluster_blocks * threads);
  for (int i = 0; i < cluster_blocks; ++i) {
    together.blocks.push_back(std::make_unique<Block>(threads, shared_bytes));
  }
  std::vector<std::thread> pool;
  for (int i = 0; i < cluster_blocks * threads; ++i) {
    pool.emplace_back([&, i] {
      thread_index.x = static_cast<unsigned>(i % threads);
      cluster = &together;
      cluster_rank = i / threads;
      block = together.blocks[static_cast<size_t>(cluster_rank)].get();
      exchanges = 0;
      for (int64_t b = cluster_rank; b < blocks; b += cluster_blocks) {
        block_index.x = static_cast<unsigned>(b);
        barriers = 0;
        kernel();
        together.done.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace executor

#define threadIdx (executor::thread_index)
#define blockIdx (executor::block_index)
#define __syncthreads() executor::synchronize()

namespace lrk {

struct Words4;

namespace device {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25)
                          : std::ldexp(static_cast<float>(mantissa), -24));
}

inline uint32_t round_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline uint32_t pack_bfloat16(float low, float high) {
  return round_bfloat16(high) << 16 | round_bfloat16(low);
}

inline float shuffle_xor(float value, int mask) {
  const uint32_t mine[1] = {float_to_bits(value)};
  const auto all = executor::exchange(mine);
  return bits_to_float(all[threadIdx.x % executor::kLanes ^ static_cast<unsigned>(mask)][0]);
}

inline float bfloat16_half(uint32_t word, int high) {
  return bits_to_float(high ? word & 0xffff0000u : word << 16);
}

// mma.sync.m16n8k16: lane l holds of A rows l / 4 (words 0, 2) and l / 4 + 8 (1, 3), columns
// 2 (l % 4) and the next (words 0, 1) and eight further (2, 3); of B the same rows of its columns
// l / 4; of D rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
inline void multiply_tile(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                          uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  const auto all = executor::exchange(mine);
  const int lane = static_cast<int>(threadIdx.x) % executor::kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, upper = k / 8;
      d[i] += bfloat16_half(all[lane / 4 * 4 + holder][2 * upper + row], k % 2) *
              bfloat16_half(all[column * 4 + holder][4 + upper], k % 2);
    }
  }
}

// ---- clusters -----------------------------------------------------------------------------------

constexpr bool kHasClusters = true;

// An mbarrier: what is left of a phase, arrivals in the upper half and bytes in the lower. Bytes
// may come before they are expected.
struct Arrivals {
  static constexpr int64_t kOne = int64_t{1} << 32;
  int count;
  std::atomic<int64_t> left;
  std::atomic<unsigned> phase{0};
  explicit Arrivals(int arrivals) : count(arrivals), left(arrivals * kOne) {}
  void take(int64_t what) {
    if (left.fetch_sub(what, std::memory_order_acq_rel) != what) return;
    left.store(count * kOne, std::memory_order_relaxed);
    phase.fetch_add(1, std::memory_order_release);
  }
};

inline Words4* dynamic_shared() { return reinterpret_cast<Words4*>(executor::block->shared.get()); }
inline void start_arrivals(Arrivals* arrivals, int count) { new (arrivals) Arrivals(count); }
inline void publish_arrivals() {}
inline void synchronize_cluster() { executor::cluster->meet.arrive_and_wait(); }
inline void synchronize_warp() {
  executor::block->warps[threadIdx.x / executor::kLanes]->meet.arrive_and_wait();
}
inline int cluster_rank() { return executor::cluster_rank; }
inline void expect(Arrivals* arrivals, int bytes) { arrivals->take(Arrivals::kOne - bytes); }
inline void arrive_at(Arrivals* arrivals, int rank) {
  executor::cluster->map(arrivals, rank)->take(Arrivals::kOne);
}
inline void wait(Arrivals* arrivals, int parity) {
#if defined(LRK_SKIP_WAIT)
  if (arrivals->count == LRK_SKIP_WAIT) return;
#endif
  while (static_cast<int>(arrivals->phase.load(std::memory_order_acquire) & 1) == parity) {
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}
template <typename Words = Words4>
void copy_to_cluster(Words* to, const Words* from, int bytes, Arrivals* arrivals, int blocks) {
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (misaligned(to) || misaligned(from) || bytes <= 0 || bytes % 16 != 0) std::abort();
  for (int rank = 0; rank < blocks; ++rank) {
    std::memcpy(static_cast<void*>(executor::cluster->map(to, rank)), from,
                static_cast<size_t>(bytes));
    executor::cluster->map(arrivals, rank)->take(bytes);
  }
}

// A misaligned one would fault on a GPU.
template <typename Words = Words4>
inline Words load_16_bytes(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) std::abort();
  Words words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}

}  // namespace device
}  // namespace lrk
