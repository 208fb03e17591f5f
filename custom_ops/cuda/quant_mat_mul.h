// What the kernels of QuantMatMul share: y[m, n] = (sum over k of x[m, k] · W[n, k]) · r[m] +
// bias[n].
//
//   W[n, k] = (level[code[n, k]] - zero[n, group]) · scale[n, group] · factor
//
// Sums of a group run in float32 over exact products, then total = fma(sum, scale, total).
#pragma once

#include "decode.h"

namespace onnxq::cuda {

// Pointers are to device memory. Symbols: P = ceil(N / 32) panels, J = ceil(K / 4) steps,
// G = ceil(K / group) groups.
struct QuantMatMulArgs {
  const void* x;              // [M, K] T
  const uint8_t* codes;       // [P, J, 16 · bits]
  const void* scales;         // [P, G, 32] of scale_type
  const int8_t* zero_points;  // [P, G, 32], or null for none
  const float* levels;        // [2^bits]
  const float* bias;          // [N], or [1] with bias_stride 0, or null for none
  const float* row_scale;     // r: [M], or null for ones
  void* y;                    // [M, N] T; not written where `sums` is given
  float* sums;                // [M, N] results in float32 for AddOutliersBody, or null
  float* partial;             // [splits, M, N] sums; null when there is one split
  int m;
  int n;
  int k;
  int group;   // k that share a scale
  int groups;  // G
  int splits;  // of K
  int offset;  // lowest level, for integer levels
  int bits;    // of a code
  int bias_stride;
  ScaleType scale_type;
  float factor;
};

ONNXQ_HD int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
ONNXQ_HD int Steps(const QuantMatMulArgs& a) { return (a.k + 3) / 4; }
ONNXQ_HD int Tiles(const QuantMatMulArgs& a) { return (a.k + kTileK - 1) / kTileK; }

ONNXQ_HD int ScaleBytes(ScaleType type) {
  return type == ScaleType::kFloat32                            ? 4
         : type == ScaleType::kE4M3 || type == ScaleType::kE8M0 ? 1
                                                                : 2;
}

ONNXQ_HD const uint8_t* PanelCodes(const QuantMatMulArgs& a, int64_t panel) {
  return a.codes + panel * Steps(a) * (16 * a.bits);
}

// Where the first scale (or zero point) of a panel lies, counted in scales.
ONNXQ_HD int64_t PanelGroups(const QuantMatMulArgs& a, int64_t panel) {
  return panel * a.groups * kPanel;
}

// A scale in shared memory, by its place among the panel's.
template <class Shared>
ONNXQ_DEVICE float SharedScale(const Shared& shared, ScaleType type, int thread, int base, int i) {
  switch (type) {
    case ScaleType::kFloat32:
      return shared.template Get<float>(thread, base + 4 * i);
    case ScaleType::kFloat16:
      return Half::To(shared.template Get<uint16_t>(thread, base + 2 * i));
    case ScaleType::kBfloat16:
      return Bfloat::To(shared.template Get<uint16_t>(thread, base + 2 * i));
    case ScaleType::kE4M3:
      return FromE4M3(shared.template Get<uint8_t>(thread, base + i));
    case ScaleType::kE8M0:
      return FromE8M0(shared.template Get<uint8_t>(thread, base + i));
    case ScaleType::kInt16:
      return static_cast<float>(shared.template Get<int16_t>(thread, base + 2 * i));
  }
  return 0;
}

// Ends an element: the row's scale, the factor, the bias, the rounding to T unless more is added.
template <class T, class Block>
ONNXQ_DEVICE void Finish(const Block& block, const QuantMatMulArgs& a, float factor, int row,
                         int column, float total) {
  const float r = a.row_scale == nullptr ? factor : block.Load(a.row_scale + row) * factor;
  const float bias =
      a.bias == nullptr ? 0.0F : block.Load(a.bias + int64_t{column} * a.bias_stride);
  const float value = total * r + bias;
  const int64_t at = int64_t{row} * a.n + column;
  if (a.sums != nullptr) {
    block.Store(a.sums + at, value);
  } else {
    block.Store(static_cast<typename T::Bits*>(a.y) + at, T::From(value));
  }
}

}  // namespace onnxq::cuda
