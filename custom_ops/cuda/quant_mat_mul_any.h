// QuantMatMul for everything that the tensor cores' kernels do not take: float32 activations,
// levels that no 16-bit float holds, groups that are no multiple of 16, weights that are not
// constant. And the expansion of packed weights to a plain matrix, for products with many rows.
#pragma once

#include "quant_mat_mul.h"

namespace onnxq::cuda {

// The code of column c (of the panel) and k % 4 in a step's bytes: its planes, the widest first.
template <class Block>
ONNXQ_DEVICE int LoadCode(const Block& block, const uint8_t* step, int bits, int c, int k) {
  int code = 0;
  int low = 0;  // bits that are there, each 16 bytes of the step
  ONNXQ_UNROLL
  for (int width = 8; width > 0; width /= 2) {
    if ((bits & width) == 0) continue;
    const int columns = 4 * width;  // to a field
    const int byte = block.Load(step + 16 * low + 4 * (c % columns) + k);
    code |= (byte >> (c / columns * width) & ((1 << width) - 1)) << low;
    low += width;
  }
  return code;
}

// level - zero, times scale · factor, of column c of a panel at a group.
template <class Block>
ONNXQ_DEVICE float GroupScale(const Block& block, const QuantMatMulArgs& a, int64_t at) {
  return LoadScale(block, a.scale_type, a.scales, at) * a.factor;
}
template <class Block>
ONNXQ_DEVICE float GroupZero(const Block& block, const QuantMatMulArgs& a, int64_t at) {
  return a.zero_points == nullptr ? 0.0F : static_cast<float>(block.Load(a.zero_points + at));
}

inline constexpr int kAnyWarps = 8;
inline constexpr int kAnyRows = 4;
inline constexpr int kAnyThreads = kAnyWarps * kWarp;

struct AnyState {
  float total[kAnyRows];
};

// A lane takes a column of the panel, the warps share K and add up in their order.
// Grid: x panels, y groups of four rows. Shared memory: levels, then [warps][rows][32] sums.
ONNXQ_HD int AnySharedBytes(int bits) { return (4 << bits) + 4 * kAnyThreads * kAnyRows; }

template <class T, class Block>
ONNXQ_DEVICE void AnyBody(Block& block, const QuantMatMulArgs& a) {
  const int bits = a.bits;
  const int sums = 4 << bits;
  typename Block::template PerThread<AnyState> states(block);
  const typename Block::Shared shared(block, AnySharedBytes(bits));
  const int panel = block.X();
  const int first_row = block.Y() * kAnyRows;
  const int steps = Steps(a);
  const uint8_t* const codes = PanelCodes(a, panel);
  const auto* const x = static_cast<const typename T::Bits*>(a.x);

  block.EachThread([&](int thread) {
    for (int i = thread; i < 1 << bits; i += kAnyThreads) {
      shared.template Set<float>(thread, 4 * i, block.Load(a.levels + i));
    }
  });
  block.Sync();
  block.EachWarp([&](const auto& warp) {
    const int begin = static_cast<int>(int64_t{steps} * warp.Index() / kAnyWarps);
    const int end = static_cast<int>(int64_t{steps} * (warp.Index() + 1) / kAnyWarps);
    warp.Each([&](int lane, int thread) {
      AnyState& s = states[thread];
      for (float& total : s.total) total = 0;
      int group = -1;
      float scale = 0, zero = 0;
      for (int step = begin; step < end; ++step) {
        const int now = a.groups == 1 ? 0 : 4 * step / a.group;
        if (now != group) {
          group = now;
          const int64_t at = PanelGroups(a, panel) + int64_t{group} * kPanel + lane;
          scale = GroupScale(block, a, at);
          zero = GroupZero(block, a, at);
        }
        for (int i = 0; i < 4 && 4 * step + i < a.k; ++i) {
          const int code = LoadCode(block, codes + int64_t{step} * 16 * bits, bits, lane, i);
          const float weight = (shared.template Get<float>(thread, 4 * code) - zero) * scale;
          ONNXQ_UNROLL
          for (int r = 0; r < kAnyRows; ++r) {
            if (first_row + r >= a.m) break;
            const int64_t at = int64_t{first_row + r} * a.k + 4 * step + i;
            s.total[r] = fmaf(T::To(block.Load(x + at)), weight, s.total[r]);
          }
        }
      }
      ONNXQ_UNROLL
      for (int r = 0; r < kAnyRows; ++r) {
        shared.template Set<float>(
            thread, sums + 4 * ((warp.Index() * kAnyRows + r) * kPanel + lane), s.total[r]);
      }
    });
  });
  block.Sync();
  block.EachThread([&](int thread) {
    const int row = thread / kPanel;
    const int column = panel * kPanel + thread % kPanel;
    if (row >= kAnyRows || first_row + row >= a.m || column >= a.n) return;
    float total = 0;
    for (int warp = 0; warp < kAnyWarps; ++warp) {
      const int at = (warp * kAnyRows + row) * kPanel + thread % kPanel;
      total += shared.template Get<float>(thread, sums + 4 * at);
    }
    // The factor is in the weights already.
    Finish<T>(block, a, 1.0F, first_row + row, column, total);
  });
}

inline constexpr int kExpandThreads = 256;
inline constexpr int kExpandTiles = 4;  // of 16 k, a warp

// Pieces of K, the grid's y.
ONNXQ_HD int ExpandPieces(const QuantMatMulArgs& a) {
  return static_cast<int>(CeilDivide(Tiles(a), kExpandThreads / kWarp * kExpandTiles));
}

// W[n, k], rounded to T, into `out` [N, K]. Lane 4g + t writes the four k of step t of columns g,
// g + 8, g + 16 and g + 24, so that four lanes fill 32 consecutive bytes.
// Grid: x panels, y ExpandPieces. Shared memory: levels.
template <class T, class Block>
ONNXQ_DEVICE void ExpandBody(Block& block, const QuantMatMulArgs& a, uint16_t* out) {
  const int bits = a.bits;
  const typename Block::Shared shared(block, 4 << bits);
  const int panel = block.X();
  const uint8_t* const codes = PanelCodes(a, panel);
  block.EachThread([&](int thread) {
    for (int i = thread; i < 1 << bits; i += kExpandThreads) {
      shared.template Set<float>(thread, 4 * i, block.Load(a.levels + i));
    }
  });
  block.Sync();
  block.EachThread([&](int thread) {
    const int lane = thread % kWarp;
    const int first = (block.Y() * (kExpandThreads / kWarp) + thread / kWarp) * kExpandTiles;
    for (int i = 0; i < kExpandTiles; ++i) {
      const int step = 4 * (first + i) + lane % 4;
      if (4 * step >= a.k) return;
      const int group = a.groups == 1 ? 0 : 4 * step / a.group;
      for (int c = lane / 4; c < kPanel; c += 8) {
        const int64_t column = int64_t{panel} * kPanel + c;
        if (column >= a.n) break;
        const int64_t at = PanelGroups(a, panel) + int64_t{group} * kPanel + c;
        const float scale = GroupScale(block, a, at);
        const float zero = GroupZero(block, a, at);
        Words<2> four{};
        for (int k = 0; k < 4; ++k) {
          const int code = LoadCode(block, codes + int64_t{step} * 16 * bits, bits, c, k);
          const float weight = (shared.template Get<float>(thread, 4 * code) - zero) * scale;
          four.w[k / 2] |= static_cast<uint32_t>(T::From(weight)) << (k % 2 * 16);
        }
        uint16_t* const to = out + column * a.k + 4 * step;
        if (a.k % 4 == 0) {
          block.Store(reinterpret_cast<Words<2>*>(to), four);
          continue;
        }
        for (int k = 0; k < 4 && 4 * step + k < a.k; ++k) {
          block.Store(to + k, static_cast<uint16_t>(four.w[k / 2] >> (k % 2 * 16)));
        }
      }
    }
  });
}

}  // namespace onnxq::cuda
