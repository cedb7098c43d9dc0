// lowrank_kernels._native: what is not a tensor op and so may use pybind11. pybind11 has no stable
// Python ABI; this module therefore serves one Python version, and the package runs without it.
#include <pybind11/pybind11.h>

#include "build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Host-side helpers of lowrank_kernels that take no tensors.";
  m.def(
      "build_info",
      [] {
        return py::module_::import("json").attr("loads")(LRK_BUILD_INFO_JSON).cast<py::dict>();
      },
      "Compiler, build type, CUDA state and torch version of this build, as a dict.");
}
