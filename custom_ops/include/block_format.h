// The formats of QuantizeBlock, for the kernels of every provider; defs/quantize_block.py states
// the meaning.
#pragma once

#include <cstdint>

namespace onnxq {

enum class BlockScale : int32_t { kFloat = 0, kE8M0 = 1, kE8M0Ceil = 2, kE4M3 = 3 };

// Elements are floats of `mantissa` bits from 2^min_exponent on, subnormal below, from `lowest` to
// `largest`.
struct BlockFormat {
  int32_t mantissa;
  int32_t min_exponent;
  float lowest;
  float largest;
  BlockScale scale;
  float factor;  // of E4M3 scales; 0: taken from each row
  float clip;    // share of a block's largest magnitude that float scales reach
};

}  // namespace onnxq
