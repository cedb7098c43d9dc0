#include "importance.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace lrk {
namespace {

// Some rows of W beside one slice of its columns.
struct ImportanceRows {
  const float* factors;  // of each row: its `rank` elements of B, then of gB
  const float* panels;   // of every 16 columns: `rank` rows of A, of gA, of A - gA
  int64_t rank;
  const float* w;
  int64_t w_stride, cols;
  float scale;
  float* row_sums;     // one for each row, written; or null, and
  float* column_sums;  // whole panels of them, added to
};

struct RowPass {
  void (*some)(const ImportanceRows&);
  void (*one)(const ImportanceRows&);
  int64_t rows;
};

}  // namespace
}  // namespace lrk

#define LRK_ISA importance_plain
#define LRK_TARGET
#define LRK_W 4
#include "importance_rows.inl"
#if defined(__x86_64__)
#  define LRK_ISA importance_avx2
#  define LRK_TARGET __attribute__((target("avx2,fma")))
#  define LRK_W 8
#  include "importance_rows.inl"
#  define LRK_ISA importance_avx512
#  define LRK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#  define LRK_W 16
#  include "importance_rows.inl"
#endif

namespace lrk {
namespace {

constexpr int64_t kTaskRows = 128;      // at most
constexpr int64_t kMostRows = 8;        // of every `kRows`
constexpr int64_t kPanelBytes = 24576;  // of a task's columns of factors: they stay in L1
constexpr int64_t kMostColumns = 512;   // at most
constexpr int64_t kParallelWork = int64_t{1} << 17;  // multiply-adds worth a second thread

// In the instruction set of the table, so that LRK_CPU_ISA holds here too.
RowPass row_pass(const KernelTable& kernels, int64_t rank) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx2")) return importance_avx2::row_pass(rank);
  if (!std::strcmp(kernels.name, "avx512") || !std::strcmp(kernels.name, "amx")) {
    return importance_avx512::row_pass(rank);
  }
#endif
  (void)kernels;
  return importance_plain::row_pass(rank);
}

// The length of the parts into which `whole` is cut: a multiple of `unit` and at most about `most`,
// all alike but for the last.
int64_t even_parts(int64_t whole, int64_t unit, int64_t most) {
  const int64_t parts = std::max(int64_t{1}, ceil_div(whole, std::max(unit, most)));
  return std::max(unit, round_up(ceil_div(whole, parts), unit));
}

void stage_columns(const KernelTable& kernels, float* panels, const ImportanceFactors& factors,
                   int64_t col, int64_t cols) {
  const int64_t rank = factors.lora_a.rows, size = rank * kPanel;
  stage_panels(kernels, panels, 3 * size, {factors.lora_a, 0, col, rank, cols});
  stage_panels(kernels, panels + size, 3 * size, {factors.grad_a, 0, col, rank, cols});
  for (float* panel = panels; panel < panels + 3 * rank * cols; panel += 3 * size) {
    for (int64_t i = 0; i < size; ++i) panel[2 * size + i] = panel[i] - panel[size + i];
  }
}

}  // namespace

void importance_sums(const Runtime& runtime, const Matrix& weight, const ImportanceFactors& factors,
                     bool by_row, float* out) {
  const KernelTable& kernels = runtime.kernels;
  const int64_t rank = factors.lora_a.rows;
  const int64_t panel_bytes = 3 * rank * kPanel * static_cast<int64_t>(sizeof(float));
  const int64_t height = even_parts(weight.rows, kMostRows, kTaskRows);
  const int64_t width =
      even_parts(weight.cols, kPanel, std::min(kMostColumns, kPanelBytes / panel_bytes * kPanel));
  const RowPass pass = row_pass(kernels, rank);
  const int64_t blocks = ceil_div(weight.rows, height), slices = ceil_div(weight.cols, width);
  // What a task sums: row sums of a slice lie behind one another, as do column sums of a block.
  const int64_t length = by_row ? weight.rows : slices * width, parts = by_row ? slices : blocks;
  Layout shared;
  const size_t partial_at = shared.add<float>(parts * length);
  CallScratch call(shared.bytes());
  float* partial = at<float>(call.base(), partial_at);

  const auto body = [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t panels_at = layout.add<float>(3 * rank * width);
    const size_t factors_at = layout.add<float>(height * 2 * rank);
    const size_t w_at = layout.add<float>(kMostRows * width);
    TaskScratch scratch(layout.bytes());
    float* panels = at<float>(scratch.base(), panels_at);
    float* of_rows = at<float>(scratch.base(), factors_at);
    float* staged = at<float>(scratch.base(), w_at);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / blocks, block = task % blocks;
      const int64_t row0 = block * height, rows = std::min(height, weight.rows - row0);
      const int64_t col = slice * width, cols = std::min(width, weight.cols - col);
      if (task == begin || block == 0) stage_columns(kernels, panels, factors, col, cols);
      kernels.stage_float(of_rows, 2 * rank, rectangle(factors.lora_b, row0, 0, rows, rank));
      kernels.stage_float(of_rows + rank, 2 * rank, rectangle(factors.grad_b, row0, 0, rows, rank));
      float* column_sums = by_row ? nullptr : partial + block * length + col;
      if (!by_row) std::fill_n(column_sums, width, 0.0f);
      for (int64_t i = 0; i < rows;) {
        const int64_t count = i + pass.rows <= rows ? pass.rows : 1;
        const bool in_place = weight.dtype == Dtype::kFloat32;
        if (!in_place) {
          kernels.stage_float(staged, width, rectangle(weight, row0 + i, col, count, cols));
        }
        const float* w =
            in_place ? static_cast<const float*>(element(weight, row0 + i, col)) : staged;
        (count > 1 ? pass.some : pass.one)(
            {of_rows + i * 2 * rank, panels, rank, w, in_place ? weight.stride : width, cols,
             factors.scale, by_row ? partial + slice * length + row0 + i : nullptr, column_sums});
        i += count;
      }
    }
  };
  run(runtime, blocks * slices, 3 * weight.rows * weight.cols * rank >= kParallelWork, body);

  const int64_t count = by_row ? weight.rows : weight.cols;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0.0;
    for (int64_t p = 0; p < parts; ++p) sum += partial[p * length + i];
    out[i] = static_cast<float>(sum);
  }
}

}  // namespace lrk
