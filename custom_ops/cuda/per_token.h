// DynamicQuantizePerToken: a block takes a row; the second pass finds it in the cache.
//
// The same bits as on the CPU. `q` holds int8, or the same integers as floats, which is what
// QuantMatMul multiplies.
#pragma once

#include "numbers.h"

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

struct Int8Out {
  using Bits = int8_t;
  ONNXQ_HD static Bits From(float value) { return static_cast<int8_t>(value); }
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
    const RowScale r = ScaleOfRow(states[thread].max_bits);
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
          elements.e[j] = Out::From(RoundElement(kept(i + j, ElementOf<T>(words, j)), r.factor));
        }
        block.Store(reinterpret_cast<Elements*>(q + i), elements);
      }
    } else {
      for (int i = thread; i < a.k; i += kRowThreads) {
        block.Store(q + i, Out::From(RoundElement(kept(i, T::To(block.Load(x + i))), r.factor)));
      }
    }
  });
}

}  // namespace onnxq::cuda
