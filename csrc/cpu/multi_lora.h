// The thin passes of many LoRA adapters at once on a CPU. A factor is the adapters' factors one
// after another along the rank, (sum of R, width) for A and B alike, and the table says where each
// begins. A row of x belongs to one adapter or none; see batch_plan.h.
//
// All passes accumulate in float32 and round once. A row's sums depend on its own values and on
// shapes alone, never on the number of threads or on the other rows of the batch.
#pragma once

#include <cstdint>

#include "../batch_plan.h"
#include "matrix.h"

namespace lrk {

// Where an adapter's rows of rank lie in a factor; `dora`: its row of column scales, or below 0.
struct Place {
  int32_t start;
  int32_t rank;
  int32_t dora;
};

// Dropout of one adapter; `inverse_keep` = 1 / (1 - p), 1 where it is off.
struct AdapterDropout {
  Dropout dropout;
  float inverse_keep;
};

struct Adapters {
  int64_t count;
  const Place* places;
  const float* scalings;           // one each; not used by multi_lora_down
  const AdapterDropout* dropouts;  // one each, or null
};

struct Batch {
  const int32_t* order;   // rows, adapter by adapter
  const int32_t* bounds;  // multi_lora_grad alone
  const Tile* tiles;      // the others
  int64_t tile_count;
  const float* weights;  // one factor a row, or null
};

// p (M, largest rank), float32: p[m, :R] = drop(x[m]) factor[own rows]^T / (1 - p), for the rows
// and ranks that there are; the rest is left alone.
void multi_lora_down(const Runtime& runtime, const Matrix& p, const Matrix& x, const Matrix& factor,
                     const Adapters& adapters, const Batch& batch);

// out = g * y + bias, column by column, where some adapters are DoRA's; g is 1 for rows of others
// and of none.
struct AdapterColumnScale {
  Matrix scale;       // (D, width), float32: a row for each DoRA adapter
  const float* bias;  // width floats, or null
  Matrix out;         // may be y
};

// y[m] += s w drop(p[m, :R] factor[own rows]) / (1 - p), and then `columns` of y unless it is null.
void multi_lora_up(const Runtime& runtime, const Matrix& y, const Matrix& p, const Matrix& factor,
                   const Adapters& adapters, const Batch& batch,
                   const AdapterColumnScale* columns = nullptr);

// out (sum of R, width): each adapter's s (w small)^T drop(big) / (1 - p) over its rows in their
// order, 0 for an adapter without rows. small (M, largest rank).
void multi_lora_grad(const Runtime& runtime, const Matrix& out, const Matrix& big,
                     const Matrix& small, const Adapters& adapters, const Batch& batch);

}  // namespace lrk
