// The block kernels of QuantizeBlock, one set for each instruction set; defs/quantize_block.py
// states the meaning.
#pragma once

#include <cstdint>

#include "isa.h"

namespace onnxq {

enum class BlockScale : int { kFloat, kE8M0, kE8M0Ceil, kE4M3 };

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

// Rounds one row x: [count] f32 in place, `block` at a time; the last block may be shorter.
using QuantizeRow = void (*)(float* x, int64_t count, int64_t block, const BlockFormat& format);

QuantizeRow QuantizeRowFor(Isa isa);

void QuantizeRowScalar(float* x, int64_t count, int64_t block, const BlockFormat& format);
#if defined(__x86_64__)
void QuantizeRowAvx2(float* x, int64_t count, int64_t block, const BlockFormat& format);
void QuantizeRowAvx512bw(float* x, int64_t count, int64_t block, const BlockFormat& format);
#endif

}  // namespace onnxq
