// What all CPU passes are made of: C = L * G for a block of rows of L and a packed factor G, in
// float32 sums (see kernel_table.h for the layouts).
//
//   Engine<float>, Engine<uint16_t>   the two element types: FMA, and bfloat16 on AMX tiles
//   pack_block, pack_panels, pack_all  a factor into panels
//   down_block                         the loop over the reduction
#pragma once

#include <algorithm>
#include <cstring>

#include "matrix.h"
#include "scratch.h"

namespace lrk {

// How sums and work are cut. Functions of shapes alone, so that results do not depend on threads.
constexpr int64_t kRowBlock = 32;          // rows of L that one block product takes
constexpr int64_t kDepthBlock = 256;       // staged or float32 reduction slice: 32 KiB of rows
constexpr int64_t kTileDepthBlock = 2048;  // bfloat16 rows read in place: C stays in tiles
constexpr int64_t kPackPanels = 4;         // panels of one packing task
constexpr int64_t kPackDepth = 512;        // depth of one packing task

// Below this many multiply-adds a second thread costs more than it brings. It costs more where
// threads share a packed factor, which then moves from one core's cache to the other's.
struct SerialWork {
  int64_t down, up, up_few_rows, grad;
};
constexpr SerialWork kSerialFloat = {int64_t{1} << 22, int64_t{1} << 21, int64_t{1} << 18,
                                     int64_t{1} << 18};
constexpr SerialWork kSerialTile = {int64_t{1} << 23, int64_t{1} << 22, int64_t{1} << 18,
                                    int64_t{1} << 20};
// Drawing random words is the larger part of a pass with dropout.
constexpr int64_t kSerialDropout = int64_t{1} << 14;

// The two element types of a block product.
template <typename Elem>
struct Engine;

template <>
struct Engine<float> {
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static constexpr SerialWork kSerial = kSerialFloat;
  // A running float32 sum loses digits with its length: short runs, added up, lose fewer.
  static constexpr int64_t kDirectDepth = 64;
  static int64_t depth(int64_t n) { return n; }
  static int64_t direct_depth(int64_t n) { return n; }

  explicit Engine(const KernelTable& kernels) : kernels_(kernels) {}
  void stage(float* dst, int64_t stride, const Source& src) const {
    kernels_.stage_float(dst, stride, src);
  }
  void multiply(const BlockProduct<float>& block) const { kernels_.multiply_float(block); }
  const KernelTable& kernels() const { return kernels_; }

 private:
  const KernelTable& kernels_;
};

template <>
struct Engine<uint16_t> {
  static constexpr Dtype kDtype = Dtype::kBFloat16;
  static constexpr SerialWork kSerial = kSerialTile;
  static constexpr int64_t kDirectDepth = kTileDepthBlock;
  static int64_t depth(int64_t n) { return n <= 32 ? round_up(n, 2) : round_up(n, 32); }
  // The part of a reduction that tiles can read in place: whole tile rows only, since past the end
  // of a row lies the next one.
  static int64_t direct_depth(int64_t n) { return n < 32 ? (n % 2 ? 0 : n) : n / 32 * 32; }

  explicit Engine(const KernelTable& kernels) : kernels_(kernels) {}
  ~Engine() {
    // The tile state goes back to its initial value, as whoever runs next on this thread expects.
    if (tile_shape_) kernels_.release();
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  void stage(uint16_t* dst, int64_t stride, const Source& src) const {
    kernels_.stage_bfloat16(dst, stride, src);
  }
  void multiply(const BlockProduct<uint16_t>& block) const {
    kernels_.multiply_bfloat16(block, &tile_shape_);
  }
  const KernelTable& kernels() const { return kernels_; }

 private:
  const KernelTable& kernels_;
  mutable uint32_t tile_shape_ = 0;
};

// ---- panels of a factor -------------------------------------------------------------------------

// A factor as the G of a block product, which reduces over `depth` and yields `columns`.
// `columns_first`: the matrix is (columns, depth), so columns must be transposed into panels.
// `depth_scale`: null, or a factor for each step of the reduction where the matrix is (depth,
// columns).
struct PanelSource {
  Matrix matrix;
  bool columns_first;
  const float* depth_scale = nullptr;
  int64_t depth() const { return columns_first ? matrix.cols : matrix.rows; }
  int64_t columns() const { return columns_first ? matrix.rows : matrix.cols; }
  PanelSource block(int64_t column, int64_t count, int64_t first, int64_t length) const {
    if (columns_first) return {part(matrix, column, first, count, length), true};
    return {part(matrix, first, column, length, count), false,
            depth_scale ? depth_scale + first : nullptr};
  }
};

// What one packing task makes: panels [panel_begin, panel_end), and of them the steps [k0, k1) of
// the reduction.
struct PackRange {
  int64_t panel_begin, panel_end;
  int64_t k0, k1;
};

// One packing task's own buffer: 16 rows of kPackDepth, or kPackDepth rows of a panel group.
constexpr int64_t kPackBuffer = kPackDepth * kPackPanels * kPanel;

inline void pack_block(const KernelTable& kernels, float* dst, int64_t padded_depth,
                       const PanelSource& src, const PackRange& range, void* buffer) {
  const auto [panel_begin, panel_end, k0, k1] = range;
  const int64_t columns = src.columns();
  if (!src.columns_first) {
    const int64_t c0 = panel_begin * kPanel;
    stage_panels(kernels, dst + panel_begin * padded_depth * kPanel + k0 * kPanel,
                 padded_depth * kPanel,
                 {src.matrix, k0, c0, k1 - k0, std::min(panel_end * kPanel, columns) - c0});
    for (int64_t panel = panel_begin; src.depth_scale && panel < panel_end; ++panel) {
      float* out = dst + panel * padded_depth * kPanel;
      for (int64_t k = k0; k < k1; ++k) {
        for (int64_t c = 0; c < kPanel; ++c) out[k * kPanel + c] *= src.depth_scale[k];
      }
    }
    return;
  }
  float* rows = static_cast<float*>(buffer);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    float* out = dst + panel * padded_depth * kPanel + k0 * kPanel;
    const int64_t c0 = panel * kPanel, count = std::min(kPanel, columns - c0);
    Source s = rectangle(src.matrix, c0, k0, count, k1 - k0);
    const uint32_t* in = static_cast<const uint32_t*>(s.data);
    int64_t stride = s.stride;
    if (s.dtype != Dtype::kFloat32 || count < kPanel) {
      kernels.stage_float(rows, kPackDepth, s);
      for (int64_t c = count; c < kPanel; ++c) {
        std::memset(rows + c * kPackDepth, 0, static_cast<size_t>(k1 - k0) * sizeof(float));
      }
      in = reinterpret_cast<const uint32_t*>(rows);
      stride = kPackDepth;
    }
    kernels.transpose(reinterpret_cast<uint32_t*>(out), kPanel, in, stride, kPanel, k1 - k0);
  }
}

inline void pack_block(const KernelTable& kernels, uint16_t* dst, int64_t padded_depth,
                       const PanelSource& src, const PackRange& range, void* buffer) {
  const auto [panel_begin, panel_end, k0, k1] = range;
  const int64_t depth = src.depth(), columns = src.columns();
  const int64_t live = std::min(k1, depth) - k0;  // the rest of [k0, k1) is padding
  uint16_t* rows = static_cast<uint16_t*>(buffer);
  if (src.columns_first) {
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      uint16_t* out = dst + panel * padded_depth * kPanel + k0 * kPanel;
      const int64_t c0 = panel * kPanel, count = std::min(kPanel, columns - c0);
      Source s = rectangle(src.matrix, c0, k0, count, live);
      s.padded_cols = k1 - k0;
      const uint16_t* in = static_cast<const uint16_t*>(s.data);
      int64_t stride = s.stride;
      // Pairs of a row are moved as 32-bit words, so in place only when rows start on even
      // elements.
      if (s.dtype != Dtype::kBFloat16 || count < kPanel || live < k1 - k0 || stride % 2) {
        kernels.stage_bfloat16(rows, kPackDepth, s);
        for (int64_t c = count; c < kPanel; ++c) {
          std::memset(rows + c * kPackDepth, 0, static_cast<size_t>(k1 - k0) * sizeof(uint16_t));
        }
        in = rows;
        stride = kPackDepth;
      }
      kernels.transpose(reinterpret_cast<uint32_t*>(out), kPanel,
                        reinterpret_cast<const uint32_t*>(in), stride / 2, kPanel, (k1 - k0) / 2);
    }
    return;
  }
  const int64_t c0 = panel_begin * kPanel;
  const int64_t count = std::min(panel_end * kPanel, columns) - c0;
  Source s = rectangle(src.matrix, k0, c0, live, count);
  const uint16_t* in = static_cast<const uint16_t*>(s.data);
  int64_t stride = s.stride;
  if (s.dtype != Dtype::kBFloat16) {
    stride = kPackPanels * kPanel;
    kernels.stage_bfloat16(rows, stride, s);
    in = rows;
  }
  kernels.interleave(dst + panel_begin * padded_depth * kPanel + k0 * kPanel, padded_depth * kPanel,
                     in, stride, live, k1 - k0, count,
                     src.depth_scale ? src.depth_scale + k0 : nullptr);
}

template <typename Elem>
void pack_panels(const KernelTable& kernels, Elem* dst, int64_t padded_depth,
                 const PanelSource& src, int64_t panel_begin, int64_t panel_end, void* buffer) {
  for (int64_t panel = panel_begin; panel < panel_end; panel += kPackPanels) {
    const int64_t last = std::min(panel + kPackPanels, panel_end);
    for (int64_t k0 = 0; k0 < padded_depth; k0 += kPackDepth) {
      const int64_t k1 = std::min(k0 + kPackDepth, padded_depth);
      pack_block(kernels, dst, padded_depth, src, {panel, last, k0, k1}, buffer);
    }
  }
}

template <typename Elem>
void pack_all(const Runtime& runtime, Elem* dst, int64_t padded_depth, const PanelSource& src) {
  const int64_t panels = ceil_div(src.columns(), kPanel);
  const int64_t groups = ceil_div(panels, kPackPanels);
  const int64_t slices = ceil_div(padded_depth, kPackDepth);
  const bool parallel = panels * kPanel * padded_depth > (int64_t{1} << 17);
  run(runtime, groups * slices, parallel, [&](int64_t begin, int64_t end) {
    TaskScratch scratch(kPackBuffer * sizeof(Elem));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / slices * kPackPanels, k0 = task % slices * kPackDepth;
      const int64_t last = std::min(panel + kPackPanels, panels);
      const int64_t k1 = std::min(k0 + kPackDepth, padded_depth);
      pack_block(runtime.kernels, dst, padded_depth, src, {panel, last, k0, k1}, scratch.base());
    }
  });
}

// ---- a block of rows times packed panels
// ---------------------------------------------------------

// A packed factor as the G of a product.
template <typename Elem>
struct Panels {
  const Elem* data;
  int64_t count;   // of 16 columns each
  int64_t stride;  // from one panel to the next
};

// C (rows of x, 16 columns a panel) = drop(x) times panels whose first step of the reduction is the
// first column of x; added to C where `accumulate` says so. `staged` holds kRowBlock x kDepthBlock
// elements. dropout: null for none.
template <typename Elem>
void down_block(const Engine<Elem>& engine, const Region& x, const Panels<Elem>& panels,
                const Sums& c, Elem* staged, bool accumulate = false,
                const Dropout* dropout = nullptr) {
  const int64_t cols = x.cols;
  const bool in_place = x.whole.dtype == Engine<Elem>::kDtype && !dropout;
  const int64_t direct = in_place ? Engine<Elem>::direct_depth(cols) : 0;
  for (int64_t k0 = 0; k0 < cols;) {
    const Elem* l;
    int64_t l_stride, live, depth;
    if (k0 < direct) {
      live = depth = std::min(Engine<Elem>::kDirectDepth, direct - k0);
      l = static_cast<const Elem*>(element(x.whole, x.row, x.col + k0));
      l_stride = x.whole.stride;
    } else {
      live = std::min(kDepthBlock, cols - k0);
      depth =
          cols < 32 ? Engine<Elem>::depth(live) : (sizeof(Elem) == 2 ? round_up(live, 32) : live);
      Source s = rectangle(x.whole, x.row, x.col + k0, x.rows, live);
      s.padded_cols = depth;
      s.dropout = dropout;
      engine.stage(staged, kDepthBlock, s);
      l = staged;
      l_stride = kDepthBlock;
    }
    engine.multiply({x.rows, panels.count, depth, l, l_stride, panels.data + k0 * kPanel, kPanel,
                     panels.stride, c.data, c.stride, accumulate});
    accumulate = true;
    k0 += live;
  }
}

}  // namespace lrk
