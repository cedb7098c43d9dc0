// The CPU ops of Sparse Matrix Tuning.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "arguments.h"
#include "cpu/block_sparse.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using lrk::dtype_of;
using lrk::matrix;
using lrk::runtime;

// Blocks of a weight of `rows` x `cols`; every one of them is in it, at least with its first
// element.
lrk::Blocks blocks_of(const char* op, const char* name, const Tensor& t, const Tensor& index,
                      int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.dim() == 3 && t.is_cpu() && t.is_contiguous(), op, ": expected ", name,
                  " of shape (n_blocks, bm, bn), contiguous, on the CPU");
  STD_TORCH_CHECK(t.size(1) > 0 && t.size(2) > 0 && t.size(1) % 16 == 0 && t.size(2) % 16 == 0, op,
                  ": expected blocks of multiples of 16, got ", t.size(1), " x ", t.size(2));
  STD_TORCH_CHECK(index.dim() == 2 && index.size(0) == t.size(0) && index.size(1) == 2 &&
                      index.is_cpu() && index.is_contiguous() &&
                      index.scalar_type() == ScalarType::Int,
                  op, ": expected block_index of shape (n_blocks, 2) = (", t.size(0),
                  ", 2), int32, contiguous, on the CPU");
  const lrk::Blocks blocks{const_cast<void*>(t.const_data_ptr()),
                           dtype_of(op, name, t.scalar_type()),
                           t.size(0),
                           t.size(1),
                           t.size(2),
                           static_cast<const int32_t*>(index.const_data_ptr())};
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t i = blocks.index[2 * b], j = blocks.index[2 * b + 1];
    STD_TORCH_CHECK(i >= 0 && j >= 0 && i * blocks.rows < rows && j * blocks.cols < cols, op,
                    ": expected blocks within a weight of shape (", rows, ", ", cols,
                    "), got block (", i, ", ", j, ")");
  }
  return blocks;
}

void block_grad_(Tensor out, const Tensor& x, const Tensor& grad_y, const Tensor& block_index) {
  const char* op = "block_grad_";
  const lrk::Matrix xm = matrix(op, "x", x), dy = matrix(op, "grad_y", grad_y);
  STD_TORCH_CHECK(xm.rows == dy.rows && xm.dtype == dy.dtype, op,
                  ": expected x and grad_y with the same rows and dtype");
  const lrk::Blocks blocks = blocks_of(op, "out", out, block_index, dy.cols, xm.cols);
  lrk::block_grad(runtime(), blocks, xm, dy);
}

void write_blocks_(Tensor weight, const Tensor& blocks, const Tensor& block_index) {
  const char* op = "write_blocks_";
  const lrk::Matrix w = matrix(op, "weight", weight);
  lrk::write_blocks(runtime(), blocks_of(op, "blocks", blocks, block_index, w.rows, w.cols), w);
}

float* moments(const char* name, Tensor& t, const Tensor& blocks) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.is_cpu() &&
                      t.numel() == blocks.numel(),
                  "block_adamw_step_: expected ", name,
                  " of the blocks' shape, float32, contiguous, on the CPU");
  return static_cast<float*>(t.mutable_data_ptr());
}

void block_adamw_step_(Tensor blocks, const Tensor& grad, Tensor exp_avg, Tensor exp_avg_sq,
                       Tensor weight, const Tensor& block_index, double rate, double beta1,
                       double beta2, double eps, double keep, double root_correction,
                       const std::optional<Tensor>& seed) {
  const char* op = "block_adamw_step_";
  const lrk::Matrix w = matrix(op, "weight", weight);
  const lrk::Blocks b = blocks_of(op, "blocks", blocks, block_index, w.rows, w.cols);
  STD_TORCH_CHECK(grad.is_cpu() && grad.is_contiguous() && grad.numel() == blocks.numel(), op,
                  ": expected grad of the blocks' shape, contiguous, on the CPU");
  lrk::AdamW settings{static_cast<float>(rate),
                      static_cast<float>(beta1),
                      static_cast<float>(beta2),
                      static_cast<float>(eps),
                      static_cast<float>(keep),
                      static_cast<float>(root_correction),
                      seed.has_value(),
                      0,
                      0};
  if (seed.has_value()) {
    STD_TORCH_CHECK(seed->is_cpu() && seed->numel() == 1 &&
                        seed->scalar_type() == ScalarType::Long && b.dtype == lrk::Dtype::kBFloat16,
                    op, ": expected seed to be an int64 scalar on the CPU, and bfloat16 blocks");
    const uint64_t key =
        static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    settings.key0 = static_cast<uint32_t>(key);
    settings.key1 = static_cast<uint32_t>(key >> 32);
  }
  lrk::block_adamw(runtime(), b, grad.const_data_ptr(), dtype_of(op, "grad", grad.scalar_type()),
                   moments("exp_avg", exp_avg, blocks), moments("exp_avg_sq", exp_avg_sq, blocks),
                   w, settings);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def("write_blocks_(Tensor(a!) weight, Tensor blocks, Tensor block_index) -> ()");
  m.def("block_grad_(Tensor(a!) out, Tensor x, Tensor grad_y, Tensor block_index) -> ()");
  m.def(
      "block_adamw_step_(Tensor(a!) blocks, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) "
      "exp_avg_sq, Tensor(d!) weight, Tensor block_index, float rate, float beta1, float beta2, "
      "float eps, float keep, float root_correction, Tensor? seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("write_blocks_", TORCH_BOX(&write_blocks_));
  m.impl("block_grad_", TORCH_BOX(&block_grad_));
  m.impl("block_adamw_step_", TORCH_BOX(&block_adamw_step_));
}
