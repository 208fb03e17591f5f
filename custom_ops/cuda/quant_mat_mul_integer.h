// QuantMatMul with INT8 activations and many rows: the product of integers runs on cuBLASLt, exact
// in int32; here is what stands before it and behind it.
#pragma once

#include "quant_mat_mul_any.h"

namespace onnxq::cuda {

// The weights as a plain matrix `out` [N, K] of their levels as int8, in the places of ExpandBody.
// K must be a multiple of 4. Grid: x panels, y ExpandPieces. Shared memory: a byte a code.
template <class Block>
ONNXQ_DEVICE void ExpandBytesBody(Block& block, const QuantMatMulArgs& a, uint8_t* out) {
  const int bits = a.bits;
  const typename Block::Shared shared(block, 1 << bits);
  const int panel = block.X();
  const uint8_t* const codes = PanelCodes(a, panel);
  block.EachThread([&](int thread) {
    for (int i = thread; i < 1 << bits; i += kExpandThreads) {
      const int byte = static_cast<int>(block.Load(a.levels + i));
      shared.template Set<uint8_t>(thread, i, static_cast<uint8_t>(byte));
    }
  });
  block.Sync();
  block.EachThread([&](int thread) {
    const int lane = thread % kWarp;
    const int first = (block.Y() * (kExpandThreads / kWarp) + thread / kWarp) * kExpandTiles;
    for (int i = 0; i < kExpandTiles; ++i) {
      const int step = 4 * (first + i) + lane % 4;
      if (4 * step >= a.k) return;
      for (int c = lane / 4; c < kPanel; c += 8) {
        const int64_t column = int64_t{panel} * kPanel + c;
        if (column >= a.n) break;
        uint32_t four = 0;
        for (int k = 0; k < 4; ++k) {
          const int code = LoadCode(block, codes + int64_t{step} * 16 * bits, bits, c, k);
          four |= static_cast<uint32_t>(shared.template Get<uint8_t>(thread, code)) << (8 * k);
        }
        block.Store(reinterpret_cast<uint32_t*>(out + column * a.k + 4 * step), four);
      }
    }
  });
}

// Scales sums of integers [M, N], of one group: the CPU's bits. Grid: x pieces of 256.
inline constexpr int kScaleThreads = 256;

template <class T, class Block>
ONNXQ_DEVICE void ScaleIntegersBody(Block& block, const QuantMatMulArgs& a,
                                    const int32_t* products) {
  block.EachThread([&](int thread) {
    const int64_t i = int64_t{block.X()} * kScaleThreads + thread;
    if (i >= int64_t{a.m} * a.n) return;
    const int row = static_cast<int>(i / a.n);
    const int column = static_cast<int>(i % a.n);
    const int64_t at = PanelGroups(a, column / kPanel) + column % kPanel;
    const float scale = LoadScale(block, a.scale_type, a.scales, at);
    const float total = static_cast<float>(block.Load(products + i)) * scale;
    Finish<T>(block, a, a.factor, row, column, total);
  });
}

}  // namespace onnxq::cuda
