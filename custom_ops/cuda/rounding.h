// Rounding of magnitudes to small floats, and powers of two, in float32.
#pragma once

#include "numbers.h"

namespace onnxq::cuda {

inline constexpr float kFloatMin = 0x1p-126F;

// Exponent of a magnitude; that of subnormals counts as -127.
ONNXQ_HD int ExponentOf(float magnitude) {
  return static_cast<int>(BitsOfFloat(magnitude) >> 23) - 127;
}

// floor(log2) of any positive number.
ONNXQ_HD int FloorLog2(float x) {
  return x < kFloatMin ? ExponentOf(x * 0x1p24F) - 24 : ExponentOf(x);
}

// 2^exponent, from -127 to 127.
ONNXQ_HD float PowerOfTwo(int exponent) {
  return exponent < -126 ? 0x1p-127F : FloatFromBits(static_cast<uint32_t>(exponent + 127) << 23);
}

// A magnitude to the nearest element. Adding 1.5 · 2^23 steps leaves room for whole steps only, so
// that the sum is rounded to them, ties to even.
ONNXQ_HD float RoundMagnitude(float magnitude, int mantissa, int min_exponent, float largest) {
  const float bounded = magnitude < largest ? magnitude : largest;
  const int own = ExponentOf(bounded);
  const int exponent = own > min_exponent ? own : min_exponent;
  const float room =
      FloatFromBits(static_cast<uint32_t>(exponent - mantissa + 23 + 127) << 23 | 1U << 22);
  return (bounded + room) - room;
}

}  // namespace onnxq::cuda
