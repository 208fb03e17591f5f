// The loops of Hadamard, which compilers turn into vectors by themselves. Everything is `static`:
// each instruction set has its own copy (see per_token_scalar.h).
#pragma once

#include "hadamard.h"
#include "per_token_scalar.h"
#include "quant_mat_mul_numbers.h"

namespace onnxq {

[[maybe_unused]] static void Scale(float* x, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) x[i] *= scale;
}

// Each group of c neighbours times the core. The products are exact, the sums are in order.
[[maybe_unused]] static void MultiplyCore(float* x, int64_t block, const float* core, int64_t c) {
  if (c == 1) return Scale(x, block, core[0]);
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

// The same with vectors across the columns of the core, four groups at a time, so that sums need
// not wait for each other. V: `lanes`, Fill, Load(from, count) of up to `lanes` floats, Store,
// MultiplyAdd.
template <class V, int groups>
static void MultiplyCoreOf(float* x, const float* core, int64_t c) {
  float sums[groups][kMaxCore];
  for (int64_t j = 0; j < c; j += V::lanes) {
    const int64_t count = c - j < V::lanes ? c - j : V::lanes;
    typename V::Vector acc[groups];
    for (auto& sum : acc) sum = V::Fill(-0.0F);  // with +0 a sum of -0 would be +0
    for (int64_t i = 0; i < c; ++i) {
      const auto row = V::Load(core + i * c + j, count);
      for (int g = 0; g < groups; ++g) acc[g] = V::MultiplyAdd(x[g * c + i], row, acc[g]);
    }
    for (int g = 0; g < groups; ++g) V::Store(sums[g] + j, count, acc[g]);
  }
  for (int g = 0; g < groups; ++g) {
    std::memcpy(x + g * c, sums[g], static_cast<size_t>(c) * sizeof(float));
  }
}

template <class V>
static void MultiplyCoreBy(float* x, int64_t block, const float* core, int64_t c) {
  if (c == 1) return Scale(x, block, core[0]);
  float* const end = x + block;
  for (; x + 4 * c <= end; x += 4 * c) MultiplyCoreOf<V, 4>(x, core, c);
  for (; x < end; x += c) MultiplyCoreOf<V, 1>(x, core, c);
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

}  // namespace onnxq
