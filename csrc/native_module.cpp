// lowrank_kernels._native: what is not a tensor op and so may use pybind11. pybind11 has no stable
// Python ABI; this module therefore serves one Python version, and the package runs without it.
#include <pybind11/pybind11.h>

#include <string>

#include "batch_plan.h"
#include "build_info.h"

namespace py = pybind11;

namespace {

// The memory of a contiguous one-dimensional buffer of `size` or more elements of one integer type.
py::buffer_info integers(const py::buffer& buffer, const char* name, bool writable, int64_t size) {
  py::buffer_info info = buffer.request(writable);
  const bool is_int32 = info.item_type_is_equivalent_to<int32_t>();
  if (info.ndim != 1 || (info.shape[0] > 1 && info.strides[0] != info.itemsize) ||
      !(is_int32 || (!writable && info.item_type_is_equivalent_to<int64_t>()))) {
    throw py::value_error(std::string("plan_batch: expected ") + name +
                          " to be contiguous, one-dimensional and of int32" +
                          (writable ? "" : " or int64"));
  }
  if (info.shape[0] < size) {
    throw py::value_error(std::string("plan_batch: expected ") + name + " of at least " +
                          std::to_string(size) + " elements, got " + std::to_string(info.shape[0]));
  }
  return info;
}

int64_t plan_batch(const py::buffer& ids, int64_t adapters, int64_t tile_rows,
                   const py::buffer& order, const py::buffer& bounds, const py::buffer& tiles) {
  const py::buffer_info in = integers(ids, "ids", false, 0);
  const int64_t rows = in.shape[0];
  if (adapters < 0 || tile_rows < 1 || rows > INT32_MAX - tile_rows) {
    throw py::value_error(
        "plan_batch: expected 0 or more adapters, tiles of 1 or more rows, and fewer than 2**31 "
        "rows");
  }
  const py::buffer_info rows_out = integers(order, "order", true, rows);
  const py::buffer_info bounds_out = integers(bounds, "bounds", true, adapters + 2);
  const int64_t capacity = lrk::tile_capacity(rows, adapters, tile_rows);
  const py::buffer_info tiles_out = integers(tiles, "tiles", true, 3 * capacity);
  const auto plan = [&](const auto* values) {
    return lrk::plan_batch(values, rows, adapters, tile_rows, static_cast<int32_t*>(rows_out.ptr),
                           static_cast<int32_t*>(bounds_out.ptr),
                           static_cast<lrk::Tile*>(tiles_out.ptr), tiles_out.shape[0] / 3);
  };
  const int64_t used = in.itemsize == 4 ? plan(static_cast<const int32_t*>(in.ptr))
                                        : plan(static_cast<const int64_t*>(in.ptr));
  if (used < 0) {
    throw py::value_error("plan_batch: expected ids from -1 to " + std::to_string(adapters - 1) +
                          ", got another in row " + std::to_string(-1 - used));
  }
  return used;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Host-side parts of lowrank_kernels that take buffers, not tensors.";
  m.def(
      "build_info",
      [] {
        return py::module_::import("json").attr("loads")(LRK_BUILD_INFO_JSON).cast<py::dict>();
      },
      "Compiler, build type, CUDA state and torch version of this build, as a dict.");
  m.def("plan_batch", &plan_batch, py::arg("ids"), py::arg("adapters"), py::arg("tile_rows"),
        py::arg("order"), py::arg("bounds"), py::arg("tiles"),
        "Sort the rows of a batch by adapter into buffers that the caller owns; the number of "
        "tiles. See csrc/batch_plan.h.");
}
