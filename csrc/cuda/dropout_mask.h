// Launcher of the dropout mask, callable from code that knows neither CUDA nor nvcc.
#pragma once

#include <cstdint>

namespace lrk {

// mask (rows, columns) and seed (one element) live on `device`; `stream` is a cudaStream_t.
// Returns null, or what the runtime says went wrong. Does not synchronise.
const char* launch_dropout_keep_mask(uint8_t* mask, const int64_t* seed, int64_t rows,
                                     int64_t columns, uint32_t threshold, int device, void* stream);

}  // namespace lrk
