// The gradients of the factors: (p * gate)^T drop(big), where one side has the rank and the other a
// width; and Q = dY B with the gradient of B, from one reading of dY.
#include <algorithm>

#include "block_product.h"
#include "lora.h"

namespace lrk {
namespace {

// How sums and work are cut, beyond block_product.h.
constexpr int64_t kColumnGroup = 64;    // columns of a block product
constexpr int64_t kGradRows = 32;       // reduction slice: as many streams as a prefetcher follows
constexpr int64_t kGradColumns = 2048;  // columns of one task: whole pages of rows ...
constexpr int64_t kGradFewColumns = 1024;  // ... and where there are few rows to share out
constexpr int64_t kGradFewRows = 512;      // which these are
constexpr int64_t kGradTaskRows = 256;     // rows of one task
constexpr int64_t kGradPad = 16;           // sums a power of two apart would share cache sets

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

// The buffers of one gradient task, laid out, and then at hand.
template <typename Elem>
class GradScratch {
 public:
  explicit GradScratch(const GradPlan& plan) {
    const int64_t padded_rank = round_up(plan.rank, kPanel);
    d_at_ = layout.add<float>(plan.rank * plan.d_stride);
    turned_at_ = layout.add<float>(plan.rank * plan.d_stride);
    l_at_ = layout.add<Elem>(padded_rank * kGradRows);
    p_at_ = layout.add<Elem>(2 * padded_rank * kGradRows);
    staged_at_ = layout.add<Elem>(kGradRows * kColumnGroup);
    panels_at_ = layout.add<Elem>(kGradRows * kColumnGroup);
  }
  void claim(void* base) {
    d = at<float>(base, d_at_);
    turned = at<float>(base, turned_at_);
    l = at<Elem>(base, l_at_);
    p = at<Elem>(base, p_at_);
    staged = at<Elem>(base, staged_at_);
    panels = at<Elem>(base, panels_at_);
  }

  Layout layout;
  float* d = nullptr;       // the sums, (rank, columns of the task)
  float* turned = nullptr;  // the same, transposed
  Elem* l = nullptr;        // (rank, kGradRows): a slice of p * gate, transposed
  Elem* p = nullptr;        // on its way there
  Elem* staged = nullptr;   // (kGradRows, kColumnGroup) of the wide side, converted ...
  Elem* panels = nullptr;   // ... and in panels

 private:
  size_t d_at_, turned_at_, l_at_, p_at_, staged_at_, panels_at_;
};

// buffers.l = rows [row0, row0 + rows) of p * gate, transposed to (rank, kGradRows).
void transpose_p(const KernelTable& kernels, const GradScratch<float>& buffers, const Matrix& p,
                 int64_t row0, int64_t rows, const float* gate) {
  Source s = rectangle(p, row0, 0, rows, p.cols);
  s.col_scale = gate;
  kernels.stage_float(buffers.p, p.cols, s);
  kernels.transpose(reinterpret_cast<uint32_t*>(buffers.l), kGradRows,
                    reinterpret_cast<uint32_t*>(buffers.p), p.cols, rows, p.cols);
}

void transpose_p(const KernelTable& kernels, const GradScratch<uint16_t>& buffers, const Matrix& p,
                 int64_t row0, int64_t rows, const float* gate) {
  const int64_t padded_rank = round_up(p.cols, kPanel);
  const int64_t depth = Engine<uint16_t>::depth(rows);
  Source s = rectangle(p, row0, 0, rows, p.cols);
  s.padded_cols = padded_rank;
  s.col_scale = gate;
  uint16_t* panels = buffers.p + kGradRows * padded_rank;
  kernels.stage_bfloat16(buffers.p, padded_rank, s);
  kernels.interleave(panels, depth * kPanel, buffers.p, padded_rank, rows, depth, padded_rank,
                     nullptr);
  // A panel is (row pair, column) in 32-bit words; L wants (column, row pair).
  for (int64_t r = 0; r < p.cols; r += kPanel) {
    kernels.transpose(reinterpret_cast<uint32_t*>(buffers.l + r * kGradRows), kGradRows / 2,
                      reinterpret_cast<uint32_t*>(panels + r * depth), kPanel, depth / 2,
                      std::min(kPanel, p.cols - r));
  }
}

// d (rank, cols of big padded to panels) = buffers.l times drop(big), added to d where `accumulate`
// says so.
void grad_block(const Engine<float>& engine, const GradScratch<float>& buffers, const Region& big,
                int64_t rank, const Sums& d, bool accumulate, const Dropout* dropout) {
  for (int64_t j = 0; j < big.cols; j += kColumnGroup) {
    const int64_t n = std::min(kColumnGroup, big.cols - j);
    const float* g = static_cast<const float*>(element(big.whole, big.row, big.col + j));
    int64_t g_stride = big.whole.stride;
    if (big.whole.dtype != Dtype::kFloat32 || dropout || n % kPanel) {
      Source s = rectangle(big.whole, big.row, big.col + j, big.rows, n);
      s.padded_cols = round_up(n, kPanel);
      s.dropout = dropout;
      engine.stage(buffers.staged, kColumnGroup, s);
      g = buffers.staged;
      g_stride = kColumnGroup;
    }
    engine.multiply({rank, ceil_div(n, kPanel), big.rows, buffers.l, kGradRows, g, g_stride, kPanel,
                     d.data + j, d.stride, accumulate});
  }
}

void grad_block(const Engine<uint16_t>& engine, const GradScratch<uint16_t>& buffers,
                const Region& big, int64_t rank, const Sums& d, bool accumulate,
                const Dropout* dropout) {
  const int64_t depth = Engine<uint16_t>::depth(big.rows);
  for (int64_t j = 0; j < big.cols; j += kColumnGroup) {
    const int64_t n = std::min(kColumnGroup, big.cols - j);
    const uint16_t* in = static_cast<const uint16_t*>(element(big.whole, big.row, big.col + j));
    int64_t stride = big.whole.stride;
    if (big.whole.dtype != Dtype::kBFloat16 || dropout) {
      Source s = rectangle(big.whole, big.row, big.col + j, big.rows, n);
      s.dropout = dropout;
      engine.stage(buffers.staged, kColumnGroup, s);
      in = buffers.staged;
      stride = kColumnGroup;
    }
    engine.kernels().interleave(buffers.panels, depth * kPanel, in, stride, big.rows, depth, n,
                                nullptr);
    engine.multiply({rank, ceil_div(n, kPanel), depth, buffers.l, kGradRows, buffers.panels, kPanel,
                     depth * kPanel, d.data + j, d.stride, accumulate});
  }
}

// What a factor gradient is multiplied by: a number, and a number per column or null.
struct GradScale {
  float all;
  const float* columns = nullptr;
};

// d (rank, cols), scaled, to columns [col0, col0 + cols) of a factor gradient. Changes d; `turned`
// holds cols x rank floats.
void store_grad(const KernelTable& kernels, const Factor& out, int64_t col0, int64_t cols,
                const Sums& sums, const GradScale& by, float* turned) {
  float* d = sums.data;
  const int64_t d_stride = sums.stride;
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

// Adds up the partial sums of a plan with several chunks, first to last, into its first, and stores
// them.
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
      store_grad(runtime.kernels, out, col, std::min(plan.task_columns, plan.width - col),
                 {total, plan.d_stride}, scale, static_cast<float*>(scratch.base()));
    }
  });
}

// The rows [first, last) and columns [col, col + cols) that a task of a plan reads.
struct GradTask {
  int64_t first, last, col, cols;

  GradTask(const GradPlan& plan, int64_t task)
      : first(task / plan.column_blocks * plan.chunk_rows),
        last(std::min(first + plan.chunk_rows, plan.rows)),
        col(task % plan.column_blocks * plan.task_columns),
        cols(std::min(plan.task_columns, plan.width - col)) {}
};

template <typename Elem>
void grad_of(const Runtime& runtime, const LoraGrad& grad) {
  const KernelTable& kernels = runtime.kernels;
  const GradPlan plan(grad.big.rows, grad.big.cols, grad.p.cols);
  const GradScale scale{grad.scale, grad.column_scale};
  CallScratch shared(static_cast<size_t>(plan.partial_elements()) * sizeof(float));
  float* partial = static_cast<float*>(shared.base());
  const bool parallel =
      plan.rows * plan.width * round_up(plan.rank, kPanel) > Engine<Elem>::kSerial.grad ||
      (grad.dropout && plan.rows * plan.width > kSerialDropout);
  run(runtime, plan.tasks(), parallel, [&](int64_t begin, int64_t end) {
    GradScratch<Elem> buffers(plan);
    TaskScratch scratch(buffers.layout.bytes());
    buffers.claim(scratch.base());
    Engine<Elem> engine(kernels);
    for (int64_t number = begin; number < end; ++number) {
      const GradTask task(plan, number);
      const Sums d{plan.chunks > 1 ? partial + number * plan.rank * plan.d_stride : buffers.d,
                   plan.d_stride};
      for (int64_t row = task.first; row < task.last; row += kGradRows) {
        const int64_t rows = std::min(kGradRows, task.last - row);
        transpose_p(kernels, buffers, grad.p, row, rows, grad.gate);
        grad_block(engine, buffers, {grad.big, row, task.col, rows, task.cols}, plan.rank, d,
                   row > task.first, grad.dropout);
      }
      if (plan.chunks == 1) {
        store_grad(kernels, grad.out, task.col, task.cols, d, scale, buffers.turned);
      }
    }
  });
  if (plan.chunks > 1) reduce_grad(runtime, plan, partial, grad.out, scale);
}

// ---- Q and dB from one reading of dY ------------------------------------------------------------

template <typename Elem>
void down_grad(const Runtime& runtime, const LoraDownGrad& grad) {
  const KernelTable& kernels = runtime.kernels;
  const Matrix &q = grad.q, &grad_y = grad.grad_y;
  const ScaleGrad* scale_grad = grad.scale_grad;
  const float* column_scale = scale_grad ? scale_grad->column_scale : nullptr;
  const PanelSource lora_b{grad.lora_b, false, column_scale};  // Q = (g * dY) B = dY (g * B)
  const GradScale scale{grad.scale, column_scale};
  const GradPlan plan(grad_y.rows, grad_y.cols, grad.p.cols);
  const int64_t m = plan.rows, rank = plan.rank;
  const int64_t panels = ceil_div(rank, kPanel), padded = Engine<Elem>::depth(plan.width);
  const int64_t q_stride = panels * kPanel;
  const Factor out{grad.grad_b, true};

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
    buffers.claim(scratch.base());
    Elem* slice = at<Elem>(scratch.base(), slice_at);
    Engine<Elem> engine(kernels);
    for (int64_t number = begin; number < end; ++number) {
      const GradTask task(plan, number);
      const int64_t block = number % plan.column_blocks;
      if (pack_inside) {
        for (int64_t panel = 0; panel < panels; panel += kPackPanels) {
          for (int64_t k0 = task.col; k0 < task.col + task.cols; k0 += kPackDepth) {
            const int64_t last_panel = std::min(panel + kPackPanels, panels);
            const int64_t k1 = std::min(k0 + kPackDepth, padded);
            pack_block(kernels, packed, padded, lora_b, {panel, last_panel, k0, k1},
                       at<void>(scratch.base(), pack_at));
          }
        }
      }
      const Panels<Elem> b_panels{packed + task.col * kPanel, panels, padded * kPanel};
      const Sums d{plan.chunks > 1 ? partial + number * rank * plan.d_stride : buffers.d,
                   plan.d_stride};
      for (int64_t row = task.first; row < task.last; row += kGradRows) {
        const int64_t rows = std::min(kGradRows, task.last - row);
        const Region dy{grad_y, row, task.col, rows, task.cols};
        if (scale_grad) {
          scale_grad_block(kernels, *scale_grad, dy,
                           sums_m ? inner + task.first / plan.chunk_rows * plan.width : nullptr);
        }
        for (int64_t i = row; i < row + rows; i += kRowBlock) {
          down_block(engine, {grad_y, i, task.col, std::min(kRowBlock, row + rows - i), task.cols},
                     b_panels, {partial_q + (block * m + i) * q_stride, q_stride}, slice);
        }
        // This block is in the cache now.
        transpose_p(kernels, buffers, grad.p, row, rows, grad.gate);
        grad_block(engine, buffers, dy, rank, d, row > task.first, nullptr);
      }
      if (plan.chunks == 1) {
        store_grad(kernels, out, task.col, task.cols, d, scale, buffers.turned);
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
      kernels.store(mutable_element(q, row, 0), q.dtype, q.stride, total, q_stride, rows, rank,
                    1.0f);
    }
  });
}

}  // namespace

void lora_grad(const Runtime& runtime, const LoraGrad& grad) {
  if (grad.out.rank() == 0 || grad.out.width() == 0) return;
  if (grad.big.rows == 0) return zero(grad.out.matrix);
  if (on_tiles(runtime, grad.big.dtype)) {
    grad_of<uint16_t>(runtime, grad);
  } else {
    grad_of<float>(runtime, grad);
  }
}

void lora_down_grad(const Runtime& runtime, const LoraDownGrad& grad) {
  const Matrix &q = grad.q, &grad_y = grad.grad_y;
  // Above some rank the arithmetic outweighs a second reading, and the partial Q would be large.
  if (q.cols > 64 || q.rows == 0 || q.cols == 0 || grad_y.cols == 0) {
    if (grad.scale_grad) dora_scale_grad(runtime, *grad.scale_grad, grad_y);
    const float* column_scale = grad.scale_grad ? grad.scale_grad->column_scale : nullptr;
    lora_down(runtime, q, grad_y, {grad.lora_b, true}, 1.0f, nullptr, column_scale);
    lora_grad(runtime,
              {{grad.grad_b, true}, grad_y, grad.p, grad.gate, grad.scale, nullptr, column_scale});
  } else if (on_tiles(runtime, grad_y.dtype)) {
    down_grad<uint16_t>(runtime, grad);
  } else {
    down_grad<float>(runtime, grad);
  }
}

}  // namespace lrk
