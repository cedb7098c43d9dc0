#include <cuda_runtime_api.h>

#include "../dora_norm_kernel.cuh"
#include "dora_norm.h"

namespace lrk {
namespace {

constexpr int kWarps = 8;

template <typename A>
void launch_prepare(const DoraNormProblem& p, bool packed, cudaStream_t stream) {
  const int64_t blocks = dora_gram_blocks(p.rank) + dora_pack_blocks(p.k, p.rank, packed);
  dora_prepare_kernel<A>
      <<<static_cast<unsigned>(blocks), kDoraPrepareThreads, 0, stream>>>(p, packed);
}

template <typename W, int kAParts>
void launch_mma(const DoraNormProblem& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(dora_ceil_div(p.n, kDoraRows));
  if (p.rank <= 16) {
    dora_norm_mma_kernel<W, kAParts, 2, kWarps, false><<<blocks, kWarps * 32, 0, stream>>>(p);
  } else if (p.rank <= 64) {
    dora_norm_mma_kernel<W, kAParts, 8, kWarps, false><<<blocks, kWarps * 32, 0, stream>>>(p);
  } else {
    dora_norm_mma_kernel<W, kAParts, 8, kWarps, true><<<blocks, kWarps * 32, 0, stream>>>(p);
  }
}

template <typename W>
void launch_norm(const DoraNormProblem& p, bool mma, cudaStream_t stream) {
  if (!mma) {
    constexpr int kRows = kDoraFmaThreads / 32 * kDoraFmaRows;
    dora_norm_fma_kernel<W>
        <<<static_cast<unsigned>(dora_ceil_div(p.n, kRows)), kDoraFmaThreads, 0, stream>>>(p);
  } else {
    launch_mma<W, 3>(p, stream);
  }
}

void launch(const DoraNormProblem& p, bool mma, cudaStream_t stream) {
  switch (p.lora_a.dtype) {
    case Dtype::kFloat32:
      launch_prepare<float>(p, mma, stream);
      break;
    case Dtype::kBFloat16:
      launch_prepare<Bfloat16Bits>(p, mma, stream);
      break;
    case Dtype::kFloat16:
      launch_prepare<HalfBits>(p, mma, stream);
      break;
  }
  switch (p.weight.dtype) {
    case Dtype::kFloat32:
      return launch_norm<float>(p, mma, stream);
    case Dtype::kBFloat16:
      if (mma && dora_parts(p.weight.dtype, p.lora_a.dtype) == 1) {
        return launch_mma<Bfloat16Bits, 1>(p, stream);
      }
      return launch_norm<Bfloat16Bits>(p, mma, stream);
    case Dtype::kFloat16:
      return launch_norm<HalfBits>(p, mma, stream);
  }
}

}  // namespace

const char* launch_dora_norm(DoraNormProblem problem, int device, void* stream) {
  if (problem.n == 0) return nullptr;
  int previous = 0, major = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    const int64_t row_bytes = problem.weight.stride * dtype_bytes(problem.weight.dtype);
    problem.aligned =
        reinterpret_cast<uintptr_t>(problem.weight.data) % 16 == 0 && row_bytes % 16 == 0;
    launch(problem, problem.rank >= 16 && major >= 8, static_cast<cudaStream_t>(stream));
    error = cudaGetLastError();
  }
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lrk
