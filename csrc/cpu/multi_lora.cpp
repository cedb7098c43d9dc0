// The passes of multi_lora.h: each tile of rows with its own adapter's part of the factors.
#include "multi_lora.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace lrk {
namespace {

constexpr int64_t kRanks = 8;           // ranks of one down-projection task
constexpr int64_t kUpColumns = 2048;    // columns of one up-projection task,
constexpr int64_t kUpFewColumns = 512;  // and with few tiles
constexpr int64_t kUpFewTiles = 8;
constexpr int64_t kGradColumns = 512;          // columns of one gradient task
constexpr int64_t kGradRows = 32;              // reduction slice of a gradient
constexpr int64_t kSerial = int64_t{1} << 17;  // multiply-adds below which one thread is enough

int64_t largest_rank(const Adapters& adapters) {
  int64_t rank = 0;
  for (int64_t i = 0; i < adapters.count; ++i) {
    rank = std::max<int64_t>(rank, adapters.places[i].rank);
  }
  return rank;
}

// The tallest tile that has an adapter; 0 where there is none.
int64_t tallest(const Batch& batch) {
  int64_t rows = 0;
  for (int64_t t = 0; t < batch.tile_count; ++t) {
    rows = std::max<int64_t>(rows, batch.tiles[t].count);
  }
  return rows;
}

const AdapterDropout* dropout_of(const Adapters& adapters, int64_t adapter) {
  if (!adapters.dropouts || adapters.dropouts[adapter].dropout.threshold == 0) return nullptr;
  return adapters.dropouts + adapter;
}

// One row's part of `m`, as float32 into dst, zero up to padded_cols.
void stage(const KernelTable& kernels, float* dst, const Matrix& m, int64_t row, int64_t col,
           int64_t cols, int64_t padded_cols, const Dropout* dropout) {
  kernels.stage_float(
      dst, padded_cols,
      {element(m, row, col), m.dtype, m.stride, 1, cols, padded_cols, dropout, row, col, nullptr});
}

}  // namespace

void multi_lora_down(const Runtime& runtime, const Matrix& p, const Matrix& x, const Matrix& factor,
                     const Adapters& adapters, const Batch& batch) {
  const KernelTable& kernels = runtime.kernels;
  const int64_t width = x.cols, ranks = largest_rank(adapters), tile_rows = tallest(batch);
  const int64_t rank_blocks = ceil_div(ranks, kRanks);
  const bool parallel = x.rows * width * ranks > kSerial;
  run(runtime, batch.tile_count * rank_blocks, parallel, [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t rows_at = layout.add<const float*>(tile_rows);
    const size_t staged_at = layout.add<float>(tile_rows * width);
    TaskScratch scratch(layout.bytes());
    const float** rows = at<const float*>(scratch.base(), rows_at);
    float* staged = at<float>(scratch.base(), staged_at);
    int64_t there = -1;  // the tile whose rows are in `rows`
    for (int64_t task = begin; task < end; ++task) {
      const Tile tile = batch.tiles[task / rank_blocks];
      const int64_t r0 = task % rank_blocks * kRanks;
      if (tile.adapter < 0 || r0 >= adapters.places[tile.adapter].rank) continue;
      const Place place = adapters.places[tile.adapter];
      const AdapterDropout* dropout = dropout_of(adapters, tile.adapter);
      if (there != task / rank_blocks) {
        there = task / rank_blocks;
        for (int64_t i = 0; i < tile.count; ++i) {
          const int64_t row = batch.order[tile.first + i];
          rows[i] = static_cast<const float*>(element(x, row, 0));
          if (x.dtype == Dtype::kFloat32 && !dropout) continue;
          rows[i] = staged + i * width;
          stage(kernels, staged + i * width, x, row, 0, width, width,
                dropout ? &dropout->dropout : nullptr);
        }
      }
      const int64_t count = std::min<int64_t>(kRanks, place.rank - r0);
      float out[kRanks];
      const float scale = dropout ? dropout->inverse_keep : 1.0f;
      // Rows in fours: a factor's row is loaded once for four of them.
      for (int64_t i = 0; i < tile.count; i += 4) {
        const int64_t n = std::min<int64_t>(4, tile.count - i);
        float block[4 * kRanks];
        kernels.dot_rows(
            block, kRanks, n, count,
            {rows + i, element(factor, place.start + r0, 0), factor.dtype, factor.stride, width},
            nullptr);
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t r = 0; r < count; ++r) out[r] = scale * block[j * kRanks + r];
          std::memcpy(mutable_element(p, batch.order[tile.first + i + j], r0), out,
                      static_cast<size_t>(count) * sizeof(float));
        }
      }
    }
  });
}

void multi_lora_up(const Runtime& runtime, const Matrix& y, const Matrix& p, const Matrix& factor,
                   const Adapters& adapters, const Batch& batch,
                   const AdapterColumnScale* columns) {
  const KernelTable& kernels = runtime.kernels;
  const int64_t width = y.cols, ranks = largest_rank(adapters), tile_rows = tallest(batch);
  const int64_t task_columns = batch.tile_count < kUpFewTiles ? kUpFewColumns : kUpColumns;
  const int64_t blocks = ceil_div(width, task_columns);
  const bool parallel = y.rows * width * (ranks + (columns ? 1 : 0)) > kSerial;
  run(runtime, batch.tile_count * blocks, parallel, [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t sum_at = layout.add<float>(tile_rows * task_columns);
    const size_t p_at = layout.add<float>(tile_rows * ranks);
    const size_t ones_at = layout.add<float>(task_columns);
    TaskScratch scratch(layout.bytes());
    float* sum = at<float>(scratch.base(), sum_at);
    float* left = at<float>(scratch.base(), p_at);
    float* ones = at<float>(scratch.base(), ones_at);
    std::fill(ones, ones + task_columns, 1.0f);
    for (int64_t task = begin; task < end; ++task) {
      const Tile tile = batch.tiles[task / blocks];
      const int64_t col = task % blocks * task_columns, cols = std::min(task_columns, width - col);
      const Place place = tile.adapter < 0 ? Place{0, 0, -1} : adapters.places[tile.adapter];
      if (place.rank) {
        const AdapterDropout* dropout = dropout_of(adapters, tile.adapter);
        for (int64_t i = 0; i < tile.count; ++i) {
          const int64_t row = batch.order[tile.first + i];
          const float scale =
              adapters.scalings[tile.adapter] * (batch.weights ? batch.weights[row] : 1.0f);
          stage(kernels, left + i * place.rank, p, row, 0, place.rank, place.rank, nullptr);
          for (int64_t r = 0; r < place.rank; ++r) left[i * place.rank + r] *= scale;
        }
        kernels.mix_rows({sum, task_columns, left, place.rank, tile.count,
                          element(factor, place.start, col), factor.dtype, factor.stride,
                          place.rank, cols, false});
        for (int64_t i = 0; i < tile.count; ++i) {
          const int64_t row = batch.order[tile.first + i];
          kernels.add(mutable_element(y, row, col), y.dtype, y.stride, sum + i * task_columns,
                      task_columns, 1, cols, dropout ? dropout->inverse_keep : 1.0f,
                      dropout ? &dropout->dropout : nullptr, row, col);
        }
      }
      if (!columns) continue;
      const float* scale =
          place.dora < 0 ? ones
                         : static_cast<const float*>(element(columns->scale, place.dora, col));
      for (int64_t i = 0; i < tile.count; ++i) {
        const int64_t row = batch.order[tile.first + i];
        kernels.scale_columns(mutable_element(columns->out, row, col), y.dtype, columns->out.stride,
                              element(y, row, col), y.stride, 1, cols, scale,
                              columns->bias ? columns->bias + col : nullptr);
      }
    }
  });
}

void multi_lora_grad(const Runtime& runtime, const Matrix& out, const Matrix& big,
                     const Matrix& small, const Adapters& adapters, const Batch& batch) {
  const KernelTable& kernels = runtime.kernels;
  const int64_t width = big.cols, ranks = largest_rank(adapters);
  const int64_t blocks = ceil_div(width, kGradColumns);
  zero(out);
  const bool parallel = big.rows * width * ranks > kSerial;
  run(runtime, adapters.count * blocks, parallel, [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t sum_at = layout.add<float>(ranks * kGradColumns);
    const size_t big_at = layout.add<float>(kGradRows * kGradColumns);
    const size_t small_at = layout.add<float>(ranks);
    const size_t left_at = layout.add<float>(ranks * kGradRows);
    TaskScratch scratch(layout.bytes());
    float* sum = at<float>(scratch.base(), sum_at);
    float* staged = at<float>(scratch.base(), big_at);
    float* line = at<float>(scratch.base(), small_at);
    float* left = at<float>(scratch.base(), left_at);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t adapter = task / blocks, first = batch.bounds[adapter];
      const int64_t last = batch.bounds[adapter + 1];
      const Place place = adapters.places[adapter];
      if (first == last || place.rank == 0) continue;
      const int64_t col = task % blocks * kGradColumns, cols = std::min(kGradColumns, width - col);
      const int64_t padded = ceil_div(cols, kPanel) * kPanel;
      const AdapterDropout* dropout = dropout_of(adapters, adapter);
      for (int64_t m0 = first; m0 < last; m0 += kGradRows) {
        const int64_t rows = std::min(kGradRows, last - m0);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t row = batch.order[m0 + i];
          stage(kernels, staged + i * padded, big, row, col, cols, padded,
                dropout ? &dropout->dropout : nullptr);
          stage(kernels, line, small, row, 0, place.rank, place.rank, nullptr);
          const float weight = batch.weights ? batch.weights[row] : 1.0f;
          for (int64_t r = 0; r < place.rank; ++r) left[r * kGradRows + i] = weight * line[r];
        }
        kernels.multiply_float({place.rank, padded / kPanel, rows, left, kGradRows, staged, padded,
                                kPanel, sum, kGradColumns, m0 > first});
      }
      kernels.store(mutable_element(out, place.start, col), out.dtype, out.stride, sum,
                    kGradColumns, place.rank, cols,
                    adapters.scalings[adapter] * (dropout ? dropout->inverse_keep : 1.0f));
    }
  });
}

}  // namespace lrk
