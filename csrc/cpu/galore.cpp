// A task makes the projection of a slice of W's long side, steps its moments, and writes the slice
// of W. Only what is as thin as the rank is ever written elsewhere.
#include "galore.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace lrk {
namespace {

// What becomes of a product: C = it, C += it, or C = keep C - it.
enum class Into { kStore, kAdd, kWeight };

// A rectangle of memory that is read next. Hardware follows few rows at a time, so it is asked for
// while the product before it is made.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0, rows = 0, width = 0;  // in bytes, but for the rows
};

// C (rows, 16 panels) from L (rows, depth), rows `l_stride` apart, and panels of 16 columns.
struct ThinProduct {
  int64_t rows, panels, depth;
  const float* l;
  int64_t l_stride;
  const float* g;
  int64_t panel_stride;
  float* c;
  int64_t c_stride;
  Into into;
  float keep = 1.0f;
  Ahead ahead = {};
};

}  // namespace
}  // namespace lrk

#define LRK_ISA galore_plain
#define LRK_TARGET
#define LRK_W 4
#include "galore_rows.inl"
#if defined(__x86_64__)
#  define LRK_ISA galore_avx2
#  define LRK_TARGET __attribute__((target("avx2,fma")))
#  define LRK_W 8
#  include "galore_rows.inl"
#  define LRK_ISA galore_avx512
#  define LRK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#  define LRK_W 16
#  include "galore_rows.inl"
#endif

namespace lrk {
namespace {

constexpr int64_t kDepthBlock = 64;  // short float32 sums, added up, lose fewer digits than a long
constexpr int64_t kRowBlock = 48;    // rows of W in one block product
constexpr int64_t kColumns = 192;    // columns of W in one, at most
constexpr int64_t kTasks = 4;        // that there are, where the long side allows it
constexpr int64_t kParallelWork = int64_t{1} << 16;  // elements of W worth a second thread

Ahead ahead_of(const Matrix& m, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  rows = std::min(rows, m.rows - row);
  cols = std::min(cols, m.cols - col);
  if (rows <= 0 || cols <= 0) return {};
  const int64_t size = dtype_bytes(m.dtype);
  return {static_cast<const char*>(element(m, row, col)), m.stride * size, rows, cols * size};
}

struct Passes {
  void (*product)(const ThinProduct&);
  void (*adam)(float*, float*, float*, int64_t, const GaLoreStep&);
  void (*combine)(float*, const float*, int64_t, float);
};

// In the instruction set of the table, so that LRK_CPU_ISA holds here too.
Passes passes_of(const KernelTable& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx2")) {
    return {galore_avx2::product, galore_avx2::adam_row, galore_avx2::combine_row};
  }
  if (!std::strcmp(kernels.name, "avx512") || !std::strcmp(kernels.name, "amx")) {
    return {galore_avx512::product, galore_avx512::adam_row, galore_avx512::combine_row};
  }
#endif
  (void)kernels;
  return {galore_plain::product, galore_plain::adam_row, galore_plain::combine_row};
}

// W = keep W - L panels, on a rectangle of W: L (rows, rank), rows `l_stride` apart.
// `change` and `buffer` hold kRowBlock rows of `stride` floats.
void write_weight(const KernelTable& kernels, const Passes& passes, const Matrix& weight,
                  const float* l, int64_t l_stride, int64_t rank, const float* panels,
                  float* change, float* buffer, int64_t stride, float keep) {
  // A short rank's product goes into whole panels of a float32 W from the registers.
  const bool at_once = weight.dtype == Dtype::kFloat32 && rank <= 2 * kDepthBlock;
  const int64_t whole = at_once ? weight.cols / kPanel : 0, left = whole * kPanel;
  const int64_t size = rank * kPanel;
  if (whole > 0) {
    passes.product({weight.rows, whole, rank, l, l_stride, panels, size,
                    static_cast<float*>(weight.data), weight.stride, Into::kWeight, keep});
  }
  if (left == weight.cols) return;
  const Matrix rest = part(weight, 0, left, weight.rows, weight.cols - left);
  for (int64_t r = 0; r < rank; r += kDepthBlock) {
    passes.product({rest.rows, ceil_div(rest.cols, kPanel), std::min(kDepthBlock, rank - r), l + r,
                    l_stride, panels + whole * size + r * kPanel, size, change, stride,
                    r > 0 ? Into::kAdd : Into::kStore});
  }
  const bool in_place = rest.dtype == Dtype::kFloat32;
  if (!in_place) {
    kernels.stage_float(buffer, stride, rectangle(rest, 0, 0, rest.rows, rest.cols));
  }
  for (int64_t i = 0; i < rest.rows; ++i) {
    float* w = in_place ? static_cast<float*>(mutable_element(rest, i, 0)) : buffer + i * stride;
    passes.combine(w, change + i * stride, rest.cols, keep);
  }
  if (!in_place) {
    kernels.store(rest.data, rest.dtype, rest.stride, buffer, stride, rest.rows, rest.cols, 1.0f);
  }
}

Matrix floats(float* data, int64_t rows, int64_t cols) {
  return {data, Dtype::kFloat32, rows, cols, cols};
}

float* moments(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<float*>(mutable_element(m, row, col));
}

// P^T (R, rows), cut into blocks of kDepthBlock columns, (R, kDepthBlock) each.
void transpose_in_blocks(const KernelTable& kernels, float* out, const float* basis, int64_t rows,
                         int64_t rank) {
  for (int64_t k = 0; k < rows; k += kDepthBlock) {
    kernels.transpose(reinterpret_cast<uint32_t*>(out + k * rank), kDepthBlock,
                      reinterpret_cast<const uint32_t*>(basis + k * rank), rank,
                      std::min(kDepthBlock, rows - k), rank);
  }
}

void wide_step(const Runtime& runtime, const Matrix& weight, const Matrix& grad,
               const Matrix& basis, const Matrix& exp_avg, const Matrix& exp_avg_sq,
               const GaLoreStep& step) {
  const KernelTable& kernels = runtime.kernels;
  const Passes passes = passes_of(kernels);
  const int64_t rows = weight.rows, rank = basis.cols;
  const int64_t most = std::min(kColumns, std::max(4 * kPanel, weight.cols / kTasks));
  const int64_t slices = ceil_div(weight.cols, most);
  const int64_t width = round_up(ceil_div(weight.cols, slices), kPanel);
  Layout shared;
  const size_t basis_at = shared.add<float>(rows * rank);
  const size_t turned_at = shared.add<float>(round_up(rows, kDepthBlock) * rank);
  CallScratch call(shared.bytes());
  float* p = at<float>(call.base(), basis_at);
  float* turned = at<float>(call.base(), turned_at);
  kernels.stage_float(p, rank, rectangle(basis, 0, 0, rows, rank));
  transpose_in_blocks(kernels, turned, p, rows, rank);

  const auto body = [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t g_at = layout.add<float>(kDepthBlock * width);
    const size_t low_at = layout.add<float>(rank * width);
    const size_t panels_at = layout.add<float>(rank * width);
    const size_t change_at = layout.add<float>(kRowBlock * width);
    const size_t buffer_at = layout.add<float>(kRowBlock * width);
    TaskScratch scratch(layout.bytes());
    float* g = at<float>(scratch.base(), g_at);
    float* low = at<float>(scratch.base(), low_at);
    float* panels = at<float>(scratch.base(), panels_at);
    float* change = at<float>(scratch.base(), change_at);
    float* buffer = at<float>(scratch.base(), buffer_at);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t col = task * width, cols = std::min(width, weight.cols - col);
      const int64_t count = ceil_div(cols, kPanel);
      for (int64_t row = 0; row < rows; row += kDepthBlock) {
        const int64_t depth = std::min(kDepthBlock, rows - row);
        stage_panels(kernels, g, kDepthBlock * kPanel, {grad, row, col, depth, cols});
        passes.product({rank, count, depth, turned + row * rank, kDepthBlock, g,
                        kDepthBlock * kPanel, low, width, row > 0 ? Into::kAdd : Into::kStore, 1.0f,
                        ahead_of(grad, row + depth, col, kDepthBlock, cols)});
      }
      for (int64_t r = 0; r < rank; ++r) {
        float* own = low + r * width;
        passes.adam(own, moments(exp_avg, r, col), moments(exp_avg_sq, r, col), cols, step);
      }
      stage_panels(kernels, panels, rank * kPanel,
                   {{low, Dtype::kFloat32, rank, cols, width}, 0, 0, rank, cols});
      for (int64_t row = 0; row < rows; row += kRowBlock) {
        const int64_t height = std::min(kRowBlock, rows - row);
        write_weight(kernels, passes, part(weight, row, col, height, cols), p + row * rank, rank,
                     rank, panels, change, buffer, width, step.keep);
      }
    }
  };
  run(runtime, ceil_div(weight.cols, width), rows * weight.cols >= kParallelWork, body);
}

void tall_step(const Runtime& runtime, const Matrix& weight, const Matrix& grad,
               const Matrix& basis, const Matrix& exp_avg, const Matrix& exp_avg_sq,
               const GaLoreStep& step) {
  const KernelTable& kernels = runtime.kernels;
  const Passes passes = passes_of(kernels);
  const int64_t cols = weight.cols, rank = basis.cols, padded = round_up(rank, kPanel);
  Layout shared;
  const size_t basis_at = shared.add<float>(cols * rank);
  const size_t turned_at = shared.add<float>(cols * rank);
  const size_t down_at = shared.add<float>(cols * padded);
  const size_t up_at = shared.add<float>(round_up(cols, kPanel) * rank);
  CallScratch call(shared.bytes());
  float* p = at<float>(call.base(), basis_at);
  float* turned = at<float>(call.base(), turned_at);
  float* down = at<float>(call.base(), down_at);
  float* up = at<float>(call.base(), up_at);
  kernels.stage_float(p, rank, rectangle(basis, 0, 0, cols, rank));
  kernels.transpose(reinterpret_cast<uint32_t*>(turned), cols, reinterpret_cast<const uint32_t*>(p),
                    rank, cols, rank);
  stage_panels(kernels, down, cols * kPanel, {floats(p, cols, rank), 0, 0, cols, rank});
  stage_panels(kernels, up, rank * kPanel, {floats(turned, rank, cols), 0, 0, rank, cols});
  const bool in_place = grad.dtype == Dtype::kFloat32;

  const auto body = [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t g_at = layout.add<float>(in_place ? 0 : kRowBlock * kDepthBlock);
    const size_t low_at = layout.add<float>(kRowBlock * padded);
    const size_t change_at = layout.add<float>(kRowBlock * kColumns);
    const size_t buffer_at = layout.add<float>(kRowBlock * kColumns);
    TaskScratch scratch(layout.bytes());
    float* staged = at<float>(scratch.base(), g_at);
    float* low = at<float>(scratch.base(), low_at);
    float* change = at<float>(scratch.base(), change_at);
    float* buffer = at<float>(scratch.base(), buffer_at);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * kRowBlock, height = std::min(kRowBlock, weight.rows - row);
      for (int64_t col = 0; col < cols; col += kDepthBlock) {
        const int64_t depth = std::min(kDepthBlock, cols - col);
        const float* g = staged;
        int64_t stride = kDepthBlock;
        if (in_place) {
          g = static_cast<const float*>(element(grad, row, col));
          stride = grad.stride;
        } else {
          kernels.stage_float(staged, kDepthBlock, rectangle(grad, row, col, height, depth));
        }
        passes.product({height, padded / kPanel, depth, g, stride, down + col * kPanel,
                        cols * kPanel, low, padded, col > 0 ? Into::kAdd : Into::kStore, 1.0f,
                        ahead_of(grad, row, col + depth, height, kDepthBlock)});
      }
      for (int64_t i = 0; i < height; ++i) {
        float* own = low + i * padded;
        passes.adam(own, moments(exp_avg, row + i, 0), moments(exp_avg_sq, row + i, 0), rank, step);
      }
      for (int64_t col = 0; col < cols; col += kColumns) {
        const int64_t width = std::min(kColumns, cols - col);
        write_weight(kernels, passes, part(weight, row, col, height, width), low, padded, rank,
                     up + col * rank, change, buffer, kColumns, step.keep);
      }
    }
  };
  run(runtime, ceil_div(weight.rows, kRowBlock), weight.rows * cols >= kParallelWork, body);
}

}  // namespace

void galore_step(const Runtime& runtime, const Matrix& weight, const Matrix& grad,
                 const Matrix& basis, const Matrix& exp_avg, const Matrix& exp_avg_sq, bool tall,
                 const GaLoreStep& step) {
  if (weight.rows == 0 || weight.cols == 0) return;
  (tall ? tall_step : wide_step)(runtime, weight, grad, basis, exp_avg, exp_avg_sq, step);
}

}  // namespace lrk
