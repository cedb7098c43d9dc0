// A coded weight as torch ops get it: its tensors, and numbers that say what they are. Checked, so
// that no kernel reads past one of them. For the registration files (register_*.cpp) alone.
#pragma once

#include "arguments.h"
#include "cpu/coded.h"

namespace lrk {

// `parts`: codes and scales (records: all in one), then those of these that are there, in order:
// the 16 values of a nibble; the map and the scales of a double quantisation's scales; zero points
// (uint8); the block of each column (int32).
// `layout`: codes, scales, dtype of the values, N, K, run, block_rows, block_cols, the nested
// block, and whether there are zero points and blocks of columns, as struct Coded has them.
class CodedArgument {
 public:
  CodedArgument(const char* op, const std::vector<Tensor>& parts,
                const std::vector<int64_t>& layout, double offset)
      : op_(op), parts_(parts) {
    STD_TORCH_CHECK(layout.size() == 11, op, ": expected 11 numbers of a coded weight, got ",
                    layout.size());
    const int64_t n = layout[3], k = layout[4], run = layout[5], nested = layout[8];
    const int64_t block_rows = layout[6], block_cols = layout[7];
    weight_.codes = static_cast<Codes>(layout[0]);
    weight_.scales = static_cast<Scales>(layout[1]);
    weight_.value = static_cast<Dtype>(layout[2]);
    weight_.offset = static_cast<float>(offset);
    weight_.rows = n;
    weight_.cols = k;
    weight_.run = run;
    weight_.block_rows = block_rows;
    weight_.block_cols = block_cols;
    const bool words = in_words(weight_.codes), records = in_records(weight_.codes);
    const bool nibbles = layout[0] <= static_cast<int64_t>(Codes::kLowNibbleFirst);
    STD_TORCH_CHECK(
        n >= 0 && k >= 0 && layout[0] >= 0 && layout[0] <= 7 && layout[1] >= 0 && layout[1] <= 3 &&
            layout[2] >= 0 && layout[2] <= 2 &&
            (run > 0 || (run == 0 && block_rows > 0 && block_cols > 0)) &&
            (!words || (run == 0 && block_rows == 1 && n % 8 == 0 && k % 8 == 0 && layout[1] == 0 &&
                        layout[9] != 0)) &&
            (!records || (run == 32 && k % (weight_.codes == Codes::kQ8_0 ? 32 : 256) == 0)) &&
            (layout[10] == 0 || (run == 0 && block_rows == 1)),
        op, ": expected numbers of a coded weight, got others");
    const int64_t size = n * k;
    weight_.grid = run ? 0 : ceil_div(k, block_cols);
    int64_t blocks = run ? ceil_div(size, run) : ceil_div(n, block_rows) * weight_.grid;
    if (records) {
      const int64_t bytes_needed =
          weight_.codes == Codes::kQ8_0 ? size / 32 * 34 : size / 256 * 144;
      weight_.data = bytes("the records of weight", 1, bytes_needed);
      return;
    }
    weight_.data = bytes("the codes of weight", words ? 4 : 1,
                         words ? size / 8 : (nibbles ? ceil_div(size, 2) : size));
    weight_.scale = weight_.scales == Scales::kFloat32
                        ? static_cast<const void*>(
                              next<float>("the scales of weight", ScalarType::Float, blocks))
                        : bytes("the scales of weight", 1, blocks);
    if (nibbles) weight_.book = next<float>("the values of weight's codes", ScalarType::Float, 16);
    if (weight_.scales == Scales::kNested) {
      STD_TORCH_CHECK(nested > 0 && (nested & (nested - 1)) == 0, op,
                      ": expected scales of weight's scales in blocks of a power of two, got "
                      "blocks of ",
                      nested);
      while ((int64_t{1} << weight_.nested_shift) < nested) ++weight_.nested_shift;
      weight_.map = next<float>("the map of weight's scales", ScalarType::Float, 256);
      weight_.nested =
          next<float>("the scales of weight's scales", ScalarType::Float, ceil_div(blocks, nested));
    }
    if (layout[9]) weight_.zeros = bytes("the zero points of weight", 1, blocks);
    if (layout[10]) {
      weight_.groups = next<int32_t>("the groups of weight's columns", ScalarType::Int, k);
      for (int64_t i = 0; i < k; ++i) {
        STD_TORCH_CHECK(weight_.groups[i] >= 0 && weight_.groups[i] < weight_.grid, op,
                        ": expected groups of weight's columns from 0 to ", weight_.grid - 1,
                        ", got ", weight_.groups[i]);
      }
    }
  }

  // Valid as long as this is.
  Matrix matrix() const {
    return {const_cast<Coded*>(&weight_), Dtype::kCoded, weight_.rows, weight_.cols, weight_.cols};
  }
  ScalarType value_type() const {
    return weight_.value == Dtype::kFloat32    ? ScalarType::Float
           : weight_.value == Dtype::kBFloat16 ? ScalarType::BFloat16
                                               : ScalarType::Half;
  }

 private:
  const Tensor& next(const char* name) {
    STD_TORCH_CHECK(next_ < parts_.size(), op_, ": expected ", name, ", got ", parts_.size(),
                    " tensors of a coded weight");
    return parts_[next_++];
  }
  template <typename T>
  const T* next(const char* name, ScalarType type, int64_t least) {
    return values<T>(op_, name, next(name), type, least);
  }
  const uint8_t* bytes(const char* name, int64_t item, int64_t least) {
    const Tensor& t = next(name);
    STD_TORCH_CHECK(
        t.is_cpu() && t.is_contiguous() && t.element_size() == item && t.numel() >= least, op_,
        ": expected ", name, " to be contiguous, on the CPU, of ", item,
        " bytes an element and of ", least, " or more elements, got shape ", shape_of(t));
    return static_cast<const uint8_t*>(t.const_data_ptr());
  }

  const char* op_;
  const std::vector<Tensor>& parts_;
  size_t next_ = 0;
  Coded weight_{};
};

}  // namespace lrk
