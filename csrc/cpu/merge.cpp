#include "merge.h"

#include <algorithm>
#include <cstring>

#include "../philox.h"
#include "scratch.h"

#define LRK_ISA merge_plain
#define LRK_TARGET
#include "merge_rows.inl"
#if defined(__x86_64__)
#  define LRK_ISA merge_avx2
#  define LRK_TARGET __attribute__((target("avx2,fma")))
#  include "merge_rows.inl"
#  define LRK_ISA merge_avx512
#  define LRK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#  include "merge_rows.inl"
#endif

namespace lrk {
namespace {

constexpr int64_t kRowBlock = 32;    // rows of W in one block product
constexpr int64_t kColumns = 512;    // columns of W in one task: their slice of A is packed once
constexpr int64_t kTaskRows = 512;   // rows of W in one task, at most
constexpr int64_t kTasks = 8;        // tasks that there are, at least, in a weight of many rows
constexpr int64_t kDepthBlock = 64;  // short float32 sums, added up, lose fewer digits than a long
constexpr int64_t kParallelWork = int64_t{1} << 16;  // elements of W worth a second thread

struct RowPasses {
  void (*combine)(float*, const float*, int64_t, float, float, float);
  void (*round_stochastically)(float*, int64_t, uint32_t, uint32_t, uint32_t, int64_t);
};

// In the instruction set of the table, so that LRK_CPU_ISA holds here too.
RowPasses row_passes(const KernelTable& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx2")) {
    return {merge_avx2::combine, merge_avx2::round_stochastically};
  }
  if (!std::strcmp(kernels.name, "avx512") || !std::strcmp(kernels.name, "amx")) {
    return {merge_avx512::combine, merge_avx512::round_stochastically};
  }
#endif
  (void)kernels;
  return {merge_plain::combine, merge_plain::round_stochastically};
}

}  // namespace

void merge_rows(const Runtime& runtime, const Matrix& weight, const Matrix& lora_a,
                const Matrix& lora_b, float scale, const float* before, const float* after,
                const StochasticRounding* rounding) {
  if (weight.rows == 0 || weight.cols == 0) return;
  const KernelTable& kernels = runtime.kernels;
  const RowPasses passes = row_passes(kernels);
  const bool plain = !before && !after && !rounding;
  const int64_t rank = lora_a.rows, slices = ceil_div(weight.cols, kColumns);
  const int64_t task_rows =
      std::min(kTaskRows, round_up(ceil_div(weight.rows * slices, kTasks), kRowBlock));
  const auto body = [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t a_at = layout.add<float>(rank * kColumns);
    const size_t b_at = layout.add<float>(kRowBlock * rank);
    const size_t c_at = layout.add<float>(kRowBlock * kColumns);
    const size_t w_at = layout.add<float>(plain ? 0 : kRowBlock * kColumns);
    TaskScratch scratch(layout.bytes());
    float* a = at<float>(scratch.base(), a_at);
    float* b = at<float>(scratch.base(), b_at);
    float* c = at<float>(scratch.base(), c_at);
    float* w = at<float>(scratch.base(), w_at);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / slices * task_rows, col = task % slices * kColumns;
      const int64_t cols = std::min(kColumns, weight.cols - col);
      stage_panels(kernels, a, rank * kPanel, {lora_a, 0, col, rank, cols});
      for (int64_t row = first; row < std::min(first + task_rows, weight.rows); row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, weight.rows - row);
        kernels.stage_float(b, rank, rectangle(lora_b, row, 0, rows, rank));
        for (int64_t r = 0; r < rank; r += kDepthBlock) {
          kernels.multiply_float({rows, ceil_div(cols, kPanel), std::min(kDepthBlock, rank - r),
                                  b + r, rank, a + r * kPanel, kPanel, rank * kPanel, c, kColumns,
                                  r > 0});
        }
        const Matrix target = part(weight, row, col, rows, cols);
        if (plain) {
          kernels.add(target.data, target.dtype, target.stride, c, kColumns, rows, cols, scale,
                      nullptr, row, col);
          continue;
        }
        kernels.stage_float(w, kColumns, rectangle(weight, row, col, rows, cols));
        for (int64_t i = 0; i < rows; ++i) {
          passes.combine(c + i * kColumns, w + i * kColumns, cols, scale,
                         before ? before[row + i] : 1.0f, after ? after[row + i] : 1.0f);
          if (rounding) {
            passes.round_stochastically(c + i * kColumns, cols, rounding->key0, rounding->key1,
                                        static_cast<uint32_t>(row + i), col);
          }
        }
        kernels.store(target.data, target.dtype, target.stride, c, kColumns, rows, cols, 1.0f);
      }
    }
  };
  run(runtime, ceil_div(weight.rows, task_rows) * slices,
      weight.rows * weight.cols >= kParallelWork, body);
}

}  // namespace lrk
