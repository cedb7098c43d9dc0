// DoRA's row norms, |W_i + s B_i A|, from W A^T, A A^T and |W_i|^2; and the gradient through its
// column scale.
#include "dora.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "block_product.h"

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

// ---- norms --------------------------------------------------------------------------------------

namespace {

constexpr int64_t kNormDepth = 2048;  // slice of W that stays in cache for its squares
constexpr int64_t kGramBlock = 64;    // rows and columns of a block of A A^T
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

// The parts of A below each other: part p of row r is row p * width + r, and the rest zeros.
void split(const Runtime& runtime, uint16_t* dst, const Matrix& a, int64_t parts, int64_t width) {
  run(runtime, width, parts * a.rows * a.cols > kParallelWork, [&](int64_t begin, int64_t end) {
    TaskScratch scratch(static_cast<size_t>(a.cols) * sizeof(float));
    float* rest = static_cast<float*>(scratch.base());
    for (int64_t r = begin; r < end; ++r) {
      if (r < a.rows) runtime.kernels.stage_float(rest, a.cols, rectangle(a, r, 0, 1, a.cols));
      for (int64_t part = 0; part < parts; ++part) {
        uint16_t* row = dst + (part * width + r) * a.cols;
        if (r >= a.rows) {
          std::memset(row, 0, static_cast<size_t>(a.cols) * sizeof(uint16_t));
          continue;
        }
        const Matrix whole{rest, Dtype::kFloat32, 1, a.cols, a.cols};
        runtime.kernels.stage_bfloat16(row, a.cols, rectangle(whole, 0, 0, 1, a.cols));
        for (int64_t k = 0; k < a.cols; ++k) rest[k] -= from_bfloat16(row[k]);
      }
    }
  });
}

// gram (R, width): of A A^T, which is symmetric, the blocks on the diagonal, and twice those above
// it. The rest is never written nor read.
template <typename Elem>
void multiply_gram(const Runtime& runtime, float* gram, const Matrix& a, const Elem* panels,
                   int64_t width) {
  const int64_t padded = Engine<Elem>::depth(a.cols);
  run(runtime, ceil_div(a.rows, kRowBlock), a.rows * width * a.cols > kParallelWork,
      [&](int64_t begin, int64_t end) {
        TaskScratch scratch(static_cast<size_t>(kRowBlock * kDepthBlock) * sizeof(Elem));
        Engine<Elem> engine(runtime.kernels);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task * kRowBlock, rows = std::min(kRowBlock, a.rows - row);
          const int64_t col = row / kGramBlock * kGramBlock;
          float* block = gram + row * width + col;
          down_block(engine, {a, row, 0, rows, a.cols},
                     {panels + col * padded, (width - col) / kPanel, padded * kPanel},
                     {block, width}, static_cast<Elem*>(scratch.base()));
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t c = kGramBlock; c < width - col; ++c) block[i * width + c] *= 2.0f;
          }
        }
      });
}

template <typename Elem>
void norm_of(const Runtime& runtime, const Matrix& weight, const DoraNorm& norm) {
  const KernelTable& kernels = runtime.kernels;
  const int64_t n = weight.rows, k = weight.cols, padded = Engine<Elem>::depth(k);
  Layout layout;
  RowNorms norms(norm, sizeof(Elem) == sizeof(uint16_t), &layout);
  const int64_t columns = norms.columns();
  const size_t panels_at = layout.add<Elem>(columns * padded);
  CallScratch shared(layout.bytes());
  Elem* panels = at<Elem>(shared.base(), panels_at);
  norms.prepare(runtime, shared.base(), panels);

  run(runtime, ceil_div(n, kRowBlock), n * k * columns > kParallelWork,
      [&](int64_t begin, int64_t end) {
        Layout own;
        const size_t u_at = own.add<float>(kRowBlock * columns);
        const size_t staged_at = own.add<Elem>(kRowBlock * kDepthBlock);
        const size_t norms_at = own.add<float>(norms.scratch_floats());
        TaskScratch scratch(own.bytes());
        float* u = at<float>(scratch.base(), u_at);
        Engine<Elem> engine(kernels);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t row = block * kRowBlock, rows = std::min(kRowBlock, n - row);
          double squares[kRowBlock] = {};
          for (int64_t k0 = 0; k0 < k; k0 += kNormDepth) {
            const int64_t depth = std::min(kNormDepth, k - k0);
            down_block(engine, {weight, row, k0, rows, depth},
                       {panels + k0 * kPanel, columns / kPanel, padded * kPanel}, {u, columns},
                       at<Elem>(scratch.base(), staged_at), k0 > 0);
            norms.add_squares(kernels, weight, row, rows, k0, depth, squares);
          }
          norms.finish(kernels, row, rows, u, columns, squares,
                       at<float>(scratch.base(), norms_at));
        }
      });
}

}  // namespace

RowNorms::RowNorms(const DoraNorm& norm, bool tiles, Layout* layout)
    : norm_(norm),
      parts_(tiles ? bfloat16_parts(norm.lora_a.dtype) : 1),
      width_(round_up(norm.lora_a.rows, kPanel)),
      gram_at_(layout->add<float>(width_ * width_)),
      split_at_(layout->add<uint16_t>(parts_ > 1 ? columns() * norm.lora_a.cols : 0)),
      wide_at_(layout->add<float>(parts_ > 1 ? width_ * norm.lora_a.cols : 0)),
      a_(norm.lora_a) {}

template <typename Elem>
void RowNorms::prepare(const Runtime& runtime, void* base, Elem* panels) {
  const Matrix& a = norm_.lora_a;
  gram_ = at<float>(base, gram_at_);
  if (parts_ > 1) {
    uint16_t* parts = at<uint16_t>(base, split_at_);
    split(runtime, parts, a, parts_, width_);
    a_ = {parts, Dtype::kBFloat16, columns(), a.cols, a.cols};
    float* wide = at<float>(base, wide_at_);
    pack_all(runtime, wide, a.cols, {a, true});
    multiply_gram(runtime, gram_, a, wide, width_);
  }
  pack_all(runtime, panels, Engine<Elem>::depth(a.cols), {a_, true});
  if (parts_ == 1) multiply_gram(runtime, gram_, a, panels, width_);
}

template void RowNorms::prepare<float>(const Runtime&, void*, float*);
template void RowNorms::prepare<uint16_t>(const Runtime&, void*, uint16_t*);

void RowNorms::add_squares(const KernelTable& kernels, const Matrix& weight, int64_t row,
                           int64_t rows, int64_t col, int64_t cols, double* squares) const {
  if (norm_.weight_sq_norm) return;
  const SquareSums sums = square_sums(kernels);
  float wide[kDepthBlock];
  for (int64_t i = 0; i < rows; ++i) {
    if (weight.dtype == Dtype::kBFloat16) {
      squares[i] +=
          sums.of_bfloat16(static_cast<const uint16_t*>(element(weight, row + i, col)), cols);
      continue;
    }
    for (int64_t k = 0; k < cols; k += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, cols - k);
      const float* values = wide;
      if (weight.dtype == Dtype::kFloat32) {
        values = static_cast<const float*>(element(weight, row + i, col + k));
      } else {
        kernels.stage_float(wide, kDepthBlock, rectangle(weight, row + i, col + k, 1, depth));
      }
      squares[i] += sums.of_float(values, depth);
    }
  }
}

int64_t RowNorms::scratch_floats() const { return 2 * kRowBlock * width_; }

void RowNorms::finish(const KernelTable& kernels, int64_t row, int64_t rows, const float* u,
                      int64_t u_stride, const double* squares, float* scratch) const {
  float* b = scratch;
  float* v = scratch + kRowBlock * width_;
  Source s = rectangle(norm_.lora_b, row, 0, rows, norm_.lora_b.cols);
  s.padded_cols = width_;
  kernels.stage_float(b, width_, s);
  for (int64_t col = 0; col < width_; col += kGramBlock) {  // v with v . b = b (A A^T) b^T
    const int64_t end = std::min(col + kGramBlock, width_);
    kernels.multiply_float({rows, (end - col) / kPanel, std::min(end, norm_.lora_b.cols), b, width_,
                            gram_ + col, width_, kPanel, v + col, width_, false});
  }
  for (int64_t i = 0; i < rows; ++i) {
    // Rounded as it is handed back, so that handing it in again changes no bit of the norm.
    const float square =
        norm_.weight_sq_norm ? norm_.weight_sq_norm[row + i] : static_cast<float>(squares[i]);
    // A sum that cancelled below zero is a zero norm; a NaN is not below zero and stays.
    const double total = square + correction(b + i * width_, u + i * u_stride, parts_,
                                             v + i * width_, width_, norm_.scaling);
    const float root = static_cast<float>(std::sqrt(total < 0.0 ? 0.0 : total));
    norm_.norm[row + i] = root;
    if (norm_.sq_norm) norm_.sq_norm[row + i] = square;
    if (norm_.magnitude) {
      norm_.column_scale[row + i] = root == 0.0f ? 0.0f : norm_.magnitude[row + i] / root;
    }
  }
}

void dora_norm(const Runtime& runtime, const Matrix& weight, const DoraNorm& norm) {
  if (weight.rows == 0) return;
  if (on_tiles(runtime, weight.dtype)) {
    norm_of<uint16_t>(runtime, weight, norm);
  } else {
    norm_of<float>(runtime, weight, norm);
  }
}

// ---- back through the column scale --------------------------------------------------------------

void scale_grad_block(const KernelTable& kernels, const ScaleGrad& to, const Region& grad_y,
                      float* inner) {
  const Matrix* u = inner ? to.u : nullptr;
  const bool write = to.grad_u.data;
  if (!write && !u) return;
  const int64_t row = grad_y.row, col = grad_y.col;
  kernels.scale_grad(write ? mutable_element(to.grad_u, row, col) : nullptr, grad_y.whole.dtype,
                     to.grad_u.stride, element(grad_y.whole, row, col), grad_y.whole.stride,
                     u ? element(*u, row, col) : nullptr, u ? u->stride : 0, grad_y.rows,
                     grad_y.cols, to.column_scale + col, inner ? inner + col : nullptr);
}

void store_grad_m(const ScaleGrad& to, const float* inner, int64_t chunks, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    float total = inner[j];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) total += inner[chunk * n + j];
    to.grad_m[j] = to.norm[j] == 0.0f ? 0.0f : total / to.norm[j];
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
        scale_grad_block(runtime.kernels, scale_grad,
                         {grad_y, row, col, std::min(kRows, m - row), cols},
                         inner.empty() ? nullptr : inner.data());
      }
    }
  });
  if (scale_grad.grad_m) store_grad_m(scale_grad, inner.data(), 1, n);
}

}  // namespace lrk
