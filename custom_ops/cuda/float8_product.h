// Activations that are rounded to FP8 times plain FP8 weights: the product itself is cuBLASLt's
// where that takes it; here is what ends it, and the plain kernel for where it does not.
#pragma once

#include "cublas_lt.h"
#include "float8.h"
#include "quant_mat_mul.h"

namespace onnxq::cuda {

inline constexpr int kFloat8Block = 128;

struct Float8ProductArgs {
  const void* x;           // [M, K] of the type of y
  const uint8_t* weights;  // [N, K] codes of E4M3
  const float* scales;     // [N], or [N / 128 rounded up, Float8ScaleStride] with blocks
  const float* bias;       // [N], or [1] with stride 0, or null
  void* y;                 // [M, N]
  const uint8_t* q;        // that the launch makes: [M, K] codes of x
  const float* x_scales;   // [M], or [K / 128, M]
  int m;
  int n;
  int k;
  int block;  // 0 or 128
  int bias_stride;
};

ONNXQ_HD int Float8ScaleStride(int k) { return static_cast<int>(CeilDivide(k, 512)) * 4; }

template <class T, class Block>
ONNXQ_DEVICE void StoreFloat8(Block& block, const Float8ProductArgs& a, int row, int column,
                              float total) {
  if (a.bias != nullptr) total += block.Load(a.bias + int64_t{column} * a.bias_stride);
  block.Store(static_cast<typename T::Bits*>(a.y) + int64_t{row} * a.n + column, T::From(total));
}

// Ends products [M, N] that cuBLASLt left, with scales of blocks, without those of rows.
// Grid: x pieces of 256.
template <class T, class Block>
ONNXQ_DEVICE void FinishFloat8Body(Block& block, const Float8ProductArgs& a,
                                   const float* products) {
  block.EachThread([&](int thread) {
    const int64_t i = int64_t{block.X()} * kFloat8Threads + thread;
    if (i >= int64_t{a.m} * a.n) return;
    const int row = static_cast<int>(i / a.n);
    const int column = static_cast<int>(i % a.n);
    float total = block.Load(products + i);
    if (a.block == 0) total = total * block.Load(a.scales + column) * block.Load(a.x_scales + row);
    StoreFloat8<T>(block, a, row, column, total);
  });
}

inline constexpr int kFloat8Tile = 32;                // rows, columns and k at a time
inline constexpr int kFloat8Pitch = kFloat8Tile + 1;  // so that lanes meet no bank twice
inline constexpr int kFloat8Rows = kFloat8Tile * kFloat8Tile / kFloat8Threads;
inline constexpr int kFloat8SharedBytes = 2 * 4 * kFloat8Tile * kFloat8Pitch;

struct Float8ProductState {
  float total[kFloat8Rows];
  float part[kFloat8Rows];  // of the block of 128
};

// Float32 arithmetic, a sum of its own for each block of 128.
// Grid: x tiles of rows, y of columns. Shared memory: the tiles of q and of the weights.
template <class T, class Block>
ONNXQ_DEVICE void PlainFloat8Body(Block& block, const Float8ProductArgs& a) {
  typename Block::template PerThread<Float8ProductState> states(block);
  const typename Block::Shared shared(block, kFloat8SharedBytes);
  constexpr int kWeights = kFloat8SharedBytes / 2;
  const int first_row = block.X() * kFloat8Tile;
  const int first_column = block.Y() * kFloat8Tile;
  const auto place = [](int row, int k) { return 4 * (row * kFloat8Pitch + k); };
  const auto load = [&](const uint8_t* codes, int row, int rows, int k) {
    return row < rows && k < a.k ? FromE4M3(block.Load(codes + int64_t{row} * a.k + k)) : 0.0F;
  };
  const auto row_of = [](int thread, int i) {
    return thread / kFloat8Tile + i * (kFloat8Threads / kFloat8Tile);
  };

  block.EachThread([&](int thread) {
    ONNXQ_UNROLL
    for (int i = 0; i < kFloat8Rows; ++i) states[thread].total[i] = states[thread].part[i] = 0;
  });
  for (int begin = 0; begin < a.k; begin += kFloat8Tile) {
    block.EachThread([&](int thread) {
      const int k = thread % kFloat8Tile;
      ONNXQ_UNROLL
      for (int i = 0; i < kFloat8Rows; ++i) {
        const int row = row_of(thread, i);
        shared.template Set<float>(thread, place(row, k),
                                   load(a.q, first_row + row, a.m, begin + k));
        shared.template Set<float>(thread, kWeights + place(row, k),
                                   load(a.weights, first_column + row, a.n, begin + k));
      }
    });
    block.Sync();
    block.EachThread([&](int thread) {
      Float8ProductState& s = states[thread];
      const int lane = thread % kFloat8Tile;
      for (int k = 0; k < kFloat8Tile; ++k) {
        const float weight = shared.template Get<float>(thread, kWeights + place(lane, k));
        ONNXQ_UNROLL
        for (int i = 0; i < kFloat8Rows; ++i) {
          const float x = shared.template Get<float>(thread, place(row_of(thread, i), k));
          s.part[i] = fmaf(x, weight, s.part[i]);
        }
      }
      const bool ends =
          a.block == 0 ? begin + kFloat8Tile >= a.k : (begin + kFloat8Tile) % kFloat8Block == 0;
      const int column = first_column + lane;
      if (!ends || column >= a.n) return;
      const int group = a.block == 0 ? 0 : begin / kFloat8Block;
      const int64_t at = a.block == 0
                             ? int64_t{column}
                             : int64_t{column / kFloat8Block} * Float8ScaleStride(a.k) + group;
      const float scale = block.Load(a.scales + at);
      ONNXQ_UNROLL
      for (int i = 0; i < kFloat8Rows; ++i) {
        const int row = first_row + row_of(thread, i);
        if (row >= a.m) break;
        const float of_row = block.Load(a.x_scales + int64_t{group} * a.m + row);
        s.total[i] += s.part[i] * scale * of_row;
        s.part[i] = 0;
      }
    });
    block.Sync();
  }
  block.EachThread([&](int thread) {
    const int column = first_column + thread % kFloat8Tile;
    ONNXQ_UNROLL
    for (int i = 0; i < kFloat8Rows; ++i) {
      const int row = first_row + row_of(thread, i);
      if (row < a.m && column < a.n) {
        StoreFloat8<T>(block, a, row, column, states[thread].total[i]);
      }
    }
  });
}

// The parts of the scratch memory; q begins at 0.
struct Float8Scratch {
  explicit Float8Scratch(const Float8ProductArgs& a)
      : x_scales(Round(int64_t{a.m} * a.k)),
        workspace(x_scales + Round(int64_t{a.m} * (a.block == 0 ? 1 : a.k / kFloat8Block) * 4)),
        products(workspace + static_cast<int64_t>(kMatrixWorkspace)),
        bytes(products + Round(int64_t{a.m} * a.n * 4)) {}
  static int64_t Round(int64_t bytes) { return CeilDivide(bytes, 256) * 256; }
  int64_t x_scales;
  int64_t workspace;
  int64_t products;
  int64_t bytes;
};

}  // namespace onnxq::cuda
