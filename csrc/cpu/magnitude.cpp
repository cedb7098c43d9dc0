#include "magnitude.h"

#include "scratch.h"

namespace lrk {
namespace {

constexpr int64_t kLeast = int64_t{1} << 16;  // elements of a task
constexpr int64_t kTasks = 64;                // at most
constexpr int64_t kStaged = 1024;             // at a time, of a dtype that is no float32
constexpr int kCopies = 4;  // of the counts: equal values that follow one another are not added to
                            // the same one

// Elements `begin` to `end` of the row, into kCopies times 2^bits + 1 counts. The last of each copy
// is of elements that do not count.
void count(const KernelTable& kernels, const Matrix& values, int64_t begin, int64_t end, int bits,
           int shift, uint32_t leading, uint32_t* counts) {
  float staged[kStaged];
  uint16_t digits[kStaged];
  const uint32_t size = uint32_t{1} << bits, mask = size - 1;
  const int high = shift + bits;
  for (int64_t at = begin; at < end; at += kStaged) {
    const int64_t n = std::min(kStaged, end - at);
    const float* x = static_cast<const float*>(element(values, 0, at));
    if (values.dtype != Dtype::kFloat32) {
      kernels.stage_float(staged, kStaged, rectangle(values, 0, at, 1, n));
      x = staged;
    }
    for (int64_t i = 0; i < n; ++i) {
      uint32_t magnitude;
      std::memcpy(&magnitude, x + i, sizeof(magnitude));
      magnitude &= 0x7FFFFFFFu;
      const uint32_t digit = (magnitude >> shift) & mask;
      digits[i] = static_cast<uint16_t>(magnitude >> high == leading ? digit : size);
    }
    for (int64_t i = 0; i < n; ++i) ++counts[(i % kCopies) * (size + 1) + digits[i]];
  }
}

}  // namespace

void magnitude_histogram(const Runtime& runtime, const Matrix& values, int bits, int shift,
                         uint32_t leading, int64_t* counts) {
  const int64_t size = int64_t{1} << bits;
  const int64_t length = std::max(kLeast, ceil_div(values.cols, kTasks));
  const int64_t tasks = ceil_div(values.cols, length);
  Layout shared;
  const size_t partial_at = shared.add<uint32_t>(tasks * size);
  CallScratch call(shared.bytes());
  uint32_t* partial = at<uint32_t>(call.base(), partial_at);
  run(runtime, tasks, tasks > 1, [&](int64_t begin, int64_t end) {
    Layout layout;
    const size_t copies_at = layout.add<uint32_t>(kCopies * (size + 1));
    TaskScratch scratch(layout.bytes());
    uint32_t* copies = at<uint32_t>(scratch.base(), copies_at);
    for (int64_t task = begin; task < end; ++task) {
      std::fill_n(copies, kCopies * (size + 1), 0u);
      count(runtime.kernels, values, task * length, std::min(values.cols, (task + 1) * length),
            bits, shift, leading, copies);
      for (int64_t d = 0; d < size; ++d) {
        uint32_t sum = 0;
        for (int c = 0; c < kCopies; ++c) sum += copies[c * (size + 1) + d];
        partial[task * size + d] = sum;
      }
    }
  });
  for (int64_t d = 0; d < size; ++d) {
    int64_t sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += partial[task * size + d];
    counts[d] = sum;
  }
}

}  // namespace lrk
