// FP8 E4M3 operands for cuBLASLt: activations with a scale a group of columns, and what stands
// before and behind a product with packed weights.
#pragma once

#include "per_token.h"
#include "quant_mat_mul_any.h"

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

// scales [N] of the columns in float32, factor included, of weights with one group.
// Grid: x pieces of 256.
inline constexpr int kColumnThreads = 256;

template <class Block>
ONNXQ_DEVICE void ColumnScalesBody(Block& block, const QuantMatMulArgs& a, float factor,
                                   float* scales) {
  block.EachThread([&](int thread) {
    const int column = block.X() * kColumnThreads + thread;
    if (column >= a.n) return;
    const int64_t at = PanelGroups(a, column / kPanel) + column % kPanel;
    block.Store(scales + column, LoadScale(block, a.scale_type, a.scales, at) * factor);
  });
}

// Ends products [M, N] of FP8 that cuBLASLt left without scales. Grid: x pieces of 256.
template <class T, class Block>
ONNXQ_DEVICE void ScaleFloatsBody(Block& block, const QuantMatMulArgs& a, const float* products,
                                  const float* column_scales) {
  block.EachThread([&](int thread) {
    const int64_t i = int64_t{block.X()} * kColumnThreads + thread;
    if (i >= int64_t{a.m} * a.n) return;
    const int row = static_cast<int>(i / a.n);
    const int column = static_cast<int>(i % a.n);
    const float total = block.Load(products + i) * block.Load(column_scales + column);
    Finish<T>(block, a, 1.0F, row, column, total);
  });
}

}  // namespace onnxq::cuda
