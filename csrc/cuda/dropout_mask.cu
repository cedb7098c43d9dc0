#include <cuda_runtime_api.h>

#include "dropout_mask.cuh"
#include "dropout_mask.h"

namespace lrk {

const char* launch_dropout_keep_mask(uint8_t* mask, const int64_t* seed, int64_t rows,
                                     int64_t columns, uint32_t threshold, int device,
                                     void* stream) {
  if (rows == 0 || columns == 0) return nullptr;
  constexpr unsigned kThreads = 128;
  constexpr int64_t kMaxGridY = 65535;
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t groups = (columns + 3) / 4;
  const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads),
                  static_cast<unsigned>(rows < kMaxGridY ? rows : kMaxGridY));
  dropout_keep_mask_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      mask, seed, rows, columns, threshold);
  error = cudaGetLastError();
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lrk
