// QuantizeBlock: rounds activations to low-precision formats with a scale a block, and gives the
// rounded numbers; defs/quantize_block.py states the meaning. The same bits as on the CPU.
#pragma once

#include "block_format.h"
#include "per_token.h"

namespace onnxq::cuda {

struct QuantizeBlockArgs {
  const void* x;         // [rows, K] T
  void* y;               // [rows, K] T
  const float* factors;  // [rows], of E4M3 scales, or null where `factor` holds for all
  int64_t rows;
  int k;
  int block;  // 1 to K; the last of a row may be shorter
  BlockFormat format;
};

inline constexpr int kBlockWarps = 8;
inline constexpr int kBlockThreads = kBlockWarps * kWarp;
inline constexpr float kE4M3Max = 448.0F;

ONNXQ_HD float ScaleOfBlock(float amax, const BlockFormat& f, float factor) {
  if (f.scale == BlockScale::kFloat) {
    const float scale = amax * f.clip / f.largest;
    return scale > kFloatMin ? scale : kFloatMin;
  }
  if (f.scale == BlockScale::kE4M3) {
    return RoundMagnitude(amax / f.largest / factor, 3, -6, kE4M3Max) * factor;
  }
  const float least = amax > 0x1p-149F ? amax : 0x1p-149F;
  int exponent = FloorLog2(least) - FloorLog2(f.largest);
  if (f.scale == BlockScale::kE8M0Ceil && least > ldexpf(f.largest, exponent)) ++exponent;
  return PowerOfTwo(exponent < -127 ? -127 : exponent > 127 ? 127 : exponent);
}

// An element of a block whose largest magnitude has these bits; infinities and NaN lie above all.
ONNXQ_HD float RoundInBlock(float x, uint32_t most, float scale, const BlockFormat& f) {
  if (most >= 0x7f800000U) return FloatFromBits(0x7fc00000U);
  if (!(scale > 0)) return 0.0F;
  const float limit = x < 0 ? -f.lowest : f.largest;
  const float rounded = RoundMagnitude(fabsf(x) / scale, f.mantissa, f.min_exponent, limit);
  return ((x < 0 ? -rounded : rounded) + 0.0F) * scale;  // no -0
}

// The factor of a row's E4M3 scales, from the largest magnitude among its finite blocks.
ONNXQ_HD float FactorOfRow(uint32_t most, float largest) {
  const float factor = FloatFromBits(most) / (largest * kE4M3Max);
  return factor > kFloatMin ? factor : kFloatMin;
}

ONNXQ_HD int BlocksOfRow(const QuantizeBlockArgs& a) { return (a.k + a.block - 1) / a.block; }

// Lanes that share a block when each takes 16 bytes of it, a power of two; 0 when they cannot.
template <class T>
ONNXQ_HD int BlockLanes(const QuantizeBlockArgs& a) {
  const int lanes = a.block / kVector<T>;
  const bool fits = a.block % kVector<T> == 0 && a.k % a.block == 0 && lanes <= kWarp;
  return fits && (lanes & (lanes - 1)) == 0 ? lanes : 0;
}

template <class Block>
ONNXQ_DEVICE float FactorOf(const Block& block, const QuantizeBlockArgs& a, int64_t row) {
  return a.factors == nullptr ? a.format.factor : block.Load(a.factors + row);
}

struct BlockVectorState {
  Words<4> words;
  uint32_t max_bits;
};

// Blocks of BlockLanes lanes. Grid: x pieces of kBlockThreads 16-byte words of [rows, K].
template <class T, class Block>
ONNXQ_DEVICE void BlockVectorsBody(Block& block, const QuantizeBlockArgs& a) {
  using Bits = typename T::Bits;
  typename Block::template PerThread<BlockVectorState> states(block);
  const int64_t words = a.rows * a.k / kVector<T>;
  const auto place = [&](int thread) { return int64_t{block.X()} * kBlockThreads + thread; };
  block.EachWarp([&](const auto& warp) {
    warp.Each([&](int, int thread) {
      BlockVectorState& s = states[thread];
      s.max_bits = 0;
      if (place(thread) >= words) return;
      s.words = block.Load(static_cast<const Words<4>*>(a.x) + place(thread));
      ONNXQ_UNROLL
      for (int i = 0; i < kVector<T>; ++i) SeeMagnitude(ElementOf<T>(s.words, i), &s.max_bits);
    });
    warp.Max([&](int thread) { return &states[thread].max_bits; }, BlockLanes<T>(a));
    warp.Each([&](int, int thread) {
      if (place(thread) >= words) return;
      const BlockVectorState& s = states[thread];
      const float factor = FactorOf(block, a, place(thread) * kVector<T> / a.k);
      const float scale = ScaleOfBlock(FloatFromBits(s.max_bits), a.format, factor);
      struct alignas(16) Elements {
        Bits e[kVector<T>];
      } rounded;
      ONNXQ_UNROLL
      for (int i = 0; i < kVector<T>; ++i) {
        rounded.e[i] = T::From(RoundInBlock(ElementOf<T>(s.words, i), s.max_bits, scale, a.format));
      }
      block.Store(static_cast<Elements*>(a.y) + place(thread), rounded);
    });
  });
}

// Blocks of any size: a warp takes one. Grid: x groups of kBlockWarps blocks.
template <class T, class Block>
ONNXQ_DEVICE void BlockWarpsBody(Block& block, const QuantizeBlockArgs& a) {
  using Bits = typename T::Bits;
  typename Block::template PerThread<RowState> states(block);
  const int blocks = BlocksOfRow(a);
  block.EachWarp([&](const auto& warp) {
    const int64_t unit = int64_t{block.X()} * kBlockWarps + warp.Index();
    if (unit >= a.rows * blocks) return;
    const int64_t row = unit / blocks;
    const int first = static_cast<int>(unit % blocks) * a.block;
    const int end = first + a.block < a.k ? first + a.block : a.k;
    const Bits* const x = static_cast<const Bits*>(a.x) + row * a.k;
    Bits* const y = static_cast<Bits*>(a.y) + row * a.k;
    warp.Each([&](int lane, int thread) {
      uint32_t most = 0;
      for (int i = first + lane; i < end; i += kWarp) SeeMagnitude(T::To(block.Load(x + i)), &most);
      states[thread].max_bits = most;
    });
    warp.Max([&](int thread) { return &states[thread].max_bits; });
    warp.Each([&](int lane, int thread) {
      const uint32_t most = states[thread].max_bits;
      const float scale = ScaleOfBlock(FloatFromBits(most), a.format, FactorOf(block, a, row));
      for (int i = first + lane; i < end; i += kWarp) {
        block.Store(y + i, T::From(RoundInBlock(T::To(block.Load(x + i)), most, scale, a.format)));
      }
    });
  });
}

struct RowFactorState {
  uint32_t max_bits;
  uint32_t most;
};

// factors [rows] of E4M3 scales. Grid: x rows. Shared memory: kRowSharedBytes.
template <class T, class Block>
ONNXQ_DEVICE void RowFactorBody(Block& block, const QuantizeBlockArgs& a, float* factors) {
  using Bits = typename T::Bits;
  typename Block::template PerThread<RowFactorState> states(block);
  const typename Block::Shared shared(block, kRowSharedBytes);
  const Bits* const x = static_cast<const Bits*>(a.x) + int64_t{block.X()} * a.k;
  block.EachWarp([&](const auto& warp) {
    warp.Each([&](int, int thread) { states[thread].most = 0; });
    for (int first = warp.Index() * a.block; first < a.k; first += kRowThreads / kWarp * a.block) {
      const int end = first + a.block < a.k ? first + a.block : a.k;
      warp.Each([&](int lane, int thread) {
        uint32_t most = 0;
        for (int i = first + lane; i < end; i += kWarp) {
          SeeMagnitude(T::To(block.Load(x + i)), &most);
        }
        states[thread].max_bits = most;
      });
      warp.Max([&](int thread) { return &states[thread].max_bits; });
      warp.Each([&](int, int thread) {
        RowFactorState& s = states[thread];
        if (s.max_bits < 0x7f800000U && s.max_bits > s.most) s.most = s.max_bits;
      });
    }
    warp.Each([&](int, int thread) { states[thread].max_bits = states[thread].most; });
  });
  MaxOfBlock(block, states, shared, 0);
  block.EachThread([&](int thread) {
    if (thread == 0) {
      block.Store(factors + block.X(), FactorOfRow(states[thread].max_bits, a.format.largest));
    }
  });
}

}  // namespace onnxq::cuda
