// The host's batch planner: which rows of a batch belong to which adapter. Framework-free; the
// torch ops that use it are in register_multi_lora.cpp, and kernels/multi_lora_tiles.py has the
// same tile_capacity.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lrk {

struct Tile {
  int32_t adapter;  // -1: rows without one, or an unused tile
  int32_t first;    // into the order
  int32_t count;    // 0: unused
};

// Tiles that a plan may need, whatever the ids are.
inline int64_t tile_capacity(int64_t rows, int64_t adapters, int64_t tile_rows) {
  return (rows + tile_rows - 1) / tile_rows + std::min(rows, adapters + 1);
}

// Where a plan is written.
//   order   (rows)          row numbers, adapter by adapter, each adapter's in ascending order
//   bounds  (adapters + 2)  adapter i has order[bounds[i]] up to order[bounds[i + 1]]; the last
//                           range is that of the rows without one
//   tiles   (capacity)      ranges of at most `tile_rows` rows of one adapter; unused ones at the
//                           end. capacity is at least tile_capacity().
struct BatchPlan {
  int32_t* order;
  int32_t* bounds;
  Tile* tiles;
  int64_t capacity;
};

// Stable counting sort of `rows` ids from [-1, adapters), ids[0], ids[stride], ...; rows without an
// adapter come last. Returns the number of tiles, or -1 - row for the first row whose id is out of
// range.
template <typename Id>
int64_t plan_batch(const Id* ids, int64_t stride, int64_t rows, int64_t adapters, int64_t tile_rows,
                   const BatchPlan& plan) {
  const auto [order, bounds, tiles, capacity] = plan;
  std::fill(bounds, bounds + adapters + 2, 0);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = static_cast<int64_t>(ids[row * stride]);
    if (id < -1 || id >= adapters) return -1 - row;
    ++bounds[(id < 0 ? adapters : id) + 1];
  }
  for (int64_t i = 0; i <= adapters; ++i) bounds[i + 1] += bounds[i];
  // bounds[i] serves as adapter i's cursor, and so ends where adapter i + 1 begins.
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = static_cast<int64_t>(ids[row * stride]);
    order[bounds[id < 0 ? adapters : id]++] = static_cast<int32_t>(row);
  }
  for (int64_t i = adapters + 1; i > 0; --i) bounds[i] = bounds[i - 1];
  bounds[0] = 0;
  int64_t used = 0;
  for (int64_t i = 0; i <= adapters; ++i) {
    for (int32_t first = bounds[i]; first < bounds[i + 1];
         first += static_cast<int32_t>(tile_rows)) {
      const int32_t left = bounds[i + 1] - first;
      tiles[used++] = {static_cast<int32_t>(i < adapters ? i : -1), first,
                       std::min(left, static_cast<int32_t>(tile_rows))};
    }
  }
  std::fill(tiles + used, tiles + capacity, Tile{-1, 0, 0});
  return used;
}

}  // namespace lrk
