// What the registration files need of torch to launch a CUDA kernel, through the stable ABI. Only
// where CUDA is built (LRK_WITH_CUDA).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

// Weak, because the same binary must load where torch has no CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));

namespace lrk {

// The stream on which torch works on this device now, a cudaStream_t.
inline void* current_stream(const char* op, int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
                  ": this torch has no CUDA support; install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// What a launcher returned: null, or the error that the runtime names.
inline void check_launch(const char* op, int32_t device, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the launch failed on device ", device, ": ", error);
}

}  // namespace lrk
