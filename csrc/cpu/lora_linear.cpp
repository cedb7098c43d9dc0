// The frozen product with the low-rank correction in its accumulators, so that the result is
// rounded once: y = x W^T + s (p * gate) B^T, and the same product the other way, for the gradient
// of x.
//
// Three ways to run it, by the number of rows of x; all sum in the same order but the first:
//   linear_by_dots    up to kDotRows, without tiles: each row of the weight times all rows of x
//   linear_few_rows   up to kFewRows: the weight's rows stream past x in panels
//   linear_many_rows  more: x's rows stream past blocks of the weight in panels
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "block_product.h"
#include "coded.h"
#include "few_rows.h"
#include "lora.h"
#include "row_hash.h"

namespace lrk {
namespace {

// How work is cut, beyond block_product.h and few_rows.h.
constexpr int64_t kProductTasks = 8;      // tasks that a product has, at least ...
constexpr int64_t kProductColumns = 256;  // ... and columns of a task, at most
constexpr int64_t kProductDepth = 2048;   // slice of the weight in a task's panels: 1 MiB
constexpr int64_t kProductRows = 1024;    // rows of y that one task takes, at most
constexpr int64_t kMixTasks = 8;          // tasks of grad_x_by_mixing, at least ...
constexpr int64_t kMixColumns = 256;      // ... columns of one, at most ...
constexpr int64_t kMixRows = 32;          // ... and rows of the weight in one of its sums
constexpr int64_t kDecodedRows = 8;       // of a coded weight that are decoded at a time

// A finished block of u = x W^T + s (p * gate) B^T, the sums of a region of y, goes out as
// `epilogue` says. Changes the sums.
void finish(const KernelTable& kernels, const Region& y, const Epilogue& epilogue, const Sums& c) {
  const Matrix& u = epilogue.u;
  if (u.data) {
    kernels.store(mutable_element(u, y.row, y.col), u.dtype, u.stride, c.data, c.stride, y.rows,
                  y.cols, 1.0f);
  }
  if (epilogue.scale || epilogue.bias) {
    kernels.scale_columns(c.data, Dtype::kFloat32, c.stride, c.data, c.stride, y.rows, y.cols,
                          epilogue.scale ? epilogue.scale + y.col : nullptr,
                          epilogue.bias ? epilogue.bias + y.col : nullptr);
  }
  kernels.store(mutable_element(y.whole, y.row, y.col), y.whole.dtype, y.whole.stride, c.data,
                c.stride, y.rows, y.cols, 1.0f);
}

// (p * gate * scale) in float32; it is rounded once more when it is staged.
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

// With few tokens the weight is the long side. Its rows stream through the tiles as L, read where
// they lie, with x as G; the rank is appended to the reduction, so that y is rounded once. For
// norms, A stands beside x in G. `p` is that of ScaledP.
template <typename Elem>
void linear_few_rows(const Runtime& runtime, const LoraLinear& linear, const Matrix& p) {
  const KernelTable& kernels = runtime.kernels;
  const Matrix &y = linear.y, &x = linear.x, &weight = linear.weight, &lora_b = linear.lora_b;
  const RowHash hash = row_hash(kernels);
  const int64_t m = x.rows, n = weight.rows, width = x.cols, rank = p.cols;
  const int64_t panels = ceil_div(m, kPanel), padded = Engine<Elem>::depth(width);
  const int64_t padded_rank = Engine<Elem>::depth(rank);
  Layout layout;
  std::optional<RowNorms> norms;
  if (linear.norm) norms.emplace(*linear.norm, sizeof(Elem) == sizeof(uint16_t), &layout);
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
      down_block(engine, {weight, row, 0, rows, width},
                 {x_panels, c_stride / kPanel, padded * kPanel}, {c, c_stride}, staged);
      // These rows are in the cache now.
      if (linear.weight_hashes) hash_rows(hash, weight, row, rows, linear.weight_hashes + row);
      if (norms) {
        double squares[kRowBlock] = {};
        norms->add_squares(kernels, weight, row, rows, 0, width, squares);
        norms->finish(kernels, row, rows, c + panels * kPanel, c_stride, squares,
                      at<float>(scratch.base(), norms_at));
      }
      down_block(engine, {lora_b, row, 0, rows, rank}, {p_panels, panels, padded_rank * kPanel},
                 {c, c_stride}, staged, true);
      kernels.transpose(reinterpret_cast<uint32_t*>(turned), kRowBlock,
                        reinterpret_cast<uint32_t*>(c), c_stride, rows, m);
      finish(kernels, {y, 0, row, m, rows}, linear.epilogue, {turned, kRowBlock});
    }
  });
}

// Whether products of few rows read a weight where it lies.
bool lies_readable(const Matrix& weight) {
  return weight.dtype != Dtype::kCoded || read_in_place(*static_cast<const Coded*>(weight.data));
}

// What a factor is given as: a coded weight as a whole.
const void* factor_at(const Matrix& m, int64_t row, int64_t col) {
  return m.dtype == Dtype::kCoded ? m.data : element(m, row, col);
}

// Rows of a coded weight, decoded: as bfloat16 where that is what they stand for.
struct Decoded {
  Dtype dtype = Dtype::kFloat32;
  void* data = nullptr;

  Decoded(const Matrix& weight, float* scratch) : data(scratch) {
    if (weight.dtype != Dtype::kCoded) return;
    if (static_cast<const Coded*>(weight.data)->value == Dtype::kBFloat16) dtype = Dtype::kBFloat16;
  }
  void decode(const KernelTable& kernels, const Region& from) const {
    const Source s = rectangle(from.whole, from.row, from.col, from.rows, from.cols);
    if (dtype == Dtype::kBFloat16) {
      kernels.stage_bfloat16(static_cast<uint16_t*>(data), from.cols, s);
    } else {
      kernels.stage_float(static_cast<float*>(data), from.cols, s);
    }
  }
};

// With at most kDotRows tokens and no tiles, a row of the weight is read once, where it lies, and
// multiplied with all rows of x; the rank is appended to the reduction. `p` is that of ScaledP.
void linear_by_dots(const Runtime& runtime, const LoraLinear& linear, const Matrix& p) {
  const KernelTable& kernels = runtime.kernels;
  const Matrix &y = linear.y, &x = linear.x, &weight = linear.weight, &lora_b = linear.lora_b;
  const RowHash hash = row_hash(kernels);
  const int64_t m = x.rows, n = weight.rows, width = x.cols, rank = p.cols;
  const FloatRows x_rows(kernels, x, nullptr);
  const float* p_rows[kDotRows];
  for (int64_t i = 0; i < m; ++i) p_rows[i] = static_cast<const float*>(element(p, i, 0));
  run(runtime, ceil_div(n, kDotColumns), m * n * width >= kSerialDots,
      [&](int64_t begin, int64_t end) {
        const bool decode = !lies_readable(weight);
        Layout own;
        const size_t staged_at = own.add<float>(kDotColumns * rank);
        const size_t wide_at = own.add<float>(decode ? kDecodedRows * width : 0);
        TaskScratch scratch(own.bytes());
        float* staged = at<float>(scratch.base(), staged_at);
        const Decoded decoded(weight, at<float>(scratch.base(), wide_at));
        float sums[kDotRows * kDotColumns];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t col = block * kDotColumns, cols = std::min(kDotColumns, n - col);
          Dots correction{p_rows, element(lora_b, col, 0), Dtype::kFloat32, lora_b.stride, rank};
          if (lora_b.dtype != Dtype::kFloat32) {
            kernels.stage_float(staged, rank, rectangle(lora_b, col, 0, cols, rank));
            correction.factor = staged;
            correction.stride = rank;
          }
          if (decode) {
            for (int64_t j = 0; j < cols; j += kDecodedRows) {
              const int64_t some = std::min(kDecodedRows, cols - j);
              decoded.decode(kernels, {weight, col + j, 0, some, width});
              Dots more = correction;
              more.factor = static_cast<const float*>(correction.factor) + j * correction.stride;
              kernels.dot_rows(sums + j, kDotColumns, m, some,
                               {x_rows.rows, decoded.data, decoded.dtype, width, width},
                               rank ? &more : nullptr);
            }
          } else {
            kernels.dot_rows(sums, kDotColumns, m, cols,
                             {x_rows.rows, factor_at(weight, col, 0), weight.dtype, weight.stride,
                              width, weight.row + col},
                             rank ? &correction : nullptr);
          }
          if (linear.weight_hashes) {
            hash_rows(hash, weight, col, cols, linear.weight_hashes + col);
          }
          finish(kernels, {y, 0, col, m, cols}, linear.epilogue, {sums, kDotColumns});
        }
      });
}

// The product that linear_many_rows computes: y = epilogue(x weight^T + drop(p factor^T)), with
// either factor lying either way. Members are those of LoraLinear.
struct Product {
  Matrix y, p, x;
  PanelSource weight, factor;
  Epilogue epilogue{};
  const Dropout* dropout = nullptr;  // of the correction, as in the gradient of x
  const DoraNorm* norm = nullptr;    // with no more than kProductRows rows of x
  uint64_t* weight_hashes = nullptr;
};

// With many tokens a block of the weight is packed into G, stays in the second-level cache, and
// serves all rows of x, which stream through the tiles as L. For norms, the rows of A stream
// through the tiles before those of x.
template <typename Elem>
void linear_many_rows(const Runtime& runtime, const Product& product) {
  const KernelTable& kernels = runtime.kernels;
  const Matrix &y = product.y, &p = product.p, &x = product.x;
  const PanelSource &weight = product.weight, &factor = product.factor;
  const Dropout* dropout = product.dropout;
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
  if (product.norm) norms.emplace(*product.norm, sizeof(Elem) == sizeof(uint16_t), &layout);
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
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / column_blocks * task_rows;
      const int64_t last = std::min(first + task_rows, m);
      const int64_t col = task % column_blocks * columns, cols = std::min(columns, n - col);
      const int64_t panels = ceil_div(cols, kPanel);
      pack_panels(kernels, b_panels, padded_rank, factor.block(col, cols, 0, rank), 0, panels,
                  buffer);
      double* squares = at<double>(scratch.base(), squares_at);
      if (norms) std::fill_n(squares, cols, 0.0);
      if (product.weight_hashes && first == 0) {
        hash_rows(hash, weight.matrix, col, cols, product.weight_hashes + col);
      }
      for (int64_t k0 = 0; k0 < width; k0 += kProductDepth) {
        const int64_t depth = std::min(kProductDepth, width - k0);
        const int64_t padded = Engine<Elem>::depth(depth);
        pack_panels(kernels, g, padded, weight.block(col, cols, k0, depth), 0, panels, buffer);
        const Panels<Elem> g_panels{g, panels, padded * kPanel};
        if (norms) {
          norms->add_squares(kernels, weight.matrix, col, cols, k0, depth, squares);
          const Matrix& a = norms->a();
          float* u = at<float>(scratch.base(), u_at);
          for (int64_t row = 0; row < a.rows; row += kRowBlock) {
            down_block(engine, {a, row, k0, std::min(kRowBlock, a.rows - row), depth}, g_panels,
                       {u + row * columns, columns}, staged, k0 > 0);
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
          down_block(engine, {x, row, k0, rows, depth}, g_panels, {c, columns}, staged, k0 > 0);
          if (k0 + depth < width) continue;
          float* correction = dropout ? at<float>(scratch.base(), drop_at) : c;
          down_block(engine, {p, row, 0, rows, rank}, {b_panels, panels, padded_rank * kPanel},
                     {correction, columns}, staged, !dropout);
          if (dropout) {
            kernels.add(c, Dtype::kFloat32, columns, correction, columns, rows, cols, 1.0f, dropout,
                        row, col);
          }
          finish(kernels, {y, row, col, rows, cols}, product.epilogue, {c, columns});
        }
      }
    }
  });
}

template <typename Elem>
void linear_of(const Runtime& runtime, const LoraLinear& linear, const Matrix& p) {
  if (sizeof(Elem) == sizeof(float) && linear.x.rows <= kDotRows && !linear.norm) {
    linear_by_dots(runtime, linear, p);
  } else if (linear.x.rows <= kFewRows) {
    linear_few_rows<Elem>(runtime, linear, p);
  } else {
    Product product{linear.y, p, linear.x, {linear.weight, true}, {linear.lora_b, true}};
    product.epilogue = linear.epilogue;
    product.norm = linear.norm;
    product.weight_hashes = linear.weight_hashes;
    linear_many_rows<Elem>(runtime, product);
  }
}

// The gradient of at most kDotRows rows of x: rows of the weight are read once, where they lie, and
// added up. `q` is that of ScaledP.
void grad_x_by_mixing(const Runtime& runtime, const LoraGradX& grad, const Matrix& q) {
  const KernelTable& kernels = runtime.kernels;
  const Matrix &grad_x = grad.grad_x, &grad_y = grad.grad_y;
  const Matrix &weight = grad.weight, &lora_a = grad.lora_a;
  const Dropout* dropout = grad.dropout;
  const int64_t m = grad_y.rows, n = weight.rows, width = weight.cols, rank = q.cols;
  CallScratch shared(static_cast<size_t>(m * n) * sizeof(float));
  float* dy = static_cast<float*>(shared.base());
  Source source = rectangle(grad_y, 0, 0, m, n);
  source.col_scale = grad.row_scale;
  kernels.stage_float(dy, n, source);
  const int64_t columns =
      std::clamp(round_up(ceil_div(width, kMixTasks), 4 * kPanel), 4 * kPanel, kMixColumns);
  run(runtime, ceil_div(width, columns), m * n * width >= kSerialDots,
      [&](int64_t begin, int64_t end) {
        float sums[kDotRows * kMixColumns], correction[kDotRows * kMixColumns];
        // Codes of several rows of dY would be looked up again for each.
        const bool decode = weight.dtype == Dtype::kCoded && (m > 1 || !lies_readable(weight));
        TaskScratch scratch(static_cast<size_t>(decode ? kMixRows * columns : 0) * sizeof(float));
        const Decoded decoded(weight, static_cast<float*>(scratch.base()));
        for (int64_t block = begin; block < end; ++block) {
          const int64_t col = block * columns, cols = std::min(columns, width - col);
          for (int64_t row = 0; row < n; row += kMixRows) {
            const int64_t rows = std::min(kMixRows, n - row);
            if (decode) {
              decoded.decode(kernels, {weight, row, col, rows, cols});
              kernels.mix_rows({sums, kMixColumns, dy + row, n, m, decoded.data, decoded.dtype,
                                cols, rows, cols, row > 0});
            } else {
              kernels.mix_rows({sums, kMixColumns, dy + row, n, m, factor_at(weight, row, col),
                                weight.dtype, weight.stride, rows, cols, row > 0, weight.row + row,
                                weight.col + col});
            }
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

}  // namespace

void lora_linear(const Runtime& runtime, const LoraLinear& linear) {
  // Without rows there is no pass over the weight, and with very many, several tasks make one: the
  // norms then take a pass of their own.
  if (linear.norm && (linear.y.rows == 0 || linear.y.rows > kProductRows)) {
    dora_norm(runtime, linear.weight, *linear.norm);
    LoraLinear rest = linear;
    rest.norm = nullptr;
    return lora_linear(runtime, rest);
  }
  if (linear.y.rows == 0 || linear.y.cols == 0) {
    if (linear.weight_hashes) hash_rows(runtime, linear.weight, linear.weight_hashes);
    return;
  }
  const ScaledP scaled(runtime.kernels, linear.p, linear.gate, linear.scale);
  if (on_tiles(runtime, linear.x.dtype)) {
    linear_of<uint16_t>(runtime, linear, scaled.matrix);
  } else {
    linear_of<float>(runtime, linear, scaled.matrix);
  }
}

void frozen_linear(const Runtime& runtime, const Matrix& y, const Matrix& x, const Matrix& weight,
                   const float* bias) {
  const Matrix no_p{nullptr, x.dtype, x.rows, 0, 0}, no_factor{nullptr, x.dtype, weight.rows, 0, 0};
  LoraLinear linear{y, no_p, x, weight, no_factor};
  linear.epilogue.bias = bias;
  lora_linear(runtime, linear);
}

void decode(const Runtime& runtime, const Matrix& out, const Matrix& weight) {
  const KernelTable& kernels = runtime.kernels;
  run(runtime, out.rows, out.rows * out.cols > (int64_t{1} << 16), [&](int64_t begin, int64_t end) {
    TaskScratch scratch(static_cast<size_t>(out.cols) * sizeof(float));
    float* wide = static_cast<float*>(scratch.base());
    for (int64_t row = begin; row < end; ++row) {
      kernels.stage_float(wide, out.cols, rectangle(weight, row, 0, 1, out.cols));
      void* to = mutable_element(out, row, 0);
      if (out.dtype != Dtype::kBFloat16) {
        kernels.store(to, out.dtype, out.stride, wide, out.cols, 1, out.cols, 1.0f);
        continue;
      }
      // Rounded already: the upper half is the value. Hardware that rounds takes subnormals as
      // zero.
      for (int64_t j = 0; j < out.cols; ++j) {
        uint32_t bits;
        std::memcpy(&bits, wide + j, sizeof(bits));
        static_cast<uint16_t*>(to)[j] = static_cast<uint16_t>(bits >> 16);
      }
    }
  });
}

void lora_grad_x(const Runtime& runtime, const LoraGradX& grad) {
  if (grad.grad_x.rows == 0 || grad.grad_x.cols == 0) return;
  const ScaledP scaled(runtime.kernels, grad.q, grad.gate, grad.scale);
  if (grad.grad_y.rows <= kDotRows && grad.weight.rows > 0) {
    return grad_x_by_mixing(runtime, grad, scaled.matrix);
  }
  const PanelSource weight{grad.weight, false, grad.row_scale}, factor{grad.lora_a, false};
  Product product{grad.grad_x, scaled.matrix, grad.grad_y, weight, factor};
  product.dropout = grad.dropout;
  if (on_tiles(runtime, grad.grad_y.dtype)) {
    linear_many_rows<uint16_t>(runtime, product);
  } else {
    linear_many_rows<float>(runtime, product);
  }
}

}  // namespace lrk
