#include "lora.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "block_product.h"
#include "row_hash.h"

namespace lrk {
namespace {

// More of how sums and work are cut: see block_product.h.
constexpr int64_t kColumnGroup = 64;  // columns of a gradient's block product
constexpr int64_t kUpColumns = 128;   // columns of an up-projection's block product
constexpr int64_t kGradRows = 32;     // reduction slice of a gradient: streams a prefetcher follows
constexpr int64_t kGradColumns = 2048;      // columns of one gradient task: whole pages of rows ...
constexpr int64_t kGradFewColumns = 1024;   // ... and where there are few rows to share out
constexpr int64_t kGradFewRows = 512;       // which these are
constexpr int64_t kGradTaskRows = 256;      // rows of one gradient task
constexpr int64_t kGradPad = 16;            // sums a power of two apart would share cache sets
constexpr int64_t kUpTaskColumns = 2048;    // columns of one up-projection task
constexpr int64_t kUpFewRowsColumns = 256;  // the same when rows are few
constexpr int64_t kFewRows = 128;           // up to here one task takes all rows of y
constexpr int64_t kDotRows = 8;             // up to here rows stay beside a row of the weight
constexpr int64_t kDotColumns = 16;         // columns of y, or ranks, in one task of such rows
constexpr int64_t kMixTasks = 8;            // tasks of their gradient, at least, ...
constexpr int64_t kMixColumns = 256;        // columns of one, at most, ...
constexpr int64_t kMixRows = 32;            // and rows of the weight in one of its sums
constexpr int64_t kSerialDots = int64_t{1} << 16;  // multiply-adds of both worth a second thread
constexpr int64_t kProductTasks = 8;               // tasks that a product has, at least ...
constexpr int64_t kProductColumns = 256;           // ... and columns of a task, at most
constexpr int64_t kProductDepth = 2048;            // slice of the weight in a task's panels: 1 MiB
constexpr int64_t kProductRows = 1024;             // rows of y that one task takes, at most

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
    float* c = at<float>(scratch.base(), c_at);
    Engine<Elem> engine(runtime.kernels);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kRowBlock, rows = std::min(kRowBlock, m - row);
      down_block(engine, x, row, rows, 0, width, packed, panels, padded * kPanel, dropout, c,
                 panels * kPanel, at<Elem>(scratch.base(), staged_at));
      runtime.kernels.store(mutable_element(out, row, 0), out.dtype, out.stride, c, panels * kPanel,
                            rows, rank, scale);
    }
  });
}

// The rows of a matrix, at most kDotRows, as float32: in place, or staged in the call's scratch.
struct FloatRows {
  CallScratch scratch;
  const float* rows[kDotRows];

  FloatRows(const KernelTable& kernels, const Matrix& m, const Dropout* dropout)
      : scratch(static_cast<size_t>(m.rows * m.cols) * sizeof(float)) {
    for (int64_t i = 0; i < m.rows; ++i) {
      rows[i] = static_cast<const float*>(element(m, i, 0));
      if (m.dtype == Dtype::kFloat32 && !dropout) continue;
      float* staged = static_cast<float*>(scratch.base()) + i * m.cols;
      Source source = rectangle(m, i, 0, 1, m.cols);
      source.dropout = dropout;
      kernels.stage_float(staged, m.cols, source);
      rows[i] = staged;
    }
  }
};

// The same for very few rows of x and a factor (R, width), whose rows are read where they lie.
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

// ---- the frozen product and the correction together ---------------------------------------------

// A finished block of u = x W^T + s (p * gate) B^T goes out as `epilogue` says. Changes c.
void finish(const KernelTable& kernels, const Matrix& y, const Epilogue& epilogue, float* c,
            int64_t c_stride, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  const Matrix& u = epilogue.u;
  if (u.data) {
    kernels.store(mutable_element(u, row, col), u.dtype, u.stride, c, c_stride, rows, cols, 1.0f);
  }
  if (epilogue.scale || epilogue.bias) {
    kernels.scale_columns(c, Dtype::kFloat32, c_stride, c, c_stride, rows, cols,
                          epilogue.scale ? epilogue.scale + col : nullptr,
                          epilogue.bias ? epilogue.bias + col : nullptr);
  }
  kernels.store(mutable_element(y, row, col), y.dtype, y.stride, c, c_stride, rows, cols, 1.0f);
}

// With few tokens the weight is the long side. Its rows stream through the tiles as L, read where
// they lie, with x as G; the rank is appended to the reduction, so that y is rounded once.
// With `norm`, A stands beside x in G.
template <typename Elem>
void linear_few_rows(const Runtime& runtime, const Matrix& y, const Matrix& p, const Matrix& x,
                     const Matrix& weight, const Matrix& lora_b, const Epilogue& epilogue,
                     const DoraNorm* norm, uint64_t* weight_hashes) {
  const KernelTable& kernels = runtime.kernels;
  const RowHash hash = row_hash(kernels);
  const int64_t m = x.rows, n = weight.rows, width = x.cols, rank = p.cols;
  const int64_t panels = ceil_div(m, kPanel), padded = Engine<Elem>::depth(width);
  const int64_t padded_rank = Engine<Elem>::depth(rank);
  Layout layout;
  std::optional<RowNorms> norms;
  if (norm) norms.emplace(*norm, sizeof(Elem) == sizeof(uint16_t), &layout);
  const int64_t u_columns = norms ? norms->columns() : 0;
  const int64_t c_stride = panels * kPanel + u_columns;
  const size_t x_at = layout.add<Elem>(c_stride * padded);
  const size_t p_at = layout.add<Elem>(panels * kPanel * padded_rank);
  CallScratch shared(layout.bytes());
  Elem* x_panels = at<Elem>(shared.base(), x_at);
  Elem* p_panels = at<Elem>(shared.base(), p_at);
  pack_all(runtime, p_panels, padded_rank, {p, true});
  pack_all(runtime, x_panels, padded, {x, true});
  if (norms) norms->prepare(runtime, shared.base(), x_panels + panels * kPanel * padded);

  run(runtime, ceil_div(n, kRowBlock), true, [&](int64_t begin, int64_t end) {
    Layout own;
    const size_t c_at = own.add<float>(kRowBlock * c_stride);
    const size_t turned_at = own.add<float>(c_stride * kRowBlock);
    const size_t staged_at = own.add<Elem>(kRowBlock * kDepthBlock);
    const size_t norms_at = own.add<float>(norms ? norms->scratch_floats() : 0);
    TaskScratch scratch(own.bytes());
    float* c = at<float>(scratch.base(), c_at);
    float* turned = at<float>(scratch.base(), turned_at);
    Elem* staged = at<Elem>(scratch.base(), staged_at);
    Engine<Elem> engine(kernels);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kRowBlock, rows = std::min(kRowBlock, n - row);
      const Dropout* keep_all = nullptr;
      down_block(engine, weight, row, rows, 0, width, x_panels, c_stride / kPanel, padded * kPanel,
                 keep_all, c, c_stride, staged);
      // These rows are in the cache now.
      if (weight_hashes) hash_rows(hash, weight, row, rows, weight_hashes + row);
      if (norms) {
        double squares[kRowBlock] = {};
        norms->add_squares(kernels, weight, row, rows, 0, width, squares);
        norms->finish(kernels, row, rows, c + panels * kPanel, c_stride, squares,
                      at<float>(scratch.base(), norms_at));
      }
      down_block(engine, lora_b, row, rows, 0, rank, p_panels, panels, padded_rank * kPanel,
                 keep_all, c, c_stride, staged, true);
      kernels.transpose(reinterpret_cast<uint32_t*>(turned), kRowBlock,
                        reinterpret_cast<uint32_t*>(c), c_stride, rows, m);
      finish(kernels, y, epilogue, turned, kRowBlock, 0, m, row, rows);
    }
  });
}

// With very few tokens and no tiles, a row of the weight is read once, where it lies, and
// multiplied with all rows of x; the rank is appended to the reduction.
void linear_by_dots(const Runtime& runtime, const Matrix& y, const Matrix& p, const Matrix& x,
                    const Matrix& weight, const Matrix& lora_b, const Epilogue& epilogue,
                    uint64_t* weight_hashes) {
  const KernelTable& kernels = runtime.kernels;
  const RowHash hash = row_hash(kernels);
  const int64_t m = x.rows, n = weight.rows, width = x.cols, rank = p.cols;
  const FloatRows x_rows(kernels, x, nullptr);
  const float* p_rows[kDotRows];
  for (int64_t i = 0; i < m; ++i) p_rows[i] = static_cast<const float*>(element(p, i, 0));
  run(runtime, ceil_div(n, kDotColumns), m * n * width >= kSerialDots,
      [&](int64_t begin, int64_t end) {
        TaskScratch scratch(static_cast<size_t>(kDotColumns * rank) * sizeof(float));
        float* staged = static_cast<float*>(scratch.base());
        float sums[kDotRows * kDotColumns];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t col = block * kDotColumns, cols = std::min(kDotColumns, n - col);
          Dots correction{p_rows, element(lora_b, col, 0), Dtype::kFloat32, lora_b.stride, rank};
          if (lora_b.dtype != Dtype::kFloat32) {
            kernels.stage_float(staged, rank, rectangle(lora_b, col, 0, cols, rank));
            correction.factor = staged;
            correction.stride = rank;
          }
          kernels.dot_rows(
              sums, kDotColumns, m, cols,
              {x_rows.rows, element(weight, col, 0), weight.dtype, weight.stride, width},
              rank ? &correction : nullptr);
          if (weight_hashes) hash_rows(hash, weight, col, cols, weight_hashes + col);
          finish(kernels, y, epilogue, sums, kDotColumns, 0, m, col, cols);
        }
      });
}

// With many tokens a block of the weight is packed into G, stays in the second-level cache, and
// serves all rows of x, which stream through the tiles as L. Sums run in the same order as above.
// Dropout, where there is any, is the correction's result's: as in the gradient of x. With `norm`
// (and no more than kProductRows rows), the rows of A stream through the tiles before those of x.
template <typename Elem>
void linear_many_rows(const Runtime& runtime, const Matrix& y, const Matrix& p, const Matrix& x,
                      const PanelSource& weight, const PanelSource& factor,
                      const Epilogue& epilogue, const Dropout* dropout,
                      const DoraNorm* norm = nullptr, uint64_t* weight_hashes = nullptr) {
  const KernelTable& kernels = runtime.kernels;
  const RowHash hash = row_hash(kernels);
  const int64_t m = x.rows, n = weight.columns(), width = x.cols, rank = p.cols;
  const int64_t padded_rank = Engine<Elem>::depth(rank);
  const int64_t row_blocks = ceil_div(m, kProductRows);
  const int64_t task_rows = round_up(ceil_div(m, row_blocks), kRowBlock);
  const int64_t columns = std::clamp(round_up(ceil_div(n * row_blocks, kProductTasks), 2 * kPanel),
                                     4 * kPanel, kProductColumns);
  const int64_t column_blocks = ceil_div(n, columns);
  // Where the reduction is cut, the sums of a task wait in float32.
  const int64_t c_rows = width > kProductDepth ? task_rows : kRowBlock;

  Layout layout;
  std::optional<RowNorms> norms;
  if (norm) norms.emplace(*norm, sizeof(Elem) == sizeof(uint16_t), &layout);
  const int64_t u_columns = norms ? norms->columns() : 0;
  const size_t a_at = layout.add<Elem>(u_columns * Engine<Elem>::depth(width));
  CallScratch shared(layout.bytes());
  if (norms) norms->prepare(runtime, shared.base(), at<Elem>(shared.base(), a_at));

  run(runtime, row_blocks * column_blocks, true, [&](int64_t begin, int64_t end) {
    Layout own;
    const size_t u_at = own.add<float>(u_columns * columns);
    const size_t turned_at = own.add<float>(u_columns * columns);
    const size_t norms_at = own.add<float>(norms ? norms->scratch_floats() : 0);
    const size_t squares_at = own.add<double>(norms ? columns : 0);
    const size_t g_at =
        own.add<Elem>(columns * Engine<Elem>::depth(std::min(width, kProductDepth)));
    const size_t b_at = own.add<Elem>(columns * padded_rank);
    const size_t c_at = own.add<float>(c_rows * columns);
    const size_t drop_at = own.add<float>(dropout ? kRowBlock * columns : 0);
    const size_t staged_at = own.add<Elem>(kRowBlock * kDepthBlock);
    const size_t buffer_at = own.add<Elem>(kPackBuffer);
    TaskScratch scratch(own.bytes());
    Elem* g = at<Elem>(scratch.base(), g_at);
    Elem* b_panels = at<Elem>(scratch.base(), b_at);
    Elem* staged = at<Elem>(scratch.base(), staged_at);
    void* buffer = at<void>(scratch.base(), buffer_at);
    Engine<Elem> engine(kernels);
    const Dropout* keep_all = nullptr;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / column_blocks * task_rows;
      const int64_t last = std::min(first + task_rows, m);
      const int64_t col = task % column_blocks * columns, cols = std::min(columns, n - col);
      const int64_t panels = ceil_div(cols, kPanel);
      pack_panels(kernels, b_panels, padded_rank, factor.block(col, cols, 0, rank), 0, panels,
                  buffer);
      double* squares = at<double>(scratch.base(), squares_at);
      if (norms) std::fill_n(squares, cols, 0.0);
      if (weight_hashes && first == 0) {
        hash_rows(hash, weight.matrix, col, cols, weight_hashes + col);
      }
      for (int64_t k0 = 0; k0 < width; k0 += kProductDepth) {
        const int64_t depth = std::min(kProductDepth, width - k0);
        const int64_t padded = Engine<Elem>::depth(depth);
        pack_panels(kernels, g, padded, weight.block(col, cols, k0, depth), 0, panels, buffer);
        if (norms) {
          norms->add_squares(kernels, weight.matrix, col, cols, k0, depth, squares);
          const Matrix& a = norms->a();
          float* u = at<float>(scratch.base(), u_at);
          for (int64_t row = 0; row < a.rows; row += kRowBlock) {
            down_block(engine, a, row, std::min(kRowBlock, a.rows - row), k0, depth, g, panels,
                       padded * kPanel, keep_all, u + row * columns, columns, staged, k0 > 0);
          }
          if (k0 + depth == width) {
            float* turned = at<float>(scratch.base(), turned_at);
            std::fill_n(turned, cols * u_columns, 0.0f);
            kernels.transpose(reinterpret_cast<uint32_t*>(turned), u_columns,
                              reinterpret_cast<uint32_t*>(u), columns, a.rows, cols);
            for (int64_t j = 0; j < cols; j += kRowBlock) {
              norms->finish(kernels, col + j, std::min(kRowBlock, cols - j), turned + j * u_columns,
                            u_columns, squares + j, at<float>(scratch.base(), norms_at));
            }
          }
        }
        for (int64_t row = first; row < last; row += kRowBlock) {
          const int64_t rows = std::min(kRowBlock, last - row);
          float* c = at<float>(scratch.base(), c_at) + (row - first) % c_rows * columns;
          down_block(engine, x, row, rows, k0, depth, g, panels, padded * kPanel, keep_all, c,
                     columns, staged, k0 > 0);
          if (k0 + depth < width) continue;
          float* correction = dropout ? at<float>(scratch.base(), drop_at) : c;
          down_block(engine, p, row, rows, 0, rank, b_panels, panels, padded_rank * kPanel,
                     keep_all, correction, columns, staged, !dropout);
          if (dropout) {
            kernels.add(c, Dtype::kFloat32, columns, correction, columns, rows, cols, 1.0f, dropout,
                        row, col);
          }
          finish(kernels, y, epilogue, c, columns, row, rows, col, cols);
        }
      }
    }
  });
}

// p * gate * scale in float32, rounded once more when it is staged.
struct ScaledP {
  std::vector<float> factor, values;
  Matrix matrix;

  ScaledP(const KernelTable& kernels, const Matrix& p, const float* gate, float scale)
      : factor(static_cast<size_t>(p.cols), scale),
        values(static_cast<size_t>(p.rows * p.cols)),
        matrix{values.data(), Dtype::kFloat32, p.rows, p.cols, p.cols} {
    for (int64_t r = 0; gate && r < p.cols; ++r) factor[static_cast<size_t>(r)] *= gate[r];
    Source s = rectangle(p, 0, 0, p.rows, p.cols);
    s.col_scale = factor.data();
    kernels.stage_float(values.data(), p.cols, s);
  }
};

template <typename Elem>
void linear(const Runtime& runtime, const Matrix& y, const Matrix& p, const Matrix& x,
            const Matrix& weight, const Matrix& lora_b, const Epilogue& epilogue,
            const DoraNorm* norm, uint64_t* weight_hashes) {
  if (sizeof(Elem) == sizeof(float) && x.rows <= kDotRows && !norm) {
    linear_by_dots(runtime, y, p, x, weight, lora_b, epilogue, weight_hashes);
  } else if (x.rows <= kFewRows) {
    linear_few_rows<Elem>(runtime, y, p, x, weight, lora_b, epilogue, norm, weight_hashes);
  } else {
    linear_many_rows<Elem>(runtime, y, p, x, {weight, true}, {lora_b, true}, epilogue, nullptr,
                           norm, weight_hashes);
  }
}

// The gradient of very few rows of x: rows of the weight are read once, where they lie, and added
// up.
void grad_x_by_mixing(const Runtime& runtime, const Matrix& grad_x, const Matrix& q,
                      const Matrix& grad_y, const Matrix& weight, const Matrix& lora_a,
                      const Dropout* dropout, const float* row_scale) {
  const KernelTable& kernels = runtime.kernels;
  const int64_t m = grad_y.rows, n = weight.rows, width = weight.cols, rank = q.cols;
  CallScratch shared(static_cast<size_t>(m * n) * sizeof(float));
  float* dy = static_cast<float*>(shared.base());
  Source source = rectangle(grad_y, 0, 0, m, n);
  source.col_scale = row_scale;
  kernels.stage_float(dy, n, source);
  const int64_t columns =
      std::clamp(round_up(ceil_div(width, kMixTasks), 4 * kPanel), 4 * kPanel, kMixColumns);
  run(runtime, ceil_div(width, columns), m * n * width >= kSerialDots,
      [&](int64_t begin, int64_t end) {
        float sums[kDotRows * kMixColumns], correction[kDotRows * kMixColumns];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t col = block * columns, cols = std::min(columns, width - col);
          for (int64_t row = 0; row < n; row += kMixRows) {
            kernels.mix_rows({sums, kMixColumns, dy + row, n, m, element(weight, row, col),
                              weight.dtype, weight.stride, std::min(kMixRows, n - row), cols,
                              row > 0});
          }
          kernels.mix_rows({dropout ? correction : sums, kMixColumns,
                            static_cast<const float*>(q.data), q.stride, m, element(lora_a, 0, col),
                            lora_a.dtype, lora_a.stride, rank, cols, !dropout});
          if (dropout) {
            kernels.add(sums, Dtype::kFloat32, kMixColumns, correction, kMixColumns, m, cols, 1.0f,
                        dropout, 0, col);
          }
          kernels.store(mutable_element(grad_x, 0, col), grad_x.dtype, grad_x.stride, sums,
                        kMixColumns, m, cols, 1.0f);
        }
      });
}

// ---- up: y += (p * gate) factor -----------------------------------------------------------------

template <typename Elem>
void up(const Runtime& runtime, const Matrix& y, const Matrix& p, const Factor& factor,
        const float* gate, float scale, const Dropout* dropout, const float* column_scale,
        const float* bias, const Matrix* scaled) {
  const int64_t m = y.rows, width = y.cols, rank = factor.rank();
  const int64_t depth = Engine<Elem>::depth(rank), panels = ceil_div(width, kPanel);
  const PanelSource source{factor.matrix, factor.rank_last};
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
    Engine<Elem> engine(runtime.kernels);
    int64_t staged_row = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / column_blocks * task_rows;
      const int64_t last_row = std::min(first_row + task_rows, m);
      const int64_t first = task % column_blocks * task_columns;
      const int64_t last = std::min(first + task_columns, width);
      if (few_rows) {
        pack_panels(runtime.kernels, packed, depth, source, first / kPanel, ceil_div(last, kPanel),
                    at<void>(scratch.base(), buffer_at));
      }
      for (int64_t row = first_row; row < last_row; row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, last_row - row);
        if (staged_row != row) {
          Source s = rectangle(p, row, 0, rows, rank);
          s.padded_cols = depth;
          s.col_scale = gate;
          engine.stage(l, depth, s);
          staged_row = row;
        }
        for (int64_t col = first; col < last; col += kUpColumns) {
          const int64_t cols = std::min(kUpColumns, last - col);
          if (col + kUpColumns < last) prefetch(y, row, col + kUpColumns, rows, kUpColumns);
          engine.multiply({rows, ceil_div(cols, kPanel), depth, l, depth,
                           packed + col / kPanel * depth * kPanel, kPanel, depth * kPanel, c,
                           kUpColumns, false});
          runtime.kernels.add(mutable_element(y, row, col), y.dtype, y.stride, c, kUpColumns, rows,
                              cols, scale, dropout, row, col);
          if (scaled) {
            runtime.kernels.scale_columns(mutable_element(*scaled, row, col), y.dtype,
                                          scaled->stride, element(y, row, col), y.stride, rows,
                                          cols, column_scale + col, bias ? bias + col : nullptr);
          }
        }
      }
    }
  });
}

// ---- factor gradients: (p * gate)^T big ---------------------------------------------------------

// L of a gradient: rows [row0, row0 + rows) of p * gate, transposed to (rank, kGradRows).
void transpose_p(const KernelTable& kernels, float* l, const Matrix& p, int64_t row0, int64_t rows,
                 const float* gate, float* buffer) {
  Source s = rectangle(p, row0, 0, rows, p.cols);
  s.col_scale = gate;
  kernels.stage_float(buffer, p.cols, s);
  kernels.transpose(reinterpret_cast<uint32_t*>(l), kGradRows, reinterpret_cast<uint32_t*>(buffer),
                    p.cols, rows, p.cols);
}

void transpose_p(const KernelTable& kernels, uint16_t* l, const Matrix& p, int64_t row0,
                 int64_t rows, const float* gate, uint16_t* buffer) {
  const int64_t padded_rank = round_up(p.cols, kPanel);
  const int64_t depth = Engine<uint16_t>::depth(rows);
  Source s = rectangle(p, row0, 0, rows, p.cols);
  s.padded_cols = padded_rank;
  s.col_scale = gate;
  uint16_t* panels = buffer + kGradRows * padded_rank;
  kernels.stage_bfloat16(buffer, padded_rank, s);
  kernels.interleave(panels, depth * kPanel, buffer, padded_rank, rows, depth, padded_rank,
                     nullptr);
  // A panel is (row pair, column) in 32-bit words; L wants (column, row pair).
  for (int64_t r = 0; r < p.cols; r += kPanel) {
    kernels.transpose(reinterpret_cast<uint32_t*>(l + r * kGradRows), kGradRows / 2,
                      reinterpret_cast<uint32_t*>(panels + r * depth), kPanel, depth / 2,
                      std::min(kPanel, p.cols - r));
  }
}

// D (rank, cols padded to panels) += L (rank, rows) drop(big[row0 : row0 + rows, col0 : col0 +
// cols]).
void grad_block(const KernelTable& kernels, const Engine<float>& engine, const Matrix& big,
                int64_t row0, int64_t rows, int64_t col0, int64_t cols, const float* l,
                int64_t rank, const Dropout* dropout, float* d, int64_t d_stride, bool accumulate,
                float* staged, float*) {
  (void)kernels;
  for (int64_t j = 0; j < cols; j += kColumnGroup) {
    const int64_t n = std::min(kColumnGroup, cols - j);
    const float* g = static_cast<const float*>(element(big, row0, col0 + j));
    int64_t g_stride = big.stride;
    if (big.dtype != Dtype::kFloat32 || dropout || n % kPanel) {
      Source s = rectangle(big, row0, col0 + j, rows, n);
      s.padded_cols = round_up(n, kPanel);
      s.dropout = dropout;
      engine.stage(staged, kColumnGroup, s);
      g = staged;
      g_stride = kColumnGroup;
    }
    engine.multiply({rank, ceil_div(n, kPanel), rows, l, kGradRows, g, g_stride, kPanel, d + j,
                     d_stride, accumulate});
  }
}

void grad_block(const KernelTable& kernels, const Engine<uint16_t>& engine, const Matrix& big,
                int64_t row0, int64_t rows, int64_t col0, int64_t cols, const uint16_t* l,
                int64_t rank, const Dropout* dropout, float* d, int64_t d_stride, bool accumulate,
                uint16_t* staged, uint16_t* panels) {
  const int64_t depth = Engine<uint16_t>::depth(rows);
  for (int64_t j = 0; j < cols; j += kColumnGroup) {
    const int64_t n = std::min(kColumnGroup, cols - j);
    const uint16_t* in = static_cast<const uint16_t*>(element(big, row0, col0 + j));
    int64_t stride = big.stride;
    if (big.dtype != Dtype::kBFloat16 || dropout) {
      Source s = rectangle(big, row0, col0 + j, rows, n);
      s.dropout = dropout;
      engine.stage(staged, kColumnGroup, s);
      in = staged;
      stride = kColumnGroup;
    }
    kernels.interleave(panels, depth * kPanel, in, stride, rows, depth, n, nullptr);
    engine.multiply({rank, ceil_div(n, kPanel), depth, l, kGradRows, panels, kPanel, depth * kPanel,
                     d + j, d_stride, accumulate});
  }
}

// Where a gradient's tasks write: straight to the result, or to float32 partial sums, one per chunk
// of rows, which a second pass adds in order.
struct GradPlan {
  int64_t rows, width, rank;
  int64_t chunk_rows, chunks;
  int64_t task_columns, column_blocks;
  int64_t d_stride;

  GradPlan(int64_t m, int64_t n, int64_t r) : rows(m), width(n), rank(r) {
    // Partial sums stay below an eighth of the tensor that is read.
    chunk_rows = round_up(std::max(kGradTaskRows, 16 * r), kGradRows);
    chunks = std::max<int64_t>(1, ceil_div(m, chunk_rows));
    task_columns = m > kGradFewRows ? kGradColumns : kGradFewColumns;
    column_blocks = ceil_div(n, task_columns);
    d_stride = task_columns + kGradPad;
  }
  int64_t tasks() const { return chunks * column_blocks; }
  int64_t partial_elements() const { return chunks > 1 ? tasks() * rank * d_stride : 0; }
};

// What a factor gradient is multiplied by: a number, and a number per column or null.
struct GradScale {
  float all;
  const float* columns = nullptr;
};

// D (rank, cols), scaled, to columns [col0, col0 + cols) of a factor gradient. Changes d; `turned`
// holds cols x rank floats.
void store_grad(const KernelTable& kernels, const Factor& out, int64_t col0, int64_t cols, float* d,
                int64_t d_stride, const GradScale& by, float* turned) {
  const int64_t rank = out.rank();
  const Matrix& m = out.matrix;
  const float scale = by.all;
  if (by.columns) {
    kernels.scale_columns(d, Dtype::kFloat32, d_stride, d, d_stride, rank, cols, by.columns + col0,
                          nullptr);
  }
  if (!out.rank_last) {
    kernels.store(mutable_element(m, 0, col0), m.dtype, m.stride, d, d_stride, rank, cols, scale);
    return;
  }
  kernels.transpose(reinterpret_cast<uint32_t*>(turned), rank, reinterpret_cast<const uint32_t*>(d),
                    d_stride, rank, cols);
  kernels.store(mutable_element(m, col0, 0), m.dtype, m.stride, turned, rank, cols, rank, scale);
}

void reduce_grad(const Runtime& runtime, const GradPlan& plan, float* partial, const Factor& out,
                 const GradScale& scale) {
  const int64_t size = plan.rank * plan.d_stride;
  run(runtime, plan.column_blocks, true, [&](int64_t begin, int64_t end) {
    TaskScratch scratch(static_cast<size_t>(size) * sizeof(float));
    for (int64_t block = begin; block < end; ++block) {
      float* total = partial + block * size;
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
        const float* part = partial + (chunk * plan.column_blocks + block) * size;
        for (int64_t i = 0; i < size; ++i) total[i] += part[i];
      }
      const int64_t col = block * plan.task_columns;
      store_grad(runtime.kernels, out, col, std::min(plan.task_columns, plan.width - col), total,
                 plan.d_stride, scale, static_cast<float*>(scratch.base()));
    }
  });
}

// Buffers of one gradient task.
template <typename Elem>
struct GradScratch {
  Layout layout;
  size_t d_at, turned_at, l_at, p_at, staged_at, panels_at;

  GradScratch(const GradPlan& plan) {
    const int64_t padded_rank = round_up(plan.rank, kPanel);
    d_at = layout.add<float>(plan.rank * plan.d_stride);
    turned_at = layout.add<float>(plan.rank * plan.d_stride);
    l_at = layout.add<Elem>(padded_rank * kGradRows);
    p_at = layout.add<Elem>(2 * padded_rank * kGradRows);
    staged_at = layout.add<Elem>(kGradRows * kColumnGroup);
    panels_at = layout.add<Elem>(kGradRows * kColumnGroup);
  }
};

template <typename Elem>
void grad(const Runtime& runtime, const Factor& out, const Matrix& big, const Matrix& p,
          const float* gate, const GradScale& scale, const Dropout* dropout) {
  const GradPlan plan(big.rows, big.cols, p.cols);
  CallScratch shared(static_cast<size_t>(plan.partial_elements()) * sizeof(float));
  float* partial = static_cast<float*>(shared.base());
  const bool parallel =
      plan.rows * plan.width * round_up(plan.rank, kPanel) > Engine<Elem>::kSerial.grad ||
      (dropout && plan.rows * plan.width > kSerialDropout);
  run(runtime, plan.tasks(), parallel, [&](int64_t begin, int64_t end) {
    GradScratch<Elem> buffers(plan);
    TaskScratch scratch(buffers.layout.bytes());
    void* base = scratch.base();
    Engine<Elem> engine(runtime.kernels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / plan.column_blocks * plan.chunk_rows;
      const int64_t last = std::min(first + plan.chunk_rows, plan.rows);
      const int64_t col = task % plan.column_blocks * plan.task_columns;
      const int64_t cols = std::min(plan.task_columns, plan.width - col);
      float* d = plan.chunks > 1 ? partial + task * plan.rank * plan.d_stride
                                 : at<float>(base, buffers.d_at);
      for (int64_t row = first; row < last; row += kGradRows) {
        const int64_t rows = std::min(kGradRows, last - row);
        Elem* l = at<Elem>(base, buffers.l_at);
        transpose_p(runtime.kernels, l, p, row, rows, gate, at<Elem>(base, buffers.p_at));
        grad_block(runtime.kernels, engine, big, row, rows, col, cols, l, plan.rank, dropout, d,
                   plan.d_stride, row > first, at<Elem>(base, buffers.staged_at),
                   at<Elem>(base, buffers.panels_at));
      }
      if (plan.chunks == 1) {
        store_grad(runtime.kernels, out, col, cols, d, plan.d_stride, scale,
                   at<float>(base, buffers.turned_at));
      }
    }
  });
  if (plan.chunks > 1) reduce_grad(runtime, plan, partial, out, scale);
}

// ---- Q and dB from one reading of dY ------------------------------------------------------------

// One block of `dora_scale_grad`: dU where it is wanted, and, where `inner` is not null, more of
// the sums over rows there (one per column of the whole).
void scale_grad_block(const KernelTable& kernels, const ScaleGrad& to, const Matrix& grad_y,
                      int64_t row, int64_t rows, int64_t col, int64_t cols, float* inner) {
  const Matrix* u = inner ? to.u : nullptr;
  const bool write = to.grad_u.data;
  if (!write && !u) return;
  kernels.scale_grad(write ? mutable_element(to.grad_u, row, col) : nullptr, grad_y.dtype,
                     to.grad_u.stride, element(grad_y, row, col), grad_y.stride,
                     u ? element(*u, row, col) : nullptr, u ? u->stride : 0, rows, cols,
                     to.column_scale + col, inner ? inner + col : nullptr);
}

// grad_m from the sums of `chunks` ranges of rows, added in order.
void store_grad_m(const ScaleGrad& to, const float* inner, int64_t chunks, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    float total = inner[j];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) total += inner[chunk * n + j];
    to.grad_m[j] = to.norm[j] == 0.0f ? 0.0f : total / to.norm[j];
  }
}

template <typename Elem>
void down_grad(const Runtime& runtime, const Matrix& q, const Matrix& grad_b, const Matrix& grad_y,
               const PanelSource& lora_b, const Matrix& p, const float* gate,
               const GradScale& scale, const ScaleGrad* scale_grad = nullptr) {
  const GradPlan plan(grad_y.rows, grad_y.cols, p.cols);
  const int64_t m = plan.rows, rank = plan.rank;
  const int64_t panels = ceil_div(rank, kPanel), padded = Engine<Elem>::depth(plan.width);
  const int64_t q_stride = panels * kPanel;
  const Factor out{grad_b, true};

  // A task holds all columns of Q over its own columns of dY: one partial Q per block of columns.
  Layout layout;
  const size_t packed_at = layout.add<Elem>(panels * kPanel * padded);
  const size_t partial_at = layout.add<float>(plan.partial_elements());
  const size_t q_at = layout.add<float>(plan.column_blocks * m * q_stride);
  const bool sums_m = scale_grad && scale_grad->grad_m;
  const size_t inner_at = layout.add<float>(sums_m ? plan.chunks * plan.width : 0);
  CallScratch shared(layout.bytes());
  float* inner = sums_m ? at<float>(shared.base(), inner_at) : nullptr;
  std::fill_n(inner, sums_m ? plan.chunks * plan.width : 0, 0.0f);
  Elem* packed = at<Elem>(shared.base(), packed_at);
  float* partial = at<float>(shared.base(), partial_at);
  float* partial_q = at<float>(shared.base(), q_at);

  const bool parallel = 2 * m * plan.width * q_stride > Engine<Elem>::kSerial.grad;
  const bool pack_inside = plan.chunks == 1 && plan.task_columns % kPackDepth == 0;
  if (!pack_inside) pack_all(runtime, packed, padded, lora_b);
  run(runtime, plan.tasks(), parallel, [&](int64_t begin, int64_t end) {
    GradScratch<Elem> buffers(plan);
    const size_t slice_at = buffers.layout.template add<Elem>(kRowBlock * kDepthBlock);
    const size_t pack_at = buffers.layout.template add<Elem>(kPackBuffer);
    TaskScratch scratch(buffers.layout.bytes());
    void* base = scratch.base();
    Engine<Elem> engine(runtime.kernels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % plan.column_blocks;
      const int64_t first = task / plan.column_blocks * plan.chunk_rows;
      const int64_t last = std::min(first + plan.chunk_rows, plan.rows);
      const int64_t col = block * plan.task_columns;
      const int64_t cols = std::min(plan.task_columns, plan.width - col);
      if (pack_inside) {
        for (int64_t panel = 0; panel < panels; panel += kPackPanels) {
          for (int64_t k0 = col; k0 < col + cols; k0 += kPackDepth) {
            pack_block(runtime.kernels, packed, padded, lora_b, panel,
                       std::min(panel + kPackPanels, panels), k0, std::min(k0 + kPackDepth, padded),
                       at<void>(base, pack_at));
          }
        }
      }
      float* d =
          plan.chunks > 1 ? partial + task * rank * plan.d_stride : at<float>(base, buffers.d_at);
      for (int64_t row = first; row < last; row += kGradRows) {
        const int64_t rows = std::min(kGradRows, last - row);
        if (scale_grad) {
          scale_grad_block(runtime.kernels, *scale_grad, grad_y, row, rows, col, cols,
                           sums_m ? inner + first / plan.chunk_rows * plan.width : nullptr);
        }
        for (int64_t i = row; i < row + rows; i += kRowBlock) {
          down_block(engine, grad_y, i, std::min(kRowBlock, row + rows - i), col, cols,
                     packed + col * kPanel, panels, padded * kPanel,
                     static_cast<const Dropout*>(nullptr), partial_q + (block * m + i) * q_stride,
                     q_stride, at<Elem>(base, slice_at));
        }
        // This block is in the cache now.
        Elem* l = at<Elem>(base, buffers.l_at);
        transpose_p(runtime.kernels, l, p, row, rows, gate, at<Elem>(base, buffers.p_at));
        grad_block(runtime.kernels, engine, grad_y, row, rows, col, cols, l, rank, nullptr, d,
                   plan.d_stride, row > first, at<Elem>(base, buffers.staged_at),
                   at<Elem>(base, buffers.panels_at));
      }
      if (plan.chunks == 1) {
        store_grad(runtime.kernels, out, col, cols, d, plan.d_stride, scale,
                   at<float>(base, buffers.turned_at));
      }
    }
  });
  if (plan.chunks > 1) reduce_grad(runtime, plan, partial, out, scale);
  if (sums_m) store_grad_m(*scale_grad, inner, plan.chunks, plan.width);

  constexpr int64_t kReduceRows = 64;
  const int64_t q_elements = m * q_stride;
  const bool parallel_q = plan.column_blocks * q_elements > (int64_t{1} << 16);
  run(runtime, ceil_div(m, kReduceRows), parallel_q, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kReduceRows, rows = std::min(kReduceRows, m - row);
      float* total = partial_q + row * q_stride;
      for (int64_t part = 1; part < plan.column_blocks; ++part) {
        const float* more = partial_q + part * q_elements + row * q_stride;
        for (int64_t i = 0; i < rows * q_stride; ++i) total[i] += more[i];
      }
      runtime.kernels.store(mutable_element(q, row, 0), q.dtype, q.stride, total, q_stride, rows,
                            rank, 1.0f);
    }
  });
}

void zero(const Matrix& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    std::memset(mutable_element(m, i, 0), 0, static_cast<size_t>(m.cols * dtype_bytes(m.dtype)));
  }
}

bool on_tiles(const Runtime& runtime, Dtype dtype) {
  return dtype == Dtype::kBFloat16 && runtime.kernels.multiply_bfloat16;
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

void lora_linear(const Runtime& runtime, const Matrix& y, const Matrix& p, const Matrix& x,
                 const Matrix& weight, const Matrix& lora_b, const float* gate, float scale,
                 const Epilogue& epilogue, const DoraNorm* norm, uint64_t* weight_hashes) {
  if (norm && (y.rows == 0 || y.rows > kProductRows)) {
    dora_norm(runtime, weight, *norm);
    norm = nullptr;
  }
  if (y.rows == 0 || y.cols == 0) {
    if (weight_hashes) hash_rows(runtime, weight, weight_hashes);
    return;
  }
  const ScaledP scaled(runtime.kernels, p, gate, scale);
  if (on_tiles(runtime, x.dtype)) {
    linear<uint16_t>(runtime, y, scaled.matrix, x, weight, lora_b, epilogue, norm, weight_hashes);
  } else {
    linear<float>(runtime, y, scaled.matrix, x, weight, lora_b, epilogue, norm, weight_hashes);
  }
}

void lora_grad_x(const Runtime& runtime, const Matrix& grad_x, const Matrix& q,
                 const Matrix& grad_y, const Matrix& weight, const Matrix& lora_a,
                 const float* gate, float scale, const Dropout* dropout, const float* row_scale) {
  if (grad_x.rows == 0 || grad_x.cols == 0) return;
  const ScaledP scaled(runtime.kernels, q, gate, scale);
  const PanelSource w{weight, false, row_scale}, a{lora_a, false};
  if (grad_y.rows <= kDotRows && weight.rows > 0) {
    grad_x_by_mixing(runtime, grad_x, scaled.matrix, grad_y, weight, lora_a, dropout, row_scale);
  } else if (on_tiles(runtime, grad_y.dtype)) {
    linear_many_rows<uint16_t>(runtime, grad_x, scaled.matrix, grad_y, w, a, {}, dropout);
  } else {
    linear_many_rows<float>(runtime, grad_x, scaled.matrix, grad_y, w, a, {}, dropout);
  }
}

void lora_up(const Runtime& runtime, const Matrix& y, const Matrix& p, const Factor& factor,
             const float* gate, float scale, const Dropout* dropout, const float* column_scale,
             const float* bias, const Matrix* scaled) {
  if (y.rows == 0 || y.cols == 0 || p.cols == 0) return;
  if (on_tiles(runtime, y.dtype)) {
    up<uint16_t>(runtime, y, p, factor, gate, scale, dropout, column_scale, bias, scaled);
  } else {
    up<float>(runtime, y, p, factor, gate, scale, dropout, column_scale, bias, scaled);
  }
}

void dora_scale_grad(const Runtime& runtime, const ScaleGrad& scale_grad, const Matrix& grad_y) {
  constexpr int64_t kRows = 32, kColumns = 512;
  const int64_t m = grad_y.rows, n = grad_y.cols;
  std::vector<float> inner(static_cast<size_t>(scale_grad.grad_m ? n : 0));
  // A task owns its columns, and adds up their rows from first to last.
  run(runtime, ceil_div(n, kColumns), m * n > (int64_t{1} << 15), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t col = task * kColumns, cols = std::min(kColumns, n - col);
      for (int64_t row = 0; row < m; row += kRows) {
        scale_grad_block(runtime.kernels, scale_grad, grad_y, row, std::min(kRows, m - row), col,
                         cols, inner.empty() ? nullptr : inner.data());
      }
    }
  });
  if (scale_grad.grad_m) store_grad_m(scale_grad, inner.data(), 1, n);
}

void lora_grad(const Runtime& runtime, const Factor& out, const Matrix& big, const Matrix& p,
               const float* gate, float scale, const Dropout* dropout, const float* column_scale) {
  if (out.rank() == 0 || out.width() == 0) return;
  if (big.rows == 0) return zero(out.matrix);
  const GradScale by{scale, column_scale};
  if (on_tiles(runtime, big.dtype)) {
    grad<uint16_t>(runtime, out, big, p, gate, by, dropout);
  } else {
    grad<float>(runtime, out, big, p, gate, by, dropout);
  }
}

void lora_down_grad(const Runtime& runtime, const Matrix& q, const Matrix& grad_b,
                    const Matrix& grad_y, const Matrix& lora_b, const Matrix& p, const float* gate,
                    float scale, const ScaleGrad* scale_grad) {
  const float* column_scale = scale_grad ? scale_grad->column_scale : nullptr;
  // Above some rank the arithmetic outweighs a second reading, and the partial Q would be large.
  if (q.cols > 64 || q.rows == 0 || q.cols == 0 || grad_y.cols == 0) {
    if (scale_grad) dora_scale_grad(runtime, *scale_grad, grad_y);
    lora_down(runtime, q, grad_y, {lora_b, true}, 1.0f, nullptr, column_scale);
    lora_grad(runtime, {grad_b, true}, grad_y, p, gate, scale, nullptr, column_scale);
    return;
  }
  const PanelSource source{lora_b, false, column_scale};  // Q = (g * dY) B = dY (g * B)
  const GradScale by{scale, column_scale};
  if (on_tiles(runtime, grad_y.dtype)) {
    down_grad<uint16_t>(runtime, q, grad_b, grad_y, source, p, gate, by, scale_grad);
  } else {
    down_grad<float>(runtime, q, grad_b, grad_y, source, p, gate, by, scale_grad);
  }
}

void dropout_keep_mask(const Runtime& runtime, uint8_t* out, int64_t rows, int64_t cols,
                       const Dropout& dropout) {
  if (cols == 0) return;
  constexpr int64_t kMaskRows = 16;
  run(runtime, ceil_div(rows, kMaskRows), rows * cols > kSerialDropout,
      [&](int64_t begin, int64_t end) {
        const int64_t row = begin * kMaskRows, last = std::min(end * kMaskRows, rows);
        runtime.kernels.keep_mask(out + row * cols, cols, last - row, cols, dropout, row);
      });
}

}  // namespace lrk
