// Activations brought into the form that the products take: columns in another order, INT8 as
// 16-bit floats.
#pragma once

#include "numbers.h"

namespace onnxq::cuda {

inline constexpr int kRearrangeThreads = 256;

struct GatherArgs {
  const void* x;         // [M, K] of 2 or 4 bytes
  const int32_t* order;  // [K] columns of x; zeros stand for those that are not in 0 to K - 1
  void* y;               // [M, K]
  int64_t count;         // M · K
  int k;
};

// y[m, k] = x[m, order[k]]. Grid: x pieces of kRearrangeThreads.
template <class Bits, class Block>
ONNXQ_DEVICE void GatherBody(Block& block, const GatherArgs& a) {
  block.EachThread([&](int thread) {
    const int64_t i = int64_t{block.X()} * kRearrangeThreads + thread;
    if (i >= a.count) return;
    const int32_t column = block.Load(a.order + i % a.k);
    Bits value{};
    if (column >= 0 && column < a.k) {
      value = block.Load(static_cast<const Bits*>(a.x) + i / a.k * a.k + column);
    }
    block.Store(static_cast<Bits*>(a.y) + i, value);
  });
}

struct WidenArgs {
  const int8_t* q;  // [count]
  uint16_t* y;      // [count] the same numbers in float16
  int64_t count;
};

// Four elements a thread. Grid: x pieces of 4 kRearrangeThreads.
template <class Block>
ONNXQ_DEVICE void WidenBody(Block& block, const WidenArgs& a) {
  block.EachThread([&](int thread) {
    const int64_t first = 4 * (int64_t{block.X()} * kRearrangeThreads + thread);
    if (first + 4 > a.count) {
      for (int64_t i = first; i < a.count; ++i) {
        block.Store(a.y + i, Half::From(static_cast<float>(block.Load(a.q + i))));
      }
      return;
    }
    const uint32_t four = block.Load(reinterpret_cast<const uint32_t*>(a.q + first));
    Words<2> wide{};
    ONNXQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto number = static_cast<int8_t>(four >> (8 * i));
      wide.w[i / 2] |= static_cast<uint32_t>(Half::From(static_cast<float>(number))) << i % 2 * 16;
    }
    block.Store(reinterpret_cast<Words<2>*>(a.y + first), wide);
  });
}

}  // namespace onnxq::cuda
