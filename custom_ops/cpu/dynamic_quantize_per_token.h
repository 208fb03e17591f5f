// The row kernels of DynamicQuantizePerToken, one set for each instruction set.
//
// x: [rows, k] f32 or f16 bits, q: [rows, k] i8, scale: [rows] f32, x ~ scale * q.
// All sets give the same bits; defs/dynamic_quantize_per_token.py states the meaning.
#pragma once

#include <cstdint>

#include "isa.h"

namespace onnxq {

struct PerTokenRows {
  void (*float32)(const float* x, int64_t rows, int64_t k, int8_t* q, float* scale);
  void (*float16)(const uint16_t* x, int64_t rows, int64_t k, int8_t* q, float* scale);
};

const PerTokenRows* PerTokenRowsFor(Isa isa);

// Quantizes one row x: [k] by groups of columns, the last of which may be shorter:
// scale: [ceil(k / group)].
void QuantizeGroups(const PerTokenRows& rows, const float* x, int64_t k, int64_t group, int8_t* q,
                    float* scale);
void QuantizeGroups(const PerTokenRows& rows, const uint16_t* x, int64_t k, int64_t group,
                    int8_t* q, float* scale);

extern const PerTokenRows kPerTokenScalar;
#if defined(__x86_64__)
extern const PerTokenRows kPerTokenAvx2;
extern const PerTokenRows kPerTokenAvx512bw;
#endif

}  // namespace onnxq
