// lowrank_kernels._native, by pybind11: what describes the build and the processor, and so is no
// tensor op. It needs neither torch nor _C, and can say what was built for where _C does not load.
// pybind11 has no stable Python ABI: this module serves one Python version, and the package runs
// without it.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "cpu/processor.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about this build of lowrank_kernels and this processor; loads no torch.";
  m.def(
      "build_info",
      [] {
        return py::module_::import("json").attr("loads")(LRK_BUILD_INFO_JSON).cast<py::dict>();
      },
      "Compiler, build type, CUDA state and torch version of this build, as a dict.");
  m.def(
      "cpu_isa", [] { return lrk::name_of(lrk::instruction_set()); },
      "The best instruction set that this processor, its operating system and LRK_CPU_ISA allow: "
      "generic, avx2, avx512 or amx.");
}
