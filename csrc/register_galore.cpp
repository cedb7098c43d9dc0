// The torch op of a GaLore step on a CPU. What a user can get wrong is checked by its caller
// (ops/galore.py); here is what memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "cpu/galore.h"

namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "galore_step_";

lrk::Matrix moments(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  const lrk::Matrix m = lrk::target(kOp, name, t);
  STD_TORCH_CHECK(m.dtype == lrk::Dtype::kFloat32, kOp, ": expected ", name, " of dtype float32");
  lrk::check_shape(kOp, name, "(long side, R) or (R, long side)", m, rows, cols);
  return m;
}

void galore_step_(Tensor weight, const Tensor& grad, const Tensor& basis, Tensor exp_avg,
                  Tensor exp_avg_sq, bool tall, double rate, double beta1, double beta2, double eps,
                  double keep, double inverse_root) {
  const lrk::Matrix w = lrk::target(kOp, "weight", weight);
  const lrk::Matrix g = lrk::matrix(kOp, "grad", grad), p = lrk::matrix(kOp, "basis", basis);
  STD_TORCH_CHECK(p.cols > 0, kOp, ": expected a rank of at least 1");
  lrk::check_shape(kOp, "grad", "(N, K)", g, w.rows, w.cols);
  lrk::check_shape(kOp, "basis", "(short side, R)", p, tall ? w.cols : w.rows, p.cols);
  const int64_t rows = tall ? w.rows : p.cols, cols = tall ? p.cols : w.cols;
  lrk::galore_step(
      lrk::runtime(), w, g, p, moments("exp_avg", exp_avg, rows, cols),
      moments("exp_avg_sq", exp_avg_sq, rows, cols), tall,
      {static_cast<float>(rate), static_cast<float>(beta1), static_cast<float>(beta2),
       static_cast<float>(eps), static_cast<float>(keep), static_cast<float>(inverse_root)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_kernels, m) {
  m.def(
      "galore_step_(Tensor(a!) weight, Tensor grad, Tensor basis, Tensor(b!) exp_avg, Tensor(c!) "
      "exp_avg_sq, bool tall, float rate, float beta1, float beta2, float eps, float keep, float "
      "inverse_root) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("galore_step_", TORCH_BOX(&galore_step_));
}
