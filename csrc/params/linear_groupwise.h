// Arguments of linear with a weight of 4- or 8-bit codes in groups along K, each with a scale.
#pragma once
#include "params/linear.h"

namespace fastnn {

// How a row of K weights is cut. Groups of `group` share a scale; a block is a group, or an equal
// part of one that is longer than kMostBlock, so that sums of a block stay exact in float32. Blocks
// are padded to whole rows of codes: 64 bytes that hold 8 (4 bits) or 4 (8 bits) of K for each of
// 16 outputs.
struct GroupLayout {
  static constexpr int64_t kMostBlock = 256;
  int64_t K, group, groups;
  int64_t parts;   // blocks of a whole group
  int64_t block;   // of K, in a block that is not the last of its group
  int64_t blocks;  // of all of K
  int64_t rows;    // of codes, in a block
  int bits;        // 4 or 8
  bool offsets;    // w = scale code + offset; without, w = scale (code - 8) or scale (code - 128)

  GroupLayout(int64_t features, int64_t group_size, int code_bits, bool has_offsets)
      : K(features),
        group(features > 0 && group_size > features ? features : group_size),
        groups((K + group - 1) / group),
        parts((group + kMostBlock - 1) / kMostBlock),
        block((group + parts - 1) / parts),
        blocks(K / group * parts + (K % group + block - 1) / block),
        rows((block * code_bits + 31) / 32),
        bits(code_bits),
        offsets(has_offsets) {}
  int64_t per_row() const { return 32 / bits; }  // of K, in a row of codes
  int64_t group_of(int64_t b) const { return b / parts; }
  int64_t first(int64_t b) const { return group_of(b) * group + b % parts * block; }
  int64_t size(int64_t b) const {
    const int64_t end = (group_of(b) + 1) * group < K ? (group_of(b) + 1) * group : K;
    return block < end - first(b) ? block : end - first(b);
  }

  // A strip of 16 outputs: for each two blocks a line with their scales (float16) and then their
  // codes; with offsets a line for each block, its scales and its offsets.
  static constexpr int64_t kLine = 64;
  int64_t strip_bytes() const {
    return (offsets ? blocks : (blocks + 1) / 2) * kLine + blocks * rows * kLine;
  }
  int64_t scales_at(int64_t b) const {
    return offsets ? b * (1 + rows) * kLine : b / 2 * (1 + 2 * rows) * kLine + b % 2 * (kLine / 2);
  }
  int64_t codes_at(int64_t b) const {
    return offsets ? (b * (1 + rows) + 1) * kLine
                   : (b / 2 * (1 + 2 * rows) + 1 + b % 2 * rows) * kLine;
  }
};

// What goes with the codes of one row of activations in one block. Activations are whole numbers
// times `scale`, and those numbers are written with 1 to 3 digits, each in [-128, 127].
struct BlockOfRow {
  int32_t correction[3];  // of each digit: -8 or -128 times the sum of the digits
  float scale;
  float sum;  // of the activations
};

// Of the weight as it is kept: N x K codes, as signed bytes or two to a byte, the even one low;
// scale and offset N x groups of float16.
struct GroupwiseWeight {
  const uint8_t* codes;
  int64_t row_stride;  // bytes
  const void* scale;
  const void* offset;  // or null
};

struct LinearGroupwiseParams {
  int64_t M, N, K;
  Matrix x;  // M x K
  int64_t group;
  int bits;
  bool offsets;
  bool int8_input;     // each row of x rounded to 8 bits
  const void* packed;  // the weight (cpu/linear_groupwise.h)
  const void* bias;    // N elements, or null
  int64_t bias_stride;
  DType bias_dtype;
  Activation activation;
  void* y;
};

}  // namespace fastnn
