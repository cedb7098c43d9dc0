// Sparse Matrix Tuning on the primitives of kernel_table.h.
//
// Blocks are taken in groups, ordered by column and row. A task sweeps a range of tokens for one
// group, a slice at a time: it packs each column block of x that the group needs once, each row
// block of dY once (transposed), and multiplies every block of the group from these while they are
// in the cache.
#include "block_sparse.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "../philox.h"
#include "scratch.h"

namespace lrk {
namespace {

// Of packed operands of one side: they stay in the second-level cache.
constexpr int64_t kGroupBytes = int64_t{1} << 19;
constexpr int64_t kSplitRows = 512;  // tokens of a task at least
constexpr int64_t kTasks = 16;       // enough of them; more would cost partial sums

// ---- the two element types of a block product --------------------------------------------------

template <typename Elem>
struct Packer;

template <>
struct Packer<float> {
  static constexpr int64_t kSlice = 64;  // tokens of one packed slice; short float32 runs err less

  explicit Packer(const KernelTable& kernels) : kernels(kernels) {}

  int64_t depth(int64_t tokens) const { return tokens; }

  // `panels`: 16 columns each, kSlice rows apart.
  void right(float* panels, float*, const Matrix& x, int64_t row, int64_t col, int64_t rows,
             int64_t cols) const {
    stage_panels(kernels, panels, kSlice * kPanel, {x, row, col, rows, cols});
  }

  // `l`: (columns of dY, tokens), rows kSlice apart.
  void left(float* l, float* buffer, const Matrix& dy, int64_t row, int64_t col, int64_t rows,
            int64_t cols) const {
    Source s = rectangle(dy, row, col, rows, cols);
    const float* in = static_cast<const float*>(s.data);
    int64_t stride = s.stride;
    if (s.dtype != Dtype::kFloat32) {
      kernels.stage_float(buffer, cols, s);
      in = buffer;
      stride = cols;
    }
    kernels.transpose(reinterpret_cast<uint32_t*>(l), kSlice, reinterpret_cast<const uint32_t*>(in),
                      stride, rows, cols);
  }

  void multiply(const BlockProduct<float>& block) const { kernels.multiply_float(block); }

  const KernelTable& kernels;
};

template <>
struct Packer<uint16_t> {
  static constexpr int64_t kSlice = 128;

  explicit Packer(const KernelTable& kernels) : kernels(kernels) {}
  ~Packer() {
    // The tile state goes back to its initial value, as whoever runs next on this thread expects.
    if (tile_shape_) kernels.release();
  }
  Packer(const Packer&) = delete;
  Packer& operator=(const Packer&) = delete;

  int64_t depth(int64_t tokens) const { return round_up(tokens, tokens <= 32 ? 2 : 32); }

  void right(uint16_t* panels, uint16_t*, const Matrix& x, int64_t row, int64_t col, int64_t rows,
             int64_t cols) const {
    kernels.interleave(panels, kSlice * kPanel, static_cast<const uint16_t*>(element(x, row, col)),
                       x.stride, rows, depth(rows), cols, nullptr);
  }

  void left(uint16_t* l, uint16_t* buffer, const Matrix& dy, int64_t row, int64_t col, int64_t rows,
            int64_t cols) const {
    const int64_t tokens = depth(rows);
    right(buffer, nullptr, dy, row, col, rows, cols);
    // A panel is (token pair, column) in 32-bit words; L wants (column, token pair).
    for (int64_t c = 0; c < cols; c += kPanel) {
      kernels.transpose(reinterpret_cast<uint32_t*>(l + c * kSlice), kSlice / 2,
                        reinterpret_cast<const uint32_t*>(buffer + c * kSlice), kPanel, tokens / 2,
                        std::min(kPanel, cols - c));
    }
  }

  void multiply(const BlockProduct<uint16_t>& block) const {
    kernels.multiply_bfloat16(block, &tile_shape_);
  }

  const KernelTable& kernels;

 private:
  mutable uint32_t tile_shape_ = 0;
};

// ---- gradients ---------------------------------------------------------------------------------

struct Group {
  std::vector<int32_t> columns, rows;      // the distinct ones that its blocks need
  std::vector<int64_t> column_at, row_at;  // a block's place among them
};

struct GradPlan {
  std::vector<int64_t> order;  // blocks, by column and row
  std::vector<Group> groups;
  int64_t group_blocks, chunk_rows, chunks;

  GradPlan(const Blocks& out, int64_t tokens, int64_t slice_bytes) : order(out.count) {
    std::iota(order.begin(), order.end(), int64_t{0});
    const int32_t* index = out.index;
    std::sort(order.begin(), order.end(), [index](int64_t a, int64_t b) {
      const int32_t ca = index[2 * a + 1], cb = index[2 * b + 1];
      return ca != cb ? ca < cb : index[2 * a] < index[2 * b];
    });
    const int64_t side = std::max(out.rows, out.cols) * slice_bytes;
    const int64_t most = std::max<int64_t>(1, kGroupBytes / side);
    const int64_t count = ceil_div(out.count, most);
    group_blocks = ceil_div(out.count, count);
    for (int64_t first = 0; first < out.count; first += group_blocks) {
      groups.push_back(make_group(index, first, std::min(first + group_blocks, out.count)));
    }
    const int64_t wanted = std::max<int64_t>(1, kTasks / static_cast<int64_t>(groups.size()));
    const int64_t parts = std::max<int64_t>(1, std::min(tokens / kSplitRows, wanted));
    chunk_rows = std::max(kSplitRows, round_up(ceil_div(tokens, parts), kSplitRows / 4));
    chunks = std::max<int64_t>(1, ceil_div(tokens, chunk_rows));
  }

  Group make_group(const int32_t* index, int64_t begin, int64_t end) const {
    Group group;
    for (int64_t b = begin; b < end; ++b) {
      group.columns.push_back(index[2 * order[b] + 1]);
      group.rows.push_back(index[2 * order[b]]);
    }
    std::vector<int32_t> columns = group.columns, rows = group.rows;
    unique(group.columns);
    unique(group.rows);
    for (size_t b = 0; b < columns.size(); ++b) {
      group.column_at.push_back(place(group.columns, columns[b]));
      group.row_at.push_back(place(group.rows, rows[b]));
    }
    return group;
  }

  static void unique(std::vector<int32_t>& values) {
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
  }
  static int64_t place(const std::vector<int32_t>& values, int32_t value) {
    return std::lower_bound(values.begin(), values.end(), value) - values.begin();
  }
};

template <typename Elem>
void grad(const Runtime& runtime, const Blocks& out, const Matrix& x, const Matrix& grad_y) {
  constexpr int64_t kSlice = Packer<Elem>::kSlice;
  const int64_t bm = out.rows, bn = out.cols, size = bm * bn, tokens = x.rows;
  const GradPlan plan(out, tokens, kSlice * static_cast<int64_t>(sizeof(Elem)));
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  const bool split = plan.chunks > 1;
  CallScratch shared(static_cast<size_t>(split ? plan.chunks * out.count * size : 0) *
                     sizeof(float));
  float* partial = static_cast<float*>(shared.base());
  const auto store = [&](int64_t block, const float* sums) {
    void* to = static_cast<char*>(out.data) + block * size * dtype_bytes(out.dtype);
    runtime.kernels.store(to, out.dtype, bn, sums, bn, bm, bn, 1.0f);
  };

  run(runtime, plan.chunks * groups, true, [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t right_at = layout.add<Elem>(plan.group_blocks * bn * kSlice);
    const size_t left_at = layout.add<Elem>(plan.group_blocks * bm * kSlice);
    const size_t buffer_at = layout.add<Elem>(round_up(bm, kPanel) * kSlice);
    const size_t sums_at = layout.add<float>(split ? 0 : plan.group_blocks * size);
    TaskScratch scratch(layout.bytes());
    Elem* rights = at<Elem>(scratch.base(), right_at);
    Elem* lefts = at<Elem>(scratch.base(), left_at);
    Elem* buffer = at<Elem>(scratch.base(), buffer_at);
    const Packer<Elem> packer(runtime.kernels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / groups, first_block = task % groups * plan.group_blocks;
      const Group& group = plan.groups[static_cast<size_t>(task % groups)];
      const int64_t count = static_cast<int64_t>(group.column_at.size());
      float* sums = split ? partial + (chunk * out.count + first_block) * size
                          : at<float>(scratch.base(), sums_at);
      // Zero where a block sticks out of W, and where there is no token.
      std::memset(sums, 0, static_cast<size_t>(count * size) * sizeof(float));
      const int64_t first = chunk * plan.chunk_rows;
      const int64_t last = std::min(first + plan.chunk_rows, tokens);
      for (int64_t row = first; row < last; row += kSlice) {
        const int64_t rows = std::min(kSlice, last - row), depth = packer.depth(rows);
        for (size_t c = 0; c < group.columns.size(); ++c) {
          const int64_t col = group.columns[c] * bn, cols = std::min(bn, x.cols - col);
          packer.right(rights + static_cast<int64_t>(c) * bn * kSlice, buffer, x, row, col, rows,
                       cols);
        }
        for (size_t r = 0; r < group.rows.size(); ++r) {
          const int64_t col = group.rows[r] * bm, cols = std::min(bm, grad_y.cols - col);
          packer.left(lefts + static_cast<int64_t>(r) * bm * kSlice, buffer, grad_y, row, col, rows,
                      cols);
        }
        for (int64_t b = 0; b < count; ++b) {
          const int64_t c = group.column_at[static_cast<size_t>(b)];
          const int64_t r = group.row_at[static_cast<size_t>(b)];
          const int64_t col = group.columns[static_cast<size_t>(c)] * bn;
          const int64_t row_of_w = group.rows[static_cast<size_t>(r)] * bm;
          packer.multiply({std::min(bm, grad_y.cols - row_of_w),
                           ceil_div(std::min(bn, x.cols - col), kPanel), depth,
                           lefts + r * bm * kSlice, kSlice, rights + c * bn * kSlice, kPanel,
                           kSlice * kPanel, sums + b * size, bn, true});
        }
      }
      if (split) continue;
      for (int64_t b = 0; b < count; ++b) store(plan.order[first_block + b], sums + b * size);
    }
  });
  if (!split) return;
  run(runtime, out.count, true, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* total = partial + b * size;
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
        const float* part = partial + (chunk * out.count + b) * size;
        for (int64_t i = 0; i < size; ++i) total[i] += part[i];
      }
      store(plan.order[b], total);
    }
  });
}

// ---- AdamW -------------------------------------------------------------------------------------

// float32 to bfloat16, up where the lower half of the element's word carries. NaN stays NaN.
uint16_t stochastic_bfloat16(float value, uint32_t word) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + (word & 0xffffu)) >> 16);
}

// Block b into the weight, through a buffer of its size; `staged`: it holds the block already.
void write_block(const KernelTable& kernels, const Blocks& blocks, int64_t b, const Matrix& weight,
                 float* buffer, bool staged) {
  const int64_t size = blocks.rows * blocks.cols;
  if (!staged) {
    char* packed = static_cast<char*>(blocks.data) + b * size * dtype_bytes(blocks.dtype);
    kernels.stage_float(buffer, size,
                        rectangle({packed, blocks.dtype, 1, size, size}, 0, 0, 1, size));
  }
  const int64_t row = blocks.index[2 * b] * blocks.rows;
  const int64_t col = blocks.index[2 * b + 1] * blocks.cols;
  kernels.store(mutable_element(weight, row, col), weight.dtype, weight.stride, buffer, blocks.cols,
                std::min(blocks.rows, weight.rows - row), std::min(blocks.cols, weight.cols - col),
                1.0f);
}

}  // namespace

void write_blocks(const Runtime& runtime, const Blocks& blocks, const Matrix& weight) {
  const int64_t size = blocks.rows * blocks.cols;
  run(runtime, blocks.count, blocks.count * size > (int64_t{1} << 16),
      [&](int64_t begin, int64_t end) {
        TaskScratch scratch(static_cast<size_t>(size) * sizeof(float));
        float* buffer = static_cast<float*>(scratch.base());
        for (int64_t b = begin; b < end; ++b) {
          write_block(runtime.kernels, blocks, b, weight, buffer, false);
        }
      });
}

void block_grad(const Runtime& runtime, const Blocks& out, const Matrix& x, const Matrix& grad_y) {
  if (out.count == 0) return;
  if (on_tiles(runtime, x.dtype)) {
    grad<uint16_t>(runtime, out, x, grad_y);
  } else {
    grad<float>(runtime, out, x, grad_y);
  }
}

void block_adamw(const Runtime& runtime, const Blocks& blocks, const void* grad, Dtype grad_dtype,
                 float* exp_avg, float* exp_avg_sq, const Matrix& weight, const AdamW& s) {
  const int64_t size = blocks.rows * blocks.cols;
  const KernelTable& kernels = runtime.kernels;
  run(runtime, blocks.count, true, [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t value_at = layout.add<float>(size), grad_at = layout.add<float>(size);
    TaskScratch scratch(layout.bytes());
    float* p = at<float>(scratch.base(), value_at);
    float* g = at<float>(scratch.base(), grad_at);
    for (int64_t b = begin; b < end; ++b) {
      char* packed = static_cast<char*>(blocks.data) + b * size * dtype_bytes(blocks.dtype);
      const Matrix value{packed, blocks.dtype, 1, size, size};
      const Matrix gradient{
          static_cast<char*>(const_cast<void*>(grad)) + b * size * dtype_bytes(grad_dtype),
          grad_dtype, 1, size, size};
      kernels.stage_float(p, size, rectangle(value, 0, 0, 1, size));
      kernels.stage_float(g, size, rectangle(gradient, 0, 0, 1, size));
      float* m = exp_avg + b * size;
      float* v = exp_avg_sq + b * size;
      for (int64_t i = 0; i < size; ++i) {
        m[i] += (1.0f - s.beta1) * (g[i] - m[i]);
        v[i] = s.beta2 * v[i] + (1.0f - s.beta2) * g[i] * g[i];
        p[i] = s.keep * p[i] - s.rate * m[i] / (std::sqrt(v[i]) / s.root_correction + s.eps);
      }
      if (s.stochastic) {
        uint16_t* to = reinterpret_cast<uint16_t*>(packed);
        for (int64_t i = 0; i < size; i += 4) {
          const PhiloxWords words =
              philox_words(s.key0, s.key1, static_cast<uint32_t>(i / 4), static_cast<uint32_t>(b));
          for (int64_t j = 0; j < 4; ++j) to[i + j] = stochastic_bfloat16(p[i + j], words.word[j]);
        }
      } else {
        kernels.store(packed, blocks.dtype, size, p, size, 1, size, 1.0f);
      }
      write_block(kernels, blocks, b, weight, p, blocks.dtype == Dtype::kFloat32);
    }
  });
}

}  // namespace lrk
