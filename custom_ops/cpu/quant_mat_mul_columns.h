// The product of a few columns of activations, added in float: outliers beside INT8 activations.
//
// Everything here is in an unnamed namespace: see quant_mat_mul_driver.h.
#pragma once

#include "quant_mat_mul_driver.h"

namespace onnxq {
namespace {

// The weights of one panel at the chosen k: [count, kPanel] floats.
template <class V>
void GatherRows(const QuantWeights& w, int64_t panel, const int64_t* columns, int64_t count,
                float* out) {
  alignas(64) float step[4 * kPanel];
  for (int64_t i = 0; i < count; ++i, out += kPanel) {
    const int64_t at = columns[i] / 4;
    const Piece piece = {1, at / w.group_steps, false, false};
    V::UnpackFloats(w, panel, at, piece, step, kPanel);
    std::memcpy(out, step + columns[i] % 4 * kPanel, kPanel * sizeof(float));
  }
}

template <class V>
void AddColumns(const ColumnProduct& p, int64_t first, int64_t last) {
  constexpr int64_t kChunk = 64;  // 8 KiB of weights, which stay in the nearest cache
  alignas(64) float weights[kChunk * kPanel];
  alignas(64) float sums[kPanel];
  const QuantWeights& w = *p.weights;
  for (int64_t panel = first; panel < last; ++panel) {
    const auto width = static_cast<size_t>(std::min(kPanel, w.n - panel * kPanel)) * sizeof(float);
    for (int64_t begin = 0; begin < p.count; begin += kChunk) {
      const int64_t count = std::min(kChunk, p.count - begin);
      GatherRows<V>(w, panel, p.columns + begin, count, weights);
      for (int64_t m = 0; m < p.m; ++m) {
        float* y = p.y + m * w.n + panel * kPanel;
        const float* x = p.x + m * p.count + begin;
        std::memcpy(sums, y, width);
        for (int64_t i = 0; i < count; ++i) {
          // Compiled to vector instructions: each column is on its own.
          for (int64_t c = 0; c < kPanel; ++c) {
            sums[c] = __builtin_fmaf(x[i], weights[i * kPanel + c], sums[c]);
          }
        }
        std::memcpy(y, sums, width);
      }
    }
  }
}

}  // namespace
}  // namespace onnxq
