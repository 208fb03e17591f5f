// Rows of activations in INT8 (DynamicQuantizePerToken) or FP8 E4M3: a block takes a row; the
// second pass finds it in the cache.
//
// The same bits as on the CPU. `q` holds codes, or the same numbers as floats, which is what
// QuantMatMul multiplies.
#pragma once

#include "rounding.h"

namespace onnxq::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowSharedBytes = 4 * kRowThreads / kWarp;

struct PerTokenArgs {
  const void* x;           // [rows, K] T
  void* q;                 // [rows, K] int8, or integers in Out
  float* scale;            // [rows]
  const uint8_t* outlier;  // [K] 1 where a column counts as zeros, or null
  int k;
};

// A row's scale and the factor of its elements, from the greatest magnitude in it as bits, where
// infinity and NaN lie above all numbers.
struct RowScale {
  float scale;
  float factor;
};
ONNXQ_HD RowScale ScaleOfRow(uint32_t max_bits) {
  if (max_bits >= 0x7f800000U) return {FloatFromBits(0x7fc00000U), 0.0F};
  const float max = FloatFromBits(max_bits);
  const float floor = 127.0F * 0x1p-126F;
  const float amax = max > floor ? max : floor;
  return {amax / 127.0F, 127.0F / amax};
}
// Of a row without a scale the integers are 0, whatever is in it.
ONNXQ_HD float RoundElement(float x, float factor) {
  return factor == 0.0F ? 0.0F : rintf(x * factor);
}

// Elements of a row as they lie in a 16-byte word, when rows begin at multiples of 16 bytes.
template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(typename T::Bits));

template <class T>
ONNXQ_HD float ElementOf(const Words<4>& words, int i) {
  if constexpr (sizeof(typename T::Bits) == 4) {
    return FloatFromBits(words.w[i]);
  } else {
    return T::To(static_cast<uint16_t>(words.w[i / 2] >> (i % 2 * 16)));
  }
}

ONNXQ_HD void SeeMagnitude(float value, uint32_t* most) {
  const uint32_t bits = BitsOfFloat(value) & 0x7fffffffU;
  *most = bits > *most ? bits : *most;
}

// What rows become: how an element is stored, the scale of a row, an element from its number.
struct Int8Out {
  using Bits = int8_t;
  ONNXQ_HD static RowScale ScaleOf(uint32_t max_bits) { return ScaleOfRow(max_bits); }
  ONNXQ_HD static Bits Quantize(float x, const RowScale& r) {
    return static_cast<int8_t>(RoundElement(x, r.factor));
  }
};

// The same integers in the type of activations.
template <class T>
struct IntegersOut {
  using Bits = typename T::Bits;
  ONNXQ_HD static RowScale ScaleOf(uint32_t max_bits) { return ScaleOfRow(max_bits); }
  ONNXQ_HD static Bits Quantize(float x, const RowScale& r) {
    return T::From(RoundElement(x, r.factor));
  }
};

// The numbers of E4M3, as QuantizeBlock rounds to them: the largest becomes 448.
inline constexpr float kFloat8Max = 448.0F;

ONNXQ_HD RowScale Float8ScaleOf(uint32_t max_bits) {
  if (max_bits >= 0x7f800000U) return {FloatFromBits(0x7fc00000U), 0.0F};
  const float scale = FloatFromBits(max_bits) / kFloat8Max;
  return {scale > kFloatMin ? scale : kFloatMin, 1.0F};
}
ONNXQ_HD float Float8Magnitude(float x, const RowScale& r) {
  return r.factor == 0.0F ? 0.0F : RoundMagnitude(fabsf(x) / r.scale, 3, -6, kFloat8Max);
}

struct Float8Out {
  using Bits = uint8_t;
  ONNXQ_HD static RowScale ScaleOf(uint32_t max_bits) { return Float8ScaleOf(max_bits); }
  ONNXQ_HD static Bits Quantize(float x, const RowScale& r) {
    const float magnitude = Float8Magnitude(x, r);
    const uint32_t sign = BitsOfFloat(x) >> 24 & 0x80U;
    // Below 2^-6 codes count steps of 2^-9, from there on they hold exponent and mantissa.
    const uint32_t code = magnitude < 0x1p-6F ? static_cast<uint32_t>(magnitude * 512.0F)
                                              : (BitsOfFloat(magnitude) >> 20) - (120U << 3);
    return static_cast<uint8_t>(sign | code);
  }
};

struct RowState {
  uint32_t max_bits;
};

// Every thread's max_bits becomes the greatest of the block's. Leaves `shared` in use.
template <class Block, class States, class Shared>
ONNXQ_DEVICE void MaxOfBlock(Block& block, States& states, const Shared& shared, int at) {
  block.EachWarp([&](const auto& warp) {
    warp.Max([&](int thread) { return &states[thread].max_bits; });
    warp.Each([&](int lane, int thread) {
      if (lane == 0) {
        shared.template Set<uint32_t>(thread, at + 4 * warp.Index(), states[thread].max_bits);
      }
    });
  });
  block.Sync();
  block.EachThread([&](int thread) {
    uint32_t most = 0;
    for (int warp = 0; warp < block.Threads() / kWarp; ++warp) {
      const auto bits = shared.template Get<uint32_t>(thread, at + 4 * warp);
      most = bits > most ? bits : most;
    }
    states[thread].max_bits = most;
  });
}

// Grid: x rows.
template <class T, class Out, class Block>
ONNXQ_DEVICE void PerTokenBody(Block& block, const PerTokenArgs& a) {
  typename Block::template PerThread<RowState> states(block);
  const typename Block::Shared shared(block, kRowSharedBytes);
  const int64_t row = block.X();
  const auto* const x = static_cast<const typename T::Bits*>(a.x) + row * a.k;
  auto* const q = static_cast<typename Out::Bits*>(a.q) + row * a.k;
  const bool whole = a.k % kVector<T> == 0;
  const auto kept = [&](int i, float value) {
    return a.outlier != nullptr && block.Load(a.outlier + i) != 0 ? 0.0F : value;
  };

  block.EachThread([&](int thread) {
    uint32_t most = 0;
    const auto see = [&](float value) { SeeMagnitude(value, &most); };
    if (whole) {
      for (int i = thread * kVector<T>; i < a.k; i += kRowThreads * kVector<T>) {
        const auto words = block.Load(reinterpret_cast<const Words<4>*>(x + i));
        ONNXQ_UNROLL
        for (int j = 0; j < kVector<T>; ++j) see(kept(i + j, ElementOf<T>(words, j)));
      }
    } else {
      for (int i = thread; i < a.k; i += kRowThreads) see(kept(i, T::To(block.Load(x + i))));
    }
    states[thread].max_bits = most;
  });
  MaxOfBlock(block, states, shared, 0);
  block.EachThread([&](int thread) {
    const RowScale r = Out::ScaleOf(states[thread].max_bits);
    if (thread == 0) block.Store(a.scale + row, r.scale);
    if (whole) {
      struct alignas(kVector<T> * sizeof(typename Out::Bits)) Elements {
        typename Out::Bits e[kVector<T>];
      };
      for (int i = thread * kVector<T>; i < a.k; i += kRowThreads * kVector<T>) {
        const auto words = block.Load(reinterpret_cast<const Words<4>*>(x + i));
        Elements elements;
        ONNXQ_UNROLL
        for (int j = 0; j < kVector<T>; ++j) {
          elements.e[j] = Out::Quantize(kept(i + j, ElementOf<T>(words, j)), r);
        }
        block.Store(reinterpret_cast<Elements*>(q + i), elements);
      }
    } else {
      for (int i = thread; i < a.k; i += kRowThreads) {
        block.Store(q + i, Out::Quantize(kept(i, T::To(block.Load(x + i))), r));
      }
    }
  });
}

}  // namespace onnxq::cuda
