#include "glu.h"

#include <cstring>

#define LRK_ISA glu_plain
#define LRK_TARGET
#define LRK_W 4
#include "glu_rows.inl"
#if defined(__x86_64__)
#  define LRK_ISA glu_avx2
#  define LRK_TARGET __attribute__((target("avx2,fma")))
#  define LRK_W 8
#  include "glu_rows.inl"
#  define LRK_ISA glu_avx512
#  define LRK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#  define LRK_W 16
#  include "glu_rows.inl"
#endif

namespace lrk {
namespace {

constexpr int64_t kColumns = 1024;                   // of a row at a time, where they are staged
constexpr int64_t kParallelWork = int64_t{1} << 15;  // elements worth a second thread

struct Passes {
  void (*forward)(Activation, float*, const float*, const float*, int64_t);
  void (*backward)(Activation, float*, float*, const float*, const float*, const float*, int64_t);
};

// In the instruction set of the table, so that LRK_CPU_ISA holds here too.
Passes passes_of(const KernelTable& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx2")) return {glu_avx2::forward, glu_avx2::backward};
  if (!std::strcmp(kernels.name, "avx512") || !std::strcmp(kernels.name, "amx")) {
    return {glu_avx512::forward, glu_avx512::backward};
  }
#endif
  (void)kernels;
  return {glu_plain::forward, glu_plain::backward};
}

// A part of a row as float32: where it lies, or copied into `staged`.
const float* read(const KernelTable& kernels, float* staged, const Matrix& m, int64_t row,
                  int64_t col, int64_t n) {
  if (!m.data) return nullptr;
  if (m.dtype == Dtype::kFloat32) return static_cast<const float*>(element(m, row, col));
  kernels.stage_float(staged, kColumns, rectangle(m, row, col, 1, n));
  return staged;
}

float* place(float* staged, const Matrix& m, int64_t row, int64_t col) {
  return m.data && m.dtype == Dtype::kFloat32 ? static_cast<float*>(mutable_element(m, row, col))
                                              : staged;
}

void write(const KernelTable& kernels, const float* from, const Matrix& m, int64_t row, int64_t col,
           int64_t n) {
  if (!m.data || m.dtype == Dtype::kFloat32) return;
  kernels.store(mutable_element(m, row, col), m.dtype, m.stride, from, kColumns, 1, n, 1.0f);
}

// body(row, first column, columns) over a matrix.
template <typename Body>
void over(const Runtime& runtime, const Matrix& m, const Body& body) {
  const int64_t step = m.dtype == Dtype::kFloat32 ? m.cols : kColumns;
  run(runtime, m.rows, m.rows * m.cols >= kParallelWork, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < m.cols; col += step) {
        body(row, col, std::min(step, m.cols - col));
      }
    }
  });
}

}  // namespace

void glu(const Runtime& runtime, Activation f, const Matrix& h, const Matrix& gate,
         const Matrix& up) {
  const KernelTable& kernels = runtime.kernels;
  const Passes passes = passes_of(kernels);
  over(runtime, h, [&](int64_t row, int64_t col, int64_t n) {
    float staged[3][kColumns];
    float* out = place(staged[0], h, row, col);
    passes.forward(f, out, read(kernels, staged[1], gate, row, col, n),
                   read(kernels, staged[2], up, row, col, n), n);
    write(kernels, out, h, row, col, n);
  });
}

void glu_grad(const Runtime& runtime, const GluGrad& g) {
  const KernelTable& kernels = runtime.kernels;
  const Passes passes = passes_of(kernels);
  over(runtime, g.gate, [&](int64_t row, int64_t col, int64_t n) {
    float staged[5][kColumns];
    float* grad_gate = place(staged[0], g.grad_gate, row, col);
    float* grad_up = place(staged[1], g.grad_up, row, col);
    passes.backward(g.f, grad_gate, grad_up, read(kernels, staged[2], g.grad_h, row, col, n),
                    read(kernels, staged[3], g.gate, row, col, n),
                    read(kernels, staged[4], g.up, row, col, n), n);
    write(kernels, grad_gate, g.grad_gate, row, col, n);
    write(kernels, grad_up, g.grad_up, row, col, n);
  });
}

}  // namespace lrk
