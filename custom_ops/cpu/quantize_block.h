// The block kernels of QuantizeBlock, one set for each instruction set; defs/quantize_block.py
// states the meaning.
#pragma once

#include "block_format.h"
#include "isa.h"

namespace onnxq {

// Rounds one row x: [count] f32 in place, `block` at a time; the last block may be shorter.
using QuantizeRow = void (*)(float* x, int64_t count, int64_t block, const BlockFormat& format);

QuantizeRow QuantizeRowFor(Isa isa);

void QuantizeRowScalar(float* x, int64_t count, int64_t block, const BlockFormat& format);
#if defined(__x86_64__)
void QuantizeRowAvx2(float* x, int64_t count, int64_t block, const BlockFormat& format);
void QuantizeRowAvx512bw(float* x, int64_t count, int64_t block, const BlockFormat& format);
#endif

}  // namespace onnxq
