// Number formats as kernels and the CPU see them, and arithmetic on pairs of 16-bit floats.
//
// On the device these are single instructions; the versions for the CPU give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace onnxq::cuda {

ONNXQ_HD float FloatFromBits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

ONNXQ_HD uint32_t BitsOfFloat(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// The CPU's conversions, in integers.
ONNXQ_HD float HalfBitsToFloat(uint32_t half) {
  const uint32_t sign = (half & 0x8000U) << 16;
  const uint32_t magnitude = half & 0x7fffU;
  if (magnitude >= 0x7c00U) return FloatFromBits(sign | 0x7f800000U | (magnitude & 0x3ffU) << 13);
  if (magnitude >= 0x0400U) return FloatFromBits(sign | ((magnitude << 13) + 0x38000000U));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24F;
  return sign != 0 ? -subnormal : subnormal;
}

ONNXQ_HD uint16_t FloatToHalfBits(float value) {
  const uint32_t bits = BitsOfFloat(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return static_cast<uint16_t>(0x7fffU);
  if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);
  if (magnitude < 0x38800000U) {
    // Subnormal: the sum with 1/2 leaves the rounded count of 2^-24 in the low bits.
    const uint32_t count = BitsOfFloat(FloatFromBits(magnitude) + 0.5F) - 0x3f000000U;
    return static_cast<uint16_t>(sign | count);
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

ONNXQ_HD uint16_t FloatToBfloatBits(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>(0x7fffU);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// The types of activations: how an element is stored, and its way to float32 and back, to the
// nearest, ties to even.
struct Float {
  using Bits = float;
  static constexpr int kIndex = 0;
  ONNXQ_HD static float To(Bits value) { return value; }
  ONNXQ_HD static Bits From(float value) { return value; }
};

struct Half {
  using Bits = uint16_t;
  static constexpr int kIndex = 1;
  ONNXQ_HD static float To(Bits bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    return HalfBitsToFloat(bits);
#endif
  }
  ONNXQ_HD static Bits From(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    return FloatToHalfBits(value);
#endif
  }
};

struct Bfloat {
  using Bits = uint16_t;
  static constexpr int kIndex = 2;
  ONNXQ_HD static float To(Bits bits) { return FloatFromBits(static_cast<uint32_t>(bits) << 16); }
  ONNXQ_HD static Bits From(float value) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    return FloatToBfloatBits(value);
#endif
  }
};

#if defined(__CUDA_ARCH__)
template <class T>
struct DevicePair;
template <>
struct DevicePair<Half> {
  using Type = __half2;
};
template <>
struct DevicePair<Bfloat> {
  using Type = __nv_bfloat162;
};

template <class T>
__device__ __forceinline__ typename DevicePair<T>::Type AsPair(uint32_t bits) {
  typename DevicePair<T>::Type pair;
  memcpy(&pair, &bits, sizeof pair);
  return pair;
}
template <class Pair>
__device__ __forceinline__ uint32_t PairBits(Pair pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
#endif

// The same number in both halves of a word.
template <class T>
ONNXQ_HD uint32_t Both(float value) {
  return static_cast<uint32_t>(T::From(value)) * 0x00010001U;
}

// a * b + c of both halves, each rounded once.
template <class T>
ONNXQ_HD uint32_t PairFma(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  return PairBits(__hfma2(AsPair<T>(a), AsPair<T>(b), AsPair<T>(c)));
#else
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [&](uint32_t v) { return T::To(static_cast<uint16_t>(v >> shift)); };
    result |= static_cast<uint32_t>(T::From(std::fmaf(part(a), part(b), part(c)))) << shift;
  }
  return result;
#endif
}

template <class T>
ONNXQ_HD uint32_t PairSub(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return PairBits(__hsub2(AsPair<T>(a), AsPair<T>(b)));
#else
  return PairFma<T>(b, Both<T>(-1.0F), a);
#endif
}

template <class T>
ONNXQ_HD uint32_t PairMul(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return PairBits(__hmul2(AsPair<T>(a), AsPair<T>(b)));
#else
  return PairFma<T>(a, b, Both<T>(-0.0F));
#endif
}

// S.EEEE.MMM, bias 7, NaN where all bits below the sign are set.
ONNXQ_HD float FromE4M3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fU;
  const uint32_t sign = static_cast<uint32_t>(code & 0x80U) << 24;
  if (magnitude == 0x7fU) return FloatFromBits(0x7fc00000U);
  if (magnitude < 8) {
    const float value = static_cast<float>(magnitude) * 0x1p-9F;
    return sign != 0 ? -value : value;
  }
  return FloatFromBits(sign | ((magnitude << 20) + (120U << 23)));
}

// 2^(code - 127); 255 is NaN.
ONNXQ_HD float FromE8M0(uint8_t code) {
  if (code == 255) return FloatFromBits(0x7fc00000U);
  return code == 0 ? 0x1p-127F : FloatFromBits(static_cast<uint32_t>(code) << 23);
}

enum class ScaleType : int {
  kFloat32 = 0,
  kFloat16 = 1,
  kBfloat16 = 2,
  kE4M3 = 3,
  kE8M0 = 4,
  kInt16 = 5
};

template <class Block>
ONNXQ_DEVICE float LoadScale(const Block& block, ScaleType type, const void* scales, int64_t i) {
  switch (type) {
    case ScaleType::kFloat32:
      return block.Load(static_cast<const float*>(scales) + i);
    case ScaleType::kFloat16:
      return Half::To(block.Load(static_cast<const uint16_t*>(scales) + i));
    case ScaleType::kBfloat16:
      return Bfloat::To(block.Load(static_cast<const uint16_t*>(scales) + i));
    case ScaleType::kE4M3:
      return FromE4M3(block.Load(static_cast<const uint8_t*>(scales) + i));
    case ScaleType::kE8M0:
      return FromE8M0(block.Load(static_cast<const uint8_t*>(scales) + i));
    case ScaleType::kInt16:
      return static_cast<float>(block.Load(static_cast<const int16_t*>(scales) + i));
  }
  return 0;
}

}  // namespace onnxq::cuda
