// Launcher of the DoRA norm, callable from code that knows neither CUDA nor nvcc.
#pragma once

#include "../dora_norm_problem.h"

namespace lrk {

// Runs on `device` in `stream`, a cudaStream_t. Ranks 1 to 512.
// `clusters`: whether blocks may fetch A together, where the device can; the result is the same.
// Returns null, or what the runtime says went wrong. Does not synchronise.
const char* launch_dora_norm(const DoraNormProblem& problem, bool clusters, int device,
                             void* stream);

}  // namespace lrk
