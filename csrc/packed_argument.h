// A packed weight as torch ops get it: its tensors, and numbers that say what they are. Checked, so
// that no kernel reads past one of them. For the registration files (register_*.cpp) alone.
#pragma once

#include "arguments.h"
#include "cpu/packed.h"

namespace lrk {

// `parts`: codes (uint8, int8 or float8, any shape), scales, and where they are there the 16 values
// of a nibble and, of a double quantisation, the scales' map and scales.
// `layout`: codes, scales, dtype of the values, N, K, run, block_rows, block_cols and the nested
// block, as struct Packed has them.
class PackedArgument {
 public:
  PackedArgument(const char* op, const std::vector<Tensor>& parts,
                 const std::vector<int64_t>& layout, double offset) {
    STD_TORCH_CHECK(layout.size() == 9 && parts.size() >= 2, op,
                    ": expected a packed weight of 2 or more tensors and 9 numbers, got ",
                    parts.size(), " and ", layout.size());
    rows_ = layout[3];
    const int64_t k = layout[4], run = layout[5], nested = layout[8];
    weight_.codes = static_cast<Codes>(layout[0]);
    weight_.scales = static_cast<Scales>(layout[1]);
    weight_.value = static_cast<Dtype>(layout[2]);
    weight_.offset = static_cast<float>(offset);
    weight_.cols = k;
    weight_.run = run;
    weight_.block_rows = layout[6];
    weight_.block_cols = layout[7];
    STD_TORCH_CHECK(rows_ >= 0 && k >= 0 && layout[0] >= 0 && layout[0] <= 3 && layout[1] >= 0 &&
                        layout[1] <= 3 && layout[2] >= 0 && layout[2] <= 2 &&
                        (run > 0 || (run == 0 && layout[6] > 0 && layout[7] > 0)),
                    op, ": expected numbers of a packed weight, got others");
    const int64_t size = rows_ * k;
    weight_.grid = run ? 0 : ceil_div(k, layout[7]);
    const int64_t blocks = run ? ceil_div(size, run) : ceil_div(rows_, layout[6]) * weight_.grid;
    const bool nibbles = layout[0] <= static_cast<int64_t>(Codes::kLowNibbleFirst);
    weight_.data = static_cast<const uint8_t*>(
        bytes(op, "the codes of weight", parts[0], nibbles ? ceil_div(size, 2) : size));
    weight_.scale =
        weight_.scales == Scales::kFloat32
            ? values<float>(op, "the scales of weight", parts[1], ScalarType::Float, blocks)
            : bytes(op, "the scales of weight", parts[1], blocks);
    weight_.book = nullptr;
    if (nibbles) {
      STD_TORCH_CHECK(parts.size() >= 3, op, ": expected the 16 values of a code of weight");
      weight_.book =
          values<float>(op, "the values of weight's codes", parts[2], ScalarType::Float, 16);
    }
    weight_.nested = weight_.map = nullptr;
    if (weight_.scales == Scales::kNested) {
      STD_TORCH_CHECK(parts.size() >= 5 && nested > 0 && (nested & (nested - 1)) == 0, op,
                      ": expected the map and the scales of weight's scales, in blocks of a power "
                      "of two, got blocks of ",
                      nested);
      weight_.nested_shift = 0;
      while ((int64_t{1} << weight_.nested_shift) < nested) ++weight_.nested_shift;
      weight_.map =
          values<float>(op, "the map of weight's scales", parts[3], ScalarType::Float, 256);
      weight_.nested = values<float>(op, "the scales of weight's scales", parts[4],
                                     ScalarType::Float, ceil_div(blocks, nested));
    }
  }

  // Valid as long as this is.
  Matrix matrix() const {
    return {const_cast<Packed*>(&weight_), Dtype::kPacked, rows_, weight_.cols, weight_.cols};
  }
  ScalarType value_type() const {
    return weight_.value == Dtype::kFloat32    ? ScalarType::Float
           : weight_.value == Dtype::kBFloat16 ? ScalarType::BFloat16
                                               : ScalarType::Half;
  }

 private:
  static const void* bytes(const char* op, const char* name, const Tensor& t, int64_t least) {
    STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.element_size() == 1 && t.numel() >= least,
                    op, ": expected ", name, " to be contiguous, on the CPU, of one byte an ",
                    "element and of ", least, " or more elements, got shape ", shape_of(t));
    return t.const_data_ptr();
  }

  Packed weight_{};
  int64_t rows_ = 0;
};

}  // namespace lrk
