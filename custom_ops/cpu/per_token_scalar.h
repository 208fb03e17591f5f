// Scalar steps of per-token quantization that every instruction set shares.
//
// Everything here is `static`: each translation unit has its own copy, compiled with its own flags.
// An inline function with external linkage would be merged by the linker, and the copy that
// survives might hold instructions that the CPU lacks.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace onnxq {

static constexpr uint32_t kAbsMask = 0x7fffffffU;
static constexpr uint32_t kInfinityBits = 0x7f800000U;

[[maybe_unused]] static float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] static uint32_t AbsBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & kAbsMask;
}

[[maybe_unused]] static float ToFloat(float value) { return value; }

// Exact: every half, subnormals included, is a float.
[[maybe_unused]] static float ToFloat(uint16_t half) {
  const uint32_t sign = (half & 0x8000U) << 16;
  const uint32_t magnitude = half & 0x7fffU;
  if (magnitude >= 0x7c00U) return FloatFromBits(sign | kInfinityBits | (magnitude & 0x3ffU) << 13);
  if (magnitude >= 0x0400U) return FloatFromBits(sign | ((magnitude << 13) + 0x38000000U));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24F;
  return sign != 0 ? -subnormal : subnormal;
}

// The scale of a row from the greatest magnitude in it, and the factor that x is multiplied by.
// Magnitudes are compared as bit patterns, where infinities and NaNs lie above all numbers: a row
// that holds one gets scale NaN and q = 0, so that the fault stays visible downstream.
struct RowScale {
  float scale;
  float factor;
  bool finite;
};

[[maybe_unused]] static RowScale ScaleOfRow(uint32_t max_bits) {
  if (max_bits >= kInfinityBits) {
    return {std::numeric_limits<float>::quiet_NaN(), 0.0F, false};
  }
  const float floor = 127.0F * FLT_MIN;
  const float max = FloatFromBits(max_bits);
  const float amax = max > floor ? max : floor;
  return {amax / 127.0F, 127.0F / amax, true};
}

// No clamp: the product cannot round beyond 127 (see the definition).
[[maybe_unused]] static int8_t QuantizeOne(float x, float factor) {
  return static_cast<int8_t>(std::lrintf(x * factor));
}

}  // namespace onnxq
