#include <cuda_runtime_api.h>

#include "../dora_norm_kernel.cuh"
#include "dora_norm.h"

namespace lrk {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kCluster = 4;  // divides the 16-byte words of the smallest piece

// How the second launch computes.
struct Way {
  bool tiles;     // bfloat16 tiles, not FMA
  bool clusters;  // A fetched by the blocks of a cluster together, where a block wants much of it
};

template <typename A>
void launch_prepare(const DoraNormProblem& p, bool packed, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(dora_prepare_blocks(p.k, p.rank, packed, kThreads));
  if (dora_gram_by_tiles(p.rank, packed)) {
    dora_prepare_kernel<A, true, kThreads><<<blocks, kThreads, 0, stream>>>(p, packed);
  } else {
    dora_prepare_kernel<A, false, kThreads><<<blocks, kThreads, 0, stream>>>(p, packed);
  }
}

// False where the code that runs here was compiled for processors without clusters, as PTX of an
// older one is. An error stays for the caller, who asks for the last one.
template <typename W, int kAParts>
bool launch_in_clusters(DoraNormProblem p, cudaStream_t stream) {
  const auto kernel = dora_norm_mma_kernel<W, kAParts, 8, kWarps, kCluster>;
  constexpr int kBytes = dora_cluster_bytes(8, kWarps);
  static_assert(kBytes <= 227 * 1024, "the shared memory that a block may have");
  cudaFuncAttributes compiled{};
  if (cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess &&
      !has_clusters(compiled.ptxVersion)) {
    return false;
  }
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const int64_t clusters = dora_ceil_div(p.n, kDoraRows * kCluster);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {&p};
  cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  return true;
}

template <typename W, int kAParts>
void launch_mma(const DoraNormProblem& p, Way way, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(dora_ceil_div(p.n, kDoraRows));
  if (p.rank <= 16) {
    dora_norm_mma_kernel<W, kAParts, 2, kWarps, 0><<<blocks, kThreads, 0, stream>>>(p);
  } else if (p.rank <= 64) {
    dora_norm_mma_kernel<W, kAParts, 8, kWarps, 0><<<blocks, kThreads, 0, stream>>>(p);
  } else if (!way.clusters || !launch_in_clusters<W, kAParts>(p, stream)) {
    dora_norm_mma_kernel<W, kAParts, 8, kWarps, 1><<<blocks, kThreads, 0, stream>>>(p);
  }
}

template <typename W>
void launch_norm(const DoraNormProblem& p, Way way, cudaStream_t stream) {
  if (!way.tiles) {
    constexpr int kRows = kDoraFmaThreads / 32 * kDoraFmaRows;
    dora_norm_fma_kernel<W>
        <<<static_cast<unsigned>(dora_ceil_div(p.n, kRows)), kDoraFmaThreads, 0, stream>>>(p);
  } else {
    launch_mma<W, 3>(p, way, stream);
  }
}

void launch(const DoraNormProblem& p, Way way, cudaStream_t stream) {
  switch (p.lora_a.dtype) {
    case Dtype::kFloat32:
      launch_prepare<float>(p, way.tiles, stream);
      break;
    case Dtype::kBFloat16:
      launch_prepare<Bfloat16Bits>(p, way.tiles, stream);
      break;
    case Dtype::kFloat16:
      launch_prepare<HalfBits>(p, way.tiles, stream);
      break;
  }
  switch (p.weight.dtype) {
    case Dtype::kFloat32:
      return launch_norm<float>(p, way, stream);
    case Dtype::kBFloat16:
      if (way.tiles && dora_parts(p.weight.dtype, p.lora_a.dtype) == 1) {
        return launch_mma<Bfloat16Bits, 1>(p, way, stream);
      }
      return launch_norm<Bfloat16Bits>(p, way, stream);
    case Dtype::kFloat16:
      return launch_norm<HalfBits>(p, way, stream);
  }
}

}  // namespace

const char* launch_dora_norm(const DoraNormProblem& problem, bool clusters, int device,
                             void* stream) {
  if (problem.n == 0) return nullptr;
  int previous = 0, major = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    const Way way{problem.rank >= 16 && major >= 8, clusters && has_clusters(10 * major)};
    launch(problem, way, static_cast<cudaStream_t>(stream));
    error = cudaGetLastError();
  }
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lrk
