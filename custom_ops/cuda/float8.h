// Activations in FP8 E4M3 with a scale a group of columns, as cuBLASLt reads them.
#pragma once

#include "per_token.h"

namespace onnxq::cuda {

struct Float8GroupsArgs {
  const void* x;  // [M, K] T
  uint8_t* q;     // [M, K] codes of E4M3
  float* scale;   // [K / group, M], as cuBLASLt reads them
  int64_t rows;   // M
  int k;          // a multiple of group
  int group;      // kVector<T> · 1, 2, 4, ... 32: the lanes of a group are a power of two
};

inline constexpr int kFloat8Threads = 256;

struct Float8State {
  Words<4> words;
  uint32_t max_bits;
};

// Grid: x pieces of kFloat8Threads 16-byte words of [M, K].
template <class T, class Block>
ONNXQ_DEVICE void Float8GroupsBody(Block& block, const Float8GroupsArgs& a) {
  typename Block::template PerThread<Float8State> states(block);
  const int64_t words = a.rows * a.k / kVector<T>;
  const int lanes = a.group / kVector<T>;
  const auto place = [&](int thread) { return int64_t{block.X()} * kFloat8Threads + thread; };
  block.EachWarp([&](const auto& warp) {
    warp.Each([&](int, int thread) {
      Float8State& s = states[thread];
      s.max_bits = 0;
      if (place(thread) >= words) return;
      s.words = block.Load(static_cast<const Words<4>*>(a.x) + place(thread));
      ONNXQ_UNROLL
      for (int i = 0; i < kVector<T>; ++i) SeeMagnitude(ElementOf<T>(s.words, i), &s.max_bits);
    });
    warp.Max([&](int thread) { return &states[thread].max_bits; }, lanes);
    warp.Each([&](int lane, int thread) {
      if (place(thread) >= words) return;
      const Float8State& s = states[thread];
      const RowScale r = Float8ScaleOf(s.max_bits);
      const int64_t first = place(thread) * kVector<T>;
      if (lane % lanes == 0) {
        block.Store(a.scale + first % a.k / a.group * a.rows + first / a.k, r.scale);
      }
      struct alignas(kVector<T>) Codes {
        uint8_t e[kVector<T>];
      } codes;
      ONNXQ_UNROLL
      for (int i = 0; i < kVector<T>; ++i) {
        codes.e[i] = Float8Out::Quantize(ElementOf<T>(s.words, i), r);
      }
      block.Store(reinterpret_cast<Codes*>(a.q + first), codes);
    });
  });
}

}  // namespace onnxq::cuda
