// Sixteen tokens are turned so that they lie beside each other: a value of the sparse matrix then
// multiplies registers, wherever its column is.
#include "svft.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

#define LRK_ISA svft_plain
#define LRK_TARGET
#define LRK_W 4
#include "svft_rows.inl"
#if defined(__x86_64__)
#  define LRK_ISA svft_avx2
#  define LRK_TARGET __attribute__((target("avx2,fma")))
#  define LRK_W 8
#  include "svft_rows.inl"
#  define LRK_ISA svft_avx512
#  define LRK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#  define LRK_W 16
#  include "svft_rows.inl"
#endif

namespace lrk {
namespace {

constexpr int64_t kTokens = kPanel;
constexpr int64_t kSumTokens = 16 * kTokens;         // in one part of a gradient's sum
constexpr int64_t kParallelWork = int64_t{1} << 17;  // elements and products worth a second thread

struct Passes {
  void (*multiply)(float*, const float*, const SparseLines&, int64_t);
  void (*grad)(float*, const float*, const float*, const int32_t*, const int32_t*, int64_t);
};

// In the instruction set of the table, so that LRK_CPU_ISA holds here too.
Passes passes_of(const KernelTable& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx2")) return {svft_avx2::multiply, svft_avx2::grad};
  if (!std::strcmp(kernels.name, "avx512") || !std::strcmp(kernels.name, "amx")) {
    return {svft_avx512::multiply, svft_avx512::grad};
  }
#endif
  (void)kernels;
  return {svft_plain::multiply, svft_plain::grad};
}

// (cols, 16) of the tokens from `row`, zeros where there are fewer. `staged` holds as many floats.
void turn(const KernelTable& kernels, float* turned, float* staged, const Matrix& m, int64_t row) {
  const int64_t rows = std::min(kTokens, m.rows - row);
  const float* from = static_cast<const float*>(element(m, row, 0));
  int64_t stride = m.stride;
  if (m.dtype != Dtype::kFloat32) {
    kernels.stage_float(staged, m.cols, rectangle(m, row, 0, rows, m.cols));
    from = staged;
    stride = m.cols;
  }
  if (rows < kTokens) std::fill_n(turned, m.cols * kTokens, 0.0f);
  kernels.transpose(reinterpret_cast<uint32_t*>(turned), kTokens,
                    reinterpret_cast<const uint32_t*>(from), stride, rows, m.cols);
}

}  // namespace

void svft_multiply(const Runtime& runtime, const Matrix& out, const Matrix& in,
                   const SparseLines& lines) {
  const KernelTable& kernels = runtime.kernels;
  const Passes passes = passes_of(kernels);
  const auto body = [&](int64_t begin, int64_t end) {
    const int64_t most = std::max(in.cols, out.cols) * kTokens;
    Layout layout;
    const size_t staged_at = layout.add<float>(most);
    const size_t in_at = layout.add<float>(in.cols * kTokens);
    const size_t out_at = layout.add<float>(out.cols * kTokens);
    TaskScratch scratch(layout.bytes());
    float* staged = at<float>(scratch.base(), staged_at);
    float* turned = at<float>(scratch.base(), in_at);
    float* sums = at<float>(scratch.base(), out_at);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * kTokens, rows = std::min(kTokens, in.rows - row);
      turn(kernels, turned, staged, in, row);
      passes.multiply(sums, turned, lines, out.cols);
      kernels.transpose(reinterpret_cast<uint32_t*>(staged), out.cols,
                        reinterpret_cast<const uint32_t*>(sums), kTokens, out.cols, kTokens);
      kernels.store(mutable_element(out, row, 0), out.dtype, out.stride, staged, out.cols, rows,
                    out.cols, 1.0f);
    }
  };
  const int64_t work = in.rows * (in.cols + out.cols + lines.starts[out.cols]);
  run(runtime, ceil_div(in.rows, kTokens), work >= kParallelWork, body);
}

void svft_grad(const Runtime& runtime, float* out, const Matrix& grad, const Matrix& t,
               const int32_t* row, const int32_t* column, int64_t count) {
  const KernelTable& kernels = runtime.kernels;
  const Passes passes = passes_of(kernels);
  const int64_t parts = ceil_div(t.rows, kSumTokens);
  Layout shared;
  const size_t sums_at = shared.add<float>(parts * count);
  CallScratch call(shared.bytes());
  float* sums = at<float>(call.base(), sums_at);
  const auto body = [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t staged_at = layout.add<float>(std::max(grad.cols, t.cols) * kTokens);
    const size_t grad_at = layout.add<float>(grad.cols * kTokens);
    const size_t t_at = layout.add<float>(t.cols * kTokens);
    TaskScratch scratch(layout.bytes());
    float* staged = at<float>(scratch.base(), staged_at);
    float* turned_grad = at<float>(scratch.base(), grad_at);
    float* turned_t = at<float>(scratch.base(), t_at);
    for (int64_t part = begin; part < end; ++part) {
      float* own = sums + part * count;
      std::fill_n(own, count, 0.0f);
      const int64_t last = std::min(t.rows, (part + 1) * kSumTokens);
      for (int64_t m = part * kSumTokens; m < last; m += kTokens) {
        turn(kernels, turned_grad, staged, grad, m);
        turn(kernels, turned_t, staged, t, m);
        passes.grad(own, turned_grad, turned_t, row, column, count);
      }
    }
  };
  run(runtime, parts, t.rows * (grad.cols + t.cols + count) >= kParallelWork, body);
  std::fill_n(out, count, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t e = 0; e < count; ++e) out[e] += sums[part * count + e];
  }
}

}  // namespace lrk
