// The loops of Hadamard, which compilers turn into vectors by themselves. Everything is `static`:
// each instruction set has its own copy (see per_token_scalar.h).
#pragma once

#include "hadamard.h"
#include "per_token_scalar.h"
#include "quant_mat_mul_numbers.h"

namespace onnxq {

// Each group of c neighbours times the core. The products are exact, the sums are in order.
[[maybe_unused]] static void MultiplyCore(float* x, int64_t block, const float* core, int64_t c) {
  float sums[kMaxCore];
  for (float* const end = x + block; x < end; x += c) {
    for (int64_t j = 0; j < c; ++j) sums[j] = x[0] * core[j];
    for (int64_t i = 1; i < c; ++i) {
      const float factor = x[i];
      for (int64_t j = 0; j < c; ++j) sums[j] += factor * core[i * c + j];
    }
    std::memcpy(x, sums, static_cast<size_t>(c) * sizeof(float));
  }
}

// (a + b, a - b) of all pairs `stride` apart.
[[maybe_unused]] static void Butterflies(float* x, int64_t block, int64_t stride) {
  for (int64_t first = 0; first < block; first += 2 * stride) {
    float* __restrict a = x + first;
    float* __restrict b = x + first + stride;
    for (int64_t i = 0; i < stride; ++i) {
      const float sum = a[i] + b[i];
      b[i] = a[i] - b[i];
      a[i] = sum;
    }
  }
}

[[maybe_unused]] static void Scale(float* x, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) x[i] *= scale;
}

}  // namespace onnxq
