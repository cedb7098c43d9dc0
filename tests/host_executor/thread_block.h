// Runs CUDA device code on the host: one host thread for each CUDA thread of a block, blocks one
// after another. Include it before the device code; it supplies the names that nvcc would.
//
//   executor::launch(blocks, threads, [&] { kernel(arguments); });
//
// __syncthreads() is a barrier of the block. A warp exchange (shuffle, mma.sync) writes each
// lane's words to one of two slots in turn, waits at a barrier of the warp and reads: a lane that
// is two exchanges ahead cannot exist, so two slots are enough. __shared__ is static memory, which
// the threads of the one running block share, so ThreadSanitizer sees an exchange without a barrier
// as the data race that it is, and AddressSanitizer guards its ends.
//
// LRK_SKIP_BARRIER=n leaves out the n-th __syncthreads() of every block (from 0): a planted fault.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
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
  explicit Block(int threads) : meet(threads), done(threads) {
    for (int i = 0; i < threads; i += kLanes) warps.push_back(std::make_unique<Warp>());
  }
  Barrier meet;  // __syncthreads
  Barrier done;  // between blocks
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Index thread_index, block_index;
inline thread_local Block* block = nullptr;
inline thread_local unsigned exchanges = 0, barriers = 0;

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
void launch(int64_t blocks, int threads, const Kernel& kernel) {
  Block shared(threads);
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&, i] {
      thread_index.x = static_cast<unsigned>(i);
      block = &shared;
      exchanges = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        block_index.x = static_cast<unsigned>(b);
        barriers = 0;
        kernel();
        shared.done.arrive_and_wait();
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
