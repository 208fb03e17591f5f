// The loops of QuantizeBlock, which compilers turn into vectors by themselves. Everything is
// `static`: each instruction set has its own copy (see per_token_scalar.h).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "per_token_scalar.h"
#include "quantize_block.h"

namespace onnxq {

static constexpr int32_t kExponentBias = 127;
static constexpr int32_t kFractionBits = 23;
static constexpr float kE4M3Max = 448;

// Exponent of a magnitude; that of subnormals counts as -127.
static inline int32_t ExponentOf(float magnitude) {
  int32_t bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  return (bits >> kFractionBits) - kExponentBias;
}

// A magnitude to the nearest element. Adding 1.5 * 2^23 steps leaves room for whole steps only, so
// that the sum is rounded to them, ties to even.
static inline float RoundElement(float magnitude, int32_t mantissa, int32_t min_exponent,
                                 float largest) {
  const float bounded = magnitude < largest ? magnitude : largest;
  const int32_t exponent = std::max(ExponentOf(bounded), min_exponent);
  const int32_t bits =
      (exponent - mantissa + kFractionBits + kExponentBias) << kFractionBits | 1 << 22;
  const float room = FloatFromBits(static_cast<uint32_t>(bits));
  return (bounded + room) - room;
}

// floor(log2) of any positive number.
static inline int32_t FloorLog2(float x) { return std::ilogb(x); }

static float ScaleOfBlock(float amax, const BlockFormat& f) {
  if (f.scale == BlockScale::kFloat) return std::max(amax * f.clip / f.largest, FLT_MIN);
  if (f.scale == BlockScale::kE4M3) {
    return RoundElement(amax / f.largest / f.factor, 3, -6, kE4M3Max) * f.factor;
  }
  const float least = std::max(amax, 0x1p-149F);
  int32_t exponent = FloorLog2(least) - FloorLog2(f.largest);
  if (f.scale == BlockScale::kE8M0Ceil && least > std::ldexp(f.largest, exponent)) ++exponent;
  return std::ldexp(1.0F, std::clamp(exponent, -127, 127));
}

// The largest magnitude, as bits: those of infinities and NaN lie above all numbers.
static uint32_t MostBits(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    most = std::max(most, static_cast<int32_t>(AbsBits(x[i])));
  }
  return static_cast<uint32_t>(most);
}

static void QuantizeOneBlock(float* x, int64_t count, const BlockFormat& f) {
  const uint32_t most = MostBits(x, count);
  if (most >= kInfinityBits) {
    std::fill_n(x, count, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const float scale = ScaleOfBlock(FloatFromBits(most), f);
  if (!(scale > 0)) {
    std::fill_n(x, count, 0.0F);
    return;
  }
  const int32_t mantissa = f.mantissa;
  const int32_t min_exponent = f.min_exponent;
  const float largest = f.largest;
  const float bottom = -f.lowest;
  for (int64_t i = 0; i < count; ++i) {
    const float limit = x[i] < 0 ? bottom : largest;
    const float rounded = RoundElement(std::fabs(x[i]) / scale, mantissa, min_exponent, limit);
    x[i] = ((x[i] < 0 ? -rounded : rounded) + 0.0F) * scale;  // no -0
  }
}

// The largest magnitude among the blocks of the row without NaN and infinities, over the reach of
// E4M3 scales.
static float FactorOfRow(const float* x, int64_t count, int64_t block, float largest) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i += block) {
    const uint32_t bits = MostBits(x + i, std::min(block, count - i));
    if (bits < kInfinityBits) most = std::max(most, bits);
  }
  return std::max(FloatFromBits(most) / (largest * kE4M3Max), FLT_MIN);
}

static void QuantizeBlocksOfRow(float* x, int64_t count, int64_t block, const BlockFormat& format) {
  BlockFormat f = format;
  if (f.factor == 0) f.factor = FactorOfRow(x, count, block, f.largest);
  for (int64_t i = 0; i < count; i += block) {
    QuantizeOneBlock(x + i, std::min(block, count - i), f);
  }
}

}  // namespace onnxq
