// The DoRA norm's device code on the host, against a float64 norm of the dense sum.
//
//   dora_norm_driver short|long|clusters|far|exchange|cluster|overrun
//
// Prints a line for each case and returns 1 when one is off. `far` has rows so far apart that the
// last one of each operand starts past element 2^31. `clusters` has those in which blocks fetch A
// together. `exchange` and `cluster` have a few in which warps pass W, blocks A to each other.
// `overrun` gives the kernel a weight that ends one element early: a planted fault for
// AddressSanitizer. All buffers have exactly the size that they should, and outputs and scratch
// start as NaN.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

// clang-format off: the executor supplies what the device code needs
#include "thread_block.h"
#include "dora_norm_kernel.cuh"
// clang-format on

namespace {

using lrk::Dtype;

struct Case {
  int64_t n, k, rank;
  Dtype weight, lora_a, lora_b;
  int64_t pad;  // elements between the rows of W
  bool squares_given;
  bool far = false;  // the last row of every operand starts past element 2^31
  bool clustered = false;
};

// NaN throughout; far apart rows are in address space of zeros, of which only what is touched costs
// memory.
std::shared_ptr<char> memory(size_t bytes, bool far) {
  if (!far) {
    std::shared_ptr<char> near(new char[bytes], std::default_delete<char[]>());
    std::memset(near.get(), 0xff, bytes);
    return near;
  }
  void* space = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) std::abort();
  return {static_cast<char*>(space), [bytes](char* data) { munmap(data, bytes); }};
}

uint16_t to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}

// A matrix of one of the three dtypes, and its values as the dtype holds them.
struct Operand {
  Operand(int64_t rows, int64_t cols, int64_t pad, Dtype type, float scale, std::mt19937& random,
          bool far, int64_t missing = 0)
      : stride(far ? lrk::dora_ceil_div(int64_t{1} << 31, rows - 1) / 8 * 8 + 8 : cols + pad),
        dtype(type),
        values(static_cast<size_t>(rows * cols)) {
    const size_t size = static_cast<size_t>(lrk::dtype_bytes(type));
    const size_t count = static_cast<size_t>((rows - 1) * stride + cols - missing);
    data = memory(count * size, far);
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const float drawn = normal(random);
        uint32_t bits = lrk::device::float_to_bits(drawn);
        double& value = values[static_cast<size_t>(i * cols + j)];
        value = drawn;
        if (type == Dtype::kBFloat16) {
          bits = lrk::device::round_bfloat16(drawn);
          value = lrk::device::bits_to_float(bits << 16);
        } else if (type == Dtype::kFloat16) {
          bits = to_half(drawn);
          value = lrk::device::half_to_float(static_cast<uint16_t>(bits));
        }
        const size_t at = static_cast<size_t>(i * stride + j);
        if (at < count) std::memcpy(data.get() + at * size, &bits, size);
      }
    }
  }
  lrk::DoraMatrix matrix() const { return {data.get(), dtype, stride}; }
  int64_t stride;
  Dtype dtype;
  std::shared_ptr<char> data;
  std::vector<double> values;
};

template <typename W, int kAParts>
void norm_by_tiles(const lrk::DoraNormProblem& p, bool clustered) {
  constexpr int kWarps = 2, kCluster = 2;  // 8 and 4 on a GPU; two make the same exchanges
  const int64_t blocks = lrk::dora_ceil_div(p.n, lrk::kDoraRows);
  if (clustered) {
    const int bytes = lrk::dora_cluster_bytes(8, kWarps);
    executor::launch(
        lrk::dora_ceil_div(blocks, kCluster) * kCluster, kWarps * 32,
        [&] { lrk::dora_norm_mma_kernel<W, kAParts, 8, kWarps, kCluster>(p); }, kCluster,
        static_cast<size_t>(bytes));
    return;
  }
  executor::launch(blocks, kWarps * 32, [&] {
    if (p.rank <= 16) {
      lrk::dora_norm_mma_kernel<W, kAParts, 2, kWarps, 0>(p);
    } else if (p.rank <= 64) {
      lrk::dora_norm_mma_kernel<W, kAParts, 8, kWarps, 0>(p);
    } else {
      lrk::dora_norm_mma_kernel<W, kAParts, 8, kWarps, 1>(p);
    }
  });
}

template <typename W>
void norm(const lrk::DoraNormProblem& p, bool mma, bool clustered) {
  if (mma) return norm_by_tiles<W, 3>(p, clustered);
  const int64_t rows = lrk::kDoraFmaThreads / 32 * lrk::kDoraFmaRows;
  executor::launch(lrk::dora_ceil_div(p.n, rows), lrk::kDoraFmaThreads,
                   [&] { lrk::dora_norm_fma_kernel<W>(p); });
}

template <typename A>
void prepare(const lrk::DoraNormProblem& p, bool mma) {
  constexpr int kThreads = 64;  // 256 on a GPU
  executor::launch(lrk::dora_prepare_blocks(p.k, p.rank, mma, kThreads), kThreads, [&] {
    if (lrk::dora_gram_by_tiles(p.rank, mma)) {
      lrk::dora_prepare_kernel<A, true, kThreads>(p, mma);
    } else {
      lrk::dora_prepare_kernel<A, false, kThreads>(p, mma);
    }
  });
}

bool run(const Case& c, int64_t missing) {
  std::mt19937 random(static_cast<unsigned>(c.n * 1000003 + c.k * 1009 + c.rank));
  const Operand w(c.n, c.k, c.pad, c.weight, 1.0f, random, c.far, missing);
  const Operand a(c.rank, c.k, 1, c.lora_a, 1.0f, random, c.far);
  const Operand b(c.n, c.rank, 2, c.lora_b, 1.0f / std::sqrt(static_cast<float>(c.rank)), random,
                  c.far);
  const Operand magnitude(c.n, 1, 0, Dtype::kBFloat16, 1.0f, random, c.far);
  const size_t n = static_cast<size_t>(c.n);
  std::vector<float> given(n), norms(n, NAN), squares(n, NAN), scales(n, NAN);
  lrk::DoraNormProblem p{};
  p.weight = w.matrix();
  p.lora_a = a.matrix();
  p.lora_b = b.matrix();
  p.magnitude = magnitude.matrix();
  p.n = c.n;
  p.k = c.k;
  p.rank = static_cast<int>(c.rank);
  p.scaling = 0.75f;
  p.norm = norms.data();
  p.sq_norm = squares.data();
  p.column_scale = scales.data();
  const size_t bytes = static_cast<size_t>(lrk::dora_norm_scratch_bytes(c.k, c.rank));
  const std::shared_ptr<char> scratch = memory(bytes, false);
  p.scratch = scratch.get();

  std::vector<double> exact(n), terms(n);
  for (int64_t i = 0; i < c.n; ++i) {
    double square = 0, own = 0, others = 0;
    for (int64_t k = 0; k < c.k; ++k) {
      double v = w.values[static_cast<size_t>(i * c.k + k)];
      own += v * v;
      for (int64_t r = 0; r < c.rank; ++r) {
        v += p.scaling * b.values[static_cast<size_t>(i * c.rank + r)] *
             a.values[static_cast<size_t>(r * c.k + k)];
      }
      square += v * v;
    }
    for (int64_t r = 0; r < c.rank; ++r) {
      double length = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        length += std::pow(a.values[static_cast<size_t>(r * c.k + k)], 2);
      }
      others += std::abs(b.values[static_cast<size_t>(i * c.rank + r)]) * std::sqrt(length);
    }
    exact[static_cast<size_t>(i)] = std::sqrt(square);
    terms[static_cast<size_t>(i)] = std::sqrt(own) + p.scaling * others;
    given[static_cast<size_t>(i)] = static_cast<float>(own);
  }
  if (c.squares_given) p.weight_sq_norm = {given.data(), Dtype::kFloat32, 1};

  const bool mma = c.rank >= 16;
  if (c.lora_a == Dtype::kFloat32) prepare<float>(p, mma);
  if (c.lora_a == Dtype::kBFloat16) prepare<lrk::Bfloat16Bits>(p, mma);
  if (c.lora_a == Dtype::kFloat16) prepare<lrk::HalfBits>(p, mma);
  const auto second_launch = [&](bool clustered) {
    if (mma && lrk::dora_parts(c.weight, c.lora_a) == 1) {
      norm_by_tiles<lrk::Bfloat16Bits, 1>(p, clustered);
    } else if (c.weight == Dtype::kFloat32) {
      norm<float>(p, mma, clustered);
    } else if (c.weight == Dtype::kBFloat16) {
      norm<lrk::Bfloat16Bits>(p, mma, clustered);
    } else {
      norm<lrk::HalfBits>(p, mma, clustered);
    }
  };
  second_launch(c.clustered);
  if (c.clustered && c.rank > 64) {  // the same bits as without clusters
    const std::vector<float> together = norms;
    second_launch(false);
    if (together != norms) {
      std::printf("clusters give other bits\n");
      return false;
    }
  }

  double worst = 0;
  for (size_t i = 0; i < n; ++i) {
    // 2e-5 of the norm; where the terms cancel, what rounding each to float32 leaves of them.
    const double allowed =
        std::max(2e-5 * exact[i], std::ldexp(terms[i] * terms[i], -21) / exact[i]);
    double error = std::abs(norms[i] - exact[i]) / allowed;
    error = std::max(error, std::abs(squares[i] / given[i] - 1.0) / 2e-6);
    error = std::max(error, std::abs(scales[i] * norms[i] / magnitude.values[i] - 1.0) / 1e-6);
    worst = error <= worst ? worst : error;  // a NaN stays
  }
  const bool good = worst <= 1.0;
  std::printf("N %3d K %4d R %3d dtypes %d%d%d pad %d: %.3g of the allowed error%s\n",
              static_cast<int>(c.n), static_cast<int>(c.k), static_cast<int>(c.rank),
              static_cast<int>(c.weight), static_cast<int>(c.lora_a), static_cast<int>(c.lora_b),
              static_cast<int>(c.pad), worst, good ? "" : " WRONG");
  std::fflush(stdout);
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  constexpr Dtype kF32 = Dtype::kFloat32, kBF16 = Dtype::kBFloat16, kF16 = Dtype::kFloat16;
  const std::string mode = argc > 1 ? argv[1] : "long";
  std::vector<Case> cases = {
      {19, 70, 1, kBF16, kF32, kF32, 0, false},    {19, 264, 7, kF32, kF32, kBF16, 8, true},
      {35, 75, 16, kF32, kF32, kF32, 3, false},    {34, 72, 16, kBF16, kBF16, kBF16, 0, true},
      {9, 45, 33, kF16, kF16, kF32, 0, false},     {9, 40, 64, kBF16, kF32, kF16, 0, false},
      {33, 101, 65, kBF16, kBF16, kF32, 1, false},
  };
  if (mode == "long") {
    cases.insert(cases.end(), {
                                  {3, 1, 16, kF32, kF32, kF32, 0, false},
                                  {17, 33, 7, kF16, kBF16, kF16, 0, false},
                                  {33, 1100, 16, kBF16, kF32, kF32, 4, false},
                                  {5, 1100, 16, kF32, kBF16, kF32, 0, false},
                                  {40, 64, 17, kF32, kF32, kF32, 0, false},
                                  {11, 96, 64, kF32, kF32, kF32, 0, false},
                                  {11, 603, 100, kBF16, kF32, kF32, 0, false},
                                  {5, 1100, 66, kF32, kF32, kF32, 0, false},
                                  {11, 70, 128, kF16, kF32, kF32, 0, false},
                                  {8, 40, 40, kBF16, kBF16, kBF16, 0, false},
                              });
  }
  if (mode == "clusters") {
    cases = {
        {33, 101, 65, kBF16, kBF16, kF32, 1, false},  // one part
        {70, 600, 100, kBF16, kF32, kF32, 0, false},  // three, in many pieces
        {35, 79, 128, kF16, kBF16, kF16, 3, true},    {11, 1, 65, kF32, kF32, kF32, 0, false},
        {40, 330, 40, kBF16, kBF16, kBF16, 0, false},  // two warps share the chunks
        {5, 330, 64, kF32, kBF16, kF32, 0, false},
    };
  }
  if (mode == "cluster") {
    cases = {{33, 101, 65, kBF16, kBF16, kF32, 1, false}, {9, 70, 40, kBF16, kF32, kF32, 0, false}};
  }
  for (Case& c : cases) c.clustered = mode.rfind("cluster", 0) == 0;
  if (mode == "far") {
    cases = {
        {5, 45, 7, kF32, kBF16, kF32, 0, false, true},  // by FMA
        {5, 45, 16, kBF16, kF32, kF16, 0, false, true},
        {5, 45, 65, kF16, kBF16, kF32, 0, true, true},
    };
  }
  if (mode == "overrun") return run(cases[2], 1) ? 0 : 1;
  if (mode == "exchange") return run(cases[6], 0) ? 0 : 1;
  bool good = true;
  for (const Case& c : cases) good = run(c, 0) && good;
  return good ? 0 : 1;
}
