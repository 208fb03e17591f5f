// Scalar number formats that QuantMatMul's files share. Everything is `static`: see
// per_token_scalar.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "per_token_scalar.h"
#include "quant_mat_mul.h"

namespace onnxq {

// S.EEEE.MMM, bias 7, NaN where all bits below the sign are set.
[[maybe_unused]] static float FromE4M3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fU;
  if (magnitude == 0x7fU) return std::numeric_limits<float>::quiet_NaN();
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9F
                                    : FloatFromBits((magnitude << 20) + (120U << 23));
  return (code & 0x80U) != 0 ? -value : value;
}

// 2^(code - 127); 255 is NaN.
[[maybe_unused]] static float FromE8M0(uint8_t code) {
  if (code == 255) return std::numeric_limits<float>::quiet_NaN();
  return code == 0 ? 0x1p-127F : FloatFromBits(static_cast<uint32_t>(code) << 23);
}

[[maybe_unused]] static float ScaleAt(ScaleType type, const void* scales, int64_t i) {
  switch (type) {
    case ScaleType::kFloat32:
      return static_cast<const float*>(scales)[i];
    case ScaleType::kFloat16:
      return ToFloat(static_cast<const uint16_t*>(scales)[i]);
    case ScaleType::kBfloat16:
      return FloatFromBits(static_cast<uint32_t>(static_cast<const uint16_t*>(scales)[i]) << 16);
    case ScaleType::kE4M3:
      return FromE4M3(static_cast<const uint8_t*>(scales)[i]);
    case ScaleType::kE8M0:
      return FromE8M0(static_cast<const uint8_t*>(scales)[i]);
    case ScaleType::kInt16:
      return static_cast<const int16_t*>(scales)[i];
  }
  return 0;
}

[[maybe_unused]] static int64_t ScaleBytes(ScaleType type) {
  switch (type) {
    case ScaleType::kFloat32:
      return 4;
    case ScaleType::kFloat16:
    case ScaleType::kBfloat16:
    case ScaleType::kInt16:
      return 2;
    case ScaleType::kE4M3:
    case ScaleType::kE8M0:
      return 1;
  }
  return 0;
}

// To the nearest half, ties to even; beyond its range infinity.
[[maybe_unused]] static uint16_t ToHalf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & kAbsMask;
  if (magnitude > kInfinityBits) return static_cast<uint16_t>(sign | 0x7e00U);
  if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);
  if (magnitude < 0x38800000U) {
    // Subnormal: the sum with 2^-1 * 2^k leaves the rounded count of 2^-24 in the low bits.
    const float shifted = FloatFromBits(magnitude) + 0.5F;
    uint32_t count;
    std::memcpy(&count, &shifted, sizeof count);
    return static_cast<uint16_t>(sign | (count - 0x3f000000U));
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

}  // namespace onnxq
