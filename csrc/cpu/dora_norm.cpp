#include "dora_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "scratch.h"

#define LRK_ISA squares_plain
#define LRK_TARGET
#define LRK_W 4
#include "square_sums.inl"
#if defined(__x86_64__)
#  define LRK_ISA squares_avx2
#  define LRK_TARGET __attribute__((target("avx2,fma")))
#  define LRK_W 8
#  include "square_sums.inl"
#  define LRK_ISA squares_avx512
#  define LRK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#  define LRK_W 16
#  include "square_sums.inl"
#endif

namespace lrk {
namespace {

constexpr int64_t kRowBlock = 32;                    // rows of W in one block product
constexpr int64_t kDepthBlock = 256;                 // float32 reduction slice: 32 KiB of rows
constexpr int64_t kTileDepthBlock = 512;             // bfloat16 reduction slice, the same 32 KiB
constexpr int64_t kGramRows = 8;                     // rows of A A^T in one task
constexpr int64_t kPackDepth = 512;                  // depth of one packing task
constexpr int64_t kTileDepth = 32;                   // bfloat16 elements in a tile row
constexpr int64_t kParallelWork = int64_t{1} << 19;  // multiply-adds worth a second thread

struct SquareSums {
  float (*of_float)(const float*, int64_t);
  float (*of_bfloat16)(const uint16_t*, int64_t);
};

// In the instruction set of the table, so that LRK_CPU_ISA holds here too.
SquareSums square_sums(const KernelTable& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx2")) {
    return {squares_avx2::squares_float, squares_avx2::squares_bfloat16};
  }
  if (!std::strcmp(kernels.name, "avx512") || !std::strcmp(kernels.name, "amx")) {
    return {squares_avx512::squares_float, squares_avx512::squares_bfloat16};
  }
#endif
  (void)kernels;
  return {squares_plain::squares_float, squares_plain::squares_bfloat16};
}

float from_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// bfloat16 parts, each the rounded rest of the ones before, whose sum is a value of this dtype.
int64_t bfloat16_parts(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? 1 : (dtype == Dtype::kFloat16 ? 2 : 3);
}

// Columns [k0, k1) of A as float32 panels (depth, rank); `rows` holds 16 x kPackDepth floats.
void pack_float(const KernelTable& kernels, float* dst, int64_t padded, const Matrix& a, int64_t k0,
                int64_t k1, float* rows) {
  for (int64_t r = 0; r < a.rows; r += kPanel) {
    const int64_t count = std::min(kPanel, a.rows - r);
    kernels.stage_float(rows, kPackDepth, rectangle(a, r, k0, count, k1 - k0));
    std::memset(rows + count * kPackDepth, 0,
                static_cast<size_t>((kPanel - count) * kPackDepth) * sizeof(float));
    kernels.transpose(reinterpret_cast<uint32_t*>(dst + r * padded + k0 * kPanel), kPanel,
                      reinterpret_cast<uint32_t*>(rows), kPackDepth, kPanel, k1 - k0);
  }
}

// The same as bfloat16 panels, the panels of one part after those of the part before; `narrow`
// holds 16 x kPackDepth elements.
void pack_bfloat16(const KernelTable& kernels, uint16_t* dst, int64_t padded, const Matrix& a,
                   int64_t parts, int64_t k0, int64_t k1, float* rows, uint16_t* narrow) {
  const int64_t live = std::min(k1, a.cols) - k0, panels = ceil_div(a.rows, kPanel);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t count = std::min(kPanel, a.rows - panel * kPanel);
    kernels.stage_float(rows, kPackDepth, rectangle(a, panel * kPanel, k0, count, live));
    std::memset(narrow, 0, static_cast<size_t>(kPanel * kPackDepth) * sizeof(uint16_t));
    for (int64_t part = 0; part < parts; ++part) {
      kernels.stage_bfloat16(
          narrow, kPackDepth,
          {rows, Dtype::kFloat32, kPackDepth, count, live, live, nullptr, 0, 0, nullptr});
      kernels.transpose(reinterpret_cast<uint32_t*>(
                            dst + (part * panels + panel) * padded * kPanel + k0 * kPanel),
                        kPanel, reinterpret_cast<uint32_t*>(narrow), kPackDepth / 2, kPanel,
                        (k1 - k0) / 2);
      if (part + 1 == parts) break;
      for (int64_t i = 0; i < count; ++i) {
        float* row = rows + i * kPackDepth;
        const uint16_t* taken = narrow + i * kPackDepth;
        for (int64_t k = 0; k < live; ++k) row[k] -= from_bfloat16(taken[k]);
      }
    }
  }
}

// C (rows, 16 * panels) = X[row0 : row0 + rows] times float32 panels; `staged` holds kRowBlock x
// kDepthBlock floats. With `squares`, adds each row's sum of squares there.
void multiply_float(const KernelTable& kernels, const SquareSums& sums, const Matrix& x,
                    int64_t row0, int64_t rows, const float* panels, int64_t panel_count,
                    int64_t g_stride, int64_t panel_stride, float* c, float* staged,
                    double* squares) {
  for (int64_t k0 = 0; k0 < x.cols; k0 += kDepthBlock) {
    const int64_t depth = std::min(kDepthBlock, x.cols - k0);
    const float* l = static_cast<const float*>(element(x, row0, k0));
    int64_t stride = x.stride;
    if (x.dtype != Dtype::kFloat32) {
      kernels.stage_float(staged, kDepthBlock, rectangle(x, row0, k0, rows, depth));
      l = staged;
      stride = kDepthBlock;
    }
    kernels.multiply_float({rows, panel_count, depth, l, stride, panels + k0 * g_stride, g_stride,
                            panel_stride, c, panel_count * kPanel, k0 > 0});
    if (squares) {
      for (int64_t i = 0; i < rows; ++i) squares[i] += sums.of_float(l + i * stride, depth);
    }
  }
}

// The same of a bfloat16 X and bfloat16 panels, by tiles; `staged` holds kRowBlock x kTileDepth.
void multiply_bfloat16(const KernelTable& kernels, const SquareSums& sums, const Matrix& x,
                       int64_t row0, int64_t rows, const uint16_t* panels, int64_t panel_count,
                       int64_t padded, float* c, uint16_t* staged, double* squares,
                       uint32_t* tile_shape) {
  const int64_t whole = x.cols / kTileDepth * kTileDepth;
  for (int64_t k0 = 0; k0 < x.cols;) {
    const uint16_t* l = static_cast<const uint16_t*>(element(x, row0, k0));
    const int64_t slice = squares ? kTileDepthBlock : x.cols;
    const int64_t live = std::min(slice, (k0 < whole ? whole : x.cols) - k0);
    int64_t stride = x.stride, depth = live;
    if (k0 == whole) {  // past the end of a row lies the next one: a padded copy
      depth = std::min(kTileDepth, padded);
      Source s = rectangle(x, row0, k0, rows, live);
      s.padded_cols = depth;
      kernels.stage_bfloat16(staged, kTileDepth, s);
    }
    const bool tail = k0 == whole;
    kernels.multiply_bfloat16(
        {rows, panel_count, depth, tail ? staged : l, tail ? kTileDepth : stride,
         panels + k0 * kPanel, kPanel, padded * kPanel, c, panel_count * kPanel, k0 > 0},
        tile_shape);
    if (squares) {
      for (int64_t i = 0; i < rows; ++i) squares[i] += sums.of_bfloat16(l + i * stride, live);
    }
    k0 += live;
  }
}

typedef double Double4 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));

// sum_r b_r (2 s sum_parts u_r + s^2 v_r), in float64; all rows have zeros up to a multiple of 16.
double correction(const float* b, const float* u, int64_t parts, const float* v, int64_t width,
                  double scaling) {
  const double twice = 2.0 * scaling, square = scaling * scaling;
  Double4 total[2] = {};
  for (int64_t r = 0; r < width; r += 8) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = r + 4 * half;
      Float4 bits;
      Double4 sum = {};
      for (int64_t part = parts - 1; part >= 0; --part) {
        std::memcpy(&bits, u + part * width + at, sizeof(bits));
        sum += __builtin_convertvector(bits, Double4);
      }
      std::memcpy(&bits, v + at, sizeof(bits));
      sum = sum * twice + __builtin_convertvector(bits, Double4) * square;
      std::memcpy(&bits, b + at, sizeof(bits));
      total[half] += __builtin_convertvector(bits, Double4) * sum;
    }
  }
  const Double4 both = total[0] + total[1];
  return (both[0] + both[1]) + (both[2] + both[3]);
}

}  // namespace

void dora_norm(const Runtime& runtime, const Matrix& weight, const Matrix& lora_a,
               const Matrix& lora_b, double scaling, const float* weight_sq_norm,
               const float* magnitude, float* norm, float* sq_norm, float* column_scale) {
  const KernelTable& kernels = runtime.kernels;
  const SquareSums sums = square_sums(kernels);
  const int64_t n = weight.rows, k = weight.cols, rank = lora_a.rows;
  const int64_t panels = ceil_div(rank, kPanel), width = panels * kPanel;
  const bool tiles = weight.dtype == Dtype::kBFloat16 && kernels.multiply_bfloat16;
  const int64_t parts = tiles ? bfloat16_parts(lora_a.dtype) : 1;
  const int64_t padded = k < kTileDepth ? round_up(k, 2) : round_up(k, kTileDepth);
  if (n == 0) return;

  Layout layout;
  const size_t panels_at = layout.add<float>(width * padded);
  const size_t tiles_at = layout.add<uint16_t>(tiles ? parts * width * padded : 0);
  const size_t gram_at = layout.add<float>(width * width);
  CallScratch shared(layout.bytes());
  float* a_panels = at<float>(shared.base(), panels_at);
  uint16_t* a_tiles = at<uint16_t>(shared.base(), tiles_at);
  float* gram = at<float>(shared.base(), gram_at);  // row-major, rows of `width`

  run(runtime, ceil_div(padded, kPackDepth), width * padded > (int64_t{1} << 16),
      [&](int64_t begin, int64_t end) {
        Layout own;
        const size_t rows_at = own.add<float>(kPanel * kPackDepth);
        const size_t narrow_at = own.add<uint16_t>(kPanel * kPackDepth);
        TaskScratch scratch(own.bytes());
        float* rows = at<float>(scratch.base(), rows_at);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t k0 = task * kPackDepth, k1 = std::min(k0 + kPackDepth, padded);
          pack_float(kernels, a_panels, padded, lora_a, k0, std::min(k1, k), rows);
          if (tiles) {
            pack_bfloat16(kernels, a_tiles, padded, lora_a, parts, k0, k1, rows,
                          at<uint16_t>(scratch.base(), narrow_at));
          }
        }
      });

  run(runtime, ceil_div(rank, kGramRows), rank * width * k > kParallelWork,
      [&](int64_t begin, int64_t end) {
        TaskScratch scratch(static_cast<size_t>(kRowBlock * kDepthBlock) * sizeof(float));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task * kGramRows, rows = std::min(kGramRows, rank - row);
          multiply_float(kernels, sums, lora_a, row, rows, a_panels, panels, kPanel,
                         padded * kPanel, gram + row * width, static_cast<float*>(scratch.base()),
                         nullptr);
        }
      });

  run(runtime, ceil_div(n, kRowBlock), n * k * width > kParallelWork,
      [&](int64_t begin, int64_t end) {
        Layout own;
        const size_t u_at = own.add<float>(kRowBlock * parts * width);
        const size_t v_at = own.add<float>(kRowBlock * width);
        const size_t b_at = own.add<float>(kRowBlock * width);
        const size_t staged_at = own.add<float>(kRowBlock * kDepthBlock);
        TaskScratch scratch(own.bytes());
        float* u = at<float>(scratch.base(), u_at);
        float* v = at<float>(scratch.base(), v_at);
        float* b = at<float>(scratch.base(), b_at);
        void* staged = at<void>(scratch.base(), staged_at);
        uint32_t tile_shape = 0;
        for (int64_t block = begin; block < end; ++block) {
          const int64_t row = block * kRowBlock, rows = std::min(kRowBlock, n - row);
          double squares[kRowBlock] = {};
          double* to_sum = weight_sq_norm ? nullptr : squares;
          if (tiles) {
            multiply_bfloat16(kernels, sums, weight, row, rows, a_tiles, parts * panels, padded, u,
                              static_cast<uint16_t*>(staged), to_sum, &tile_shape);
          } else {
            multiply_float(kernels, sums, weight, row, rows, a_panels, panels, kPanel,
                           padded * kPanel, u, static_cast<float*>(staged), to_sum);
          }
          Source s = rectangle(lora_b, row, 0, rows, rank);
          s.padded_cols = width;
          kernels.stage_float(b, width, s);
          kernels.multiply_float(
              {rows, panels, rank, b, width, gram, width, kPanel, v, width, false});
          for (int64_t i = 0; i < rows; ++i) {
            const double square = weight_sq_norm ? weight_sq_norm[row + i] : squares[i];
            // A sum that cancelled below zero is a zero norm; a NaN is not below zero and stays.
            const double total = square + correction(b + i * width, u + i * parts * width, parts,
                                                     v + i * width, width, scaling);
            const float root = static_cast<float>(std::sqrt(total < 0.0 ? 0.0 : total));
            norm[row + i] = root;
            sq_norm[row + i] = static_cast<float>(square);
            if (magnitude) column_scale[row + i] = root == 0.0f ? 0.0f : magnitude[row + i] / root;
          }
        }
        if (tile_shape) kernels.release();
      });
}

}  // namespace lrk
