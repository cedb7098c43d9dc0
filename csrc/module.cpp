// The module _C as a whole: what can be asked of it without a tensor. Its torch ops register
// themselves when it is loaded: see register_*.cpp.
#include <Python.h>

#include "build_info.h"
#include "cpu/kernel_table.h"

#define LRK_EXPORT __attribute__((visibility("default")))

extern "C" {

// For ctypes (lowrank_kernels/_extension.py), which serves every Python version that _C serves.
LRK_EXPORT const char* lrk_build_info() { return LRK_BUILD_INFO_JSON; }

LRK_EXPORT const char* lrk_cpu_isa() { return lrk::kernel_table().name; }

// An empty Python module.
LRK_EXPORT PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
}
