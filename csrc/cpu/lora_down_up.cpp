// The thin products of a LoRA layer: down, out = scale * drop(x) factor^T, from a width to the
// rank, and up, y += scale * drop((p * gate) factor), from the rank to a width.
#include <algorithm>

#include "block_product.h"
#include "few_rows.h"
#include "lora.h"

namespace lrk {
namespace {

constexpr int64_t kUpColumns = 128;         // columns of an up-projection's block product
constexpr int64_t kUpTaskColumns = 2048;    // columns of one up-projection task
constexpr int64_t kUpFewRowsColumns = 256;  // the same when rows are few

// ---- down ---------------------------------------------------------------------------------------

template <typename Elem>
void down(const Runtime& runtime, const Matrix& out, const Matrix& x, const PanelSource& factor,
          float scale, const Dropout* dropout) {
  const int64_t m = x.rows, width = x.cols, rank = factor.columns();
  const int64_t panels = ceil_div(rank, kPanel), padded = Engine<Elem>::depth(width);
  CallScratch shared(static_cast<size_t>(panels * kPanel * padded) * sizeof(Elem));
  Elem* packed = static_cast<Elem*>(shared.base());
  pack_all(runtime, packed, padded, factor);
  const bool parallel = m * width * panels * kPanel > Engine<Elem>::kSerial.down ||
                        (dropout && m * width > kSerialDropout);
  run(runtime, ceil_div(m, kRowBlock), parallel, [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t c_at = layout.add<float>(kRowBlock * panels * kPanel);
    const size_t staged_at = layout.add<Elem>(kRowBlock * kDepthBlock);
    TaskScratch scratch(layout.bytes());
    const Sums c{at<float>(scratch.base(), c_at), panels * kPanel};
    Engine<Elem> engine(runtime.kernels);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kRowBlock, rows = std::min(kRowBlock, m - row);
      down_block(engine, {x, row, 0, rows, width}, {packed, panels, padded * kPanel}, c,
                 at<Elem>(scratch.base(), staged_at), false, dropout);
      runtime.kernels.store(mutable_element(out, row, 0), out.dtype, out.stride, c.data, c.stride,
                            rows, rank, scale);
    }
  });
}

// Down for at most kDotRows rows of x and a factor (R, width): each row of the factor is read where
// it lies, once for all rows of x.
void down_by_dots(const Runtime& runtime, const Matrix& out, const Matrix& x, const Matrix& factor,
                  float scale, const Dropout* dropout) {
  const KernelTable& kernels = runtime.kernels;
  const FloatRows x_rows(kernels, x, dropout);
  run(runtime, ceil_div(factor.rows, kDotColumns), x.rows * factor.rows * x.cols >= kSerialDots,
      [&](int64_t begin, int64_t end) {
        float sums[kDotRows * kDotColumns];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t r = block * kDotColumns, ranks = std::min(kDotColumns, factor.rows - r);
          kernels.dot_rows(
              sums, kDotColumns, x.rows, ranks,
              {x_rows.rows, element(factor, r, 0), factor.dtype, factor.stride, x.cols}, nullptr);
          kernels.store(mutable_element(out, 0, r), out.dtype, out.stride, sums, kDotColumns,
                        x.rows, ranks, scale);
        }
      });
}

// ---- up -----------------------------------------------------------------------------------------

// Ask for a rectangle ahead of its use, into the second-level cache: rows a page apart fall into
// few sets of the first, where a block of them would evict itself.
void prefetch(const Matrix& m, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  const int64_t bytes = std::min(cols, m.cols - col) * dtype_bytes(m.dtype);
  for (int64_t i = row; i < row + rows; ++i) {
    const char* line = static_cast<const char*>(element(m, i, col));
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(line + b, 0, 2);
  }
}

template <typename Elem>
void up(const Runtime& runtime, const LoraUp& to) {
  const KernelTable& kernels = runtime.kernels;
  const Matrix& y = to.y;
  const Dropout* dropout = to.dropout;
  const int64_t m = y.rows, width = y.cols, rank = to.factor.rank();
  const int64_t depth = Engine<Elem>::depth(rank), panels = ceil_div(width, kPanel);
  const PanelSource source{to.factor.matrix, to.factor.rank_last};
  CallScratch shared(static_cast<size_t>(panels * kPanel * depth) * sizeof(Elem));
  Elem* packed = static_cast<Elem*>(shared.base());

  // With few rows a task takes all of them, and packs the panels that it alone will use: one
  // parallel region, and nothing moves between cores.
  const bool few_rows = m <= kFewRows;
  const int64_t task_rows = few_rows ? m : kRowBlock;
  const int64_t task_columns = few_rows ? kUpFewRowsColumns : kUpTaskColumns;
  const int64_t column_blocks = ceil_div(width, task_columns);
  if (!few_rows) pack_all(runtime, packed, depth, source);

  const int64_t limit = few_rows ? Engine<Elem>::kSerial.up_few_rows : Engine<Elem>::kSerial.up;
  const bool parallel = m * width * depth > limit || (dropout && m * width > kSerialDropout);
  run(runtime, ceil_div(m, task_rows) * column_blocks, parallel, [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t c_at = layout.add<float>(kRowBlock * kUpColumns);
    const size_t l_at = layout.add<Elem>(kRowBlock * depth);
    const size_t buffer_at = layout.add<Elem>(kPackBuffer);
    TaskScratch scratch(layout.bytes());
    float* c = at<float>(scratch.base(), c_at);
    Elem* l = at<Elem>(scratch.base(), l_at);
    Engine<Elem> engine(kernels);
    int64_t staged_row = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / column_blocks * task_rows;
      const int64_t last_row = std::min(first_row + task_rows, m);
      const int64_t first = task % column_blocks * task_columns;
      const int64_t last = std::min(first + task_columns, width);
      if (few_rows) {
        pack_panels(kernels, packed, depth, source, first / kPanel, ceil_div(last, kPanel),
                    at<void>(scratch.base(), buffer_at));
      }
      for (int64_t row = first_row; row < last_row; row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, last_row - row);
        if (staged_row != row) {
          Source s = rectangle(to.p, row, 0, rows, rank);
          s.padded_cols = depth;
          s.col_scale = to.gate;
          engine.stage(l, depth, s);
          staged_row = row;
        }
        for (int64_t col = first; col < last; col += kUpColumns) {
          const int64_t cols = std::min(kUpColumns, last - col);
          if (col + kUpColumns < last) prefetch(y, row, col + kUpColumns, rows, kUpColumns);
          engine.multiply({rows, ceil_div(cols, kPanel), depth, l, depth,
                           packed + col / kPanel * depth * kPanel, kPanel, depth * kPanel, c,
                           kUpColumns, false});
          kernels.add(mutable_element(y, row, col), y.dtype, y.stride, c, kUpColumns, rows, cols,
                      to.scale, dropout, row, col);
          if (const ColumnScale* by = to.columns) {
            kernels.scale_columns(mutable_element(by->out, row, col), y.dtype, by->out.stride,
                                  element(y, row, col), y.stride, rows, cols, by->scale + col,
                                  by->bias ? by->bias + col : nullptr);
          }
        }
      }
    }
  });
}

}  // namespace

void lora_down(const Runtime& runtime, const Matrix& out, const Matrix& x, const Factor& factor,
               float scale, const Dropout* dropout, const float* row_scale) {
  if (out.rows == 0 || out.cols == 0) return;
  if (x.cols == 0) return zero(out);
  const PanelSource source{factor.matrix, !factor.rank_last, row_scale};
  if (on_tiles(runtime, x.dtype)) {
    down<uint16_t>(runtime, out, x, source, scale, dropout);
  } else if (x.rows <= kDotRows && !factor.rank_last) {
    down_by_dots(runtime, out, x, factor.matrix, scale, dropout);
  } else {
    down<float>(runtime, out, x, source, scale, dropout);
  }
}

void lora_up(const Runtime& runtime, const LoraUp& to) {
  if (to.y.rows == 0 || to.y.cols == 0 || to.p.cols == 0) return;
  if (on_tiles(runtime, to.y.dtype)) {
    up<uint16_t>(runtime, to);
  } else {
    up<float>(runtime, to);
  }
}

}  // namespace lrk
