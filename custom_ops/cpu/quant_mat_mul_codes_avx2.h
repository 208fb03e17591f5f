// Codes and scales of QuantMatMul in vectors of 256 bits: 8 columns.
//
// Everything here is in an unnamed namespace: see quant_mat_mul_driver.h.
#pragma once

#include <immintrin.h>

#include "quant_mat_mul_driver.h"

namespace onnxq {
namespace {

constexpr int64_t kLanes = 8;

ONNXQ_INLINE inline __m256i Load(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}
ONNXQ_INLINE inline __m256i LoadI8(const int8_t* at) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}
ONNXQ_INLINE inline __m128i LoadHalves(const void* at) {
  return _mm_loadu_si128(static_cast<const __m128i*>(at));
}
ONNXQ_INLINE inline __m256i LoadBytes(const void* at) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at)));
}
ONNXQ_INLINE inline void Store(void* at, __m256i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(at), v);
}

ONNXQ_INLINE inline __m256 Select(__m256i where, __m256 yes, __m256 no) {
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(where));
}

ONNXQ_INLINE inline __m256 FromE4M3(__m256i code) {
  const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
  const __m256i bits = _mm256_slli_epi32(magnitude, 20);
  const __m256 normal = _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(120 << 23)));
  // (1 + M / 8) * 2^-6 - 2^-6, without a subnormal on the way.
  const __m256 subnormal =
      _mm256_sub_ps(_mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(121 << 23))),
                    _mm256_set1_ps(0x1p-6F));
  __m256 value = Select(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude), subnormal, normal);
  value = Select(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)),
                 _mm256_set1_ps(std::numeric_limits<float>::quiet_NaN()), value);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
  return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
}

ONNXQ_INLINE inline __m256 FromE8M0(__m256i code) {
  const __m256 value = _mm256_castsi256_ps(_mm256_slli_epi32(code, 23));
  const __m256 least = _mm256_set1_ps(0x1p-127F);
  const __m256 nan = _mm256_set1_ps(std::numeric_limits<float>::quiet_NaN());
  return Select(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()), least,
                Select(_mm256_cmpeq_epi32(code, _mm256_set1_epi32(255)), nan, value));
}

// Eight integer scales from element `at` on.
ONNXQ_INLINE inline __m256i IntegerScales(const void* scales, int64_t at) {
  return _mm256_cvtepi16_epi32(LoadHalves(static_cast<const int16_t*>(scales) + at));
}

// Eight scales from element `at` on.
ONNXQ_INLINE inline __m256 Scales(ScaleType type, const void* scales, int64_t at) {
  switch (type) {
    case ScaleType::kFloat32:
      return _mm256_loadu_ps(static_cast<const float*>(scales) + at);
    case ScaleType::kFloat16:
      return _mm256_cvtph_ps(LoadHalves(static_cast<const uint16_t*>(scales) + at));
    case ScaleType::kBfloat16:
      return _mm256_castsi256_ps(_mm256_slli_epi32(
          _mm256_cvtepu16_epi32(LoadHalves(static_cast<const uint16_t*>(scales) + at)), 16));
    case ScaleType::kE4M3:
      return FromE4M3(LoadBytes(static_cast<const uint8_t*>(scales) + at));
    case ScaleType::kE8M0:
      return FromE8M0(LoadBytes(static_cast<const uint8_t*>(scales) + at));
    case ScaleType::kInt16:
      return _mm256_cvtepi32_ps(IntegerScales(scales, at));
  }
  return _mm256_setzero_ps();
}

// The same as integer kernels take them: integer scales as the bits of integers.
template <bool integer>
ONNXQ_INLINE inline __m256 GroupScales(ScaleType type, const void* scales, int64_t at) {
  if constexpr (integer) return _mm256_castsi256_ps(IntegerScales(scales, at));
  return Scales(type, scales, at);
}

// sum + dot * scale: floats, or the bits of integers; kScaled multiplies by the row's first.
template <GroupSum kind>
ONNXQ_INLINE inline __m256 AddGroup(__m256i dot, __m256 scale, __m256 sum, const float* row) {
  if constexpr (kind == GroupSum::kInteger) {
    const __m256i scaled = _mm256_mullo_epi32(dot, _mm256_castps_si256(scale));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum), scaled));
  }
  __m256 whole = _mm256_cvtepi32_ps(dot);
  if constexpr (kind == GroupSum::kScaled) whole = _mm256_mul_ps(whole, _mm256_set1_ps(*row));
  return _mm256_fmadd_ps(whole, scale, sum);
}

// A plane of 2-bit fields holds 8 columns in each field: field v, lowest in its byte.
ONNXQ_INLINE inline __m256i LoadFields2(const uint8_t* codes, int v) {
  return _mm256_and_si256(_mm256_srl_epi64(Load(codes), _mm_cvtsi32_si128(2 * v)),
                          _mm256_set1_epi8(3));
}

// A plane of single bits holds 4 columns in each: bits 2 v and 2 v + 1, lowest in their bytes.
ONNXQ_INLINE inline __m256i LoadFields1(const uint8_t* codes, int v) {
  const __m256i all = _mm256_broadcastsi128_si256(LoadHalves(codes));
  const __m256i shifts = _mm256_set_epi64x(2 * v + 1, 2 * v + 1, 2 * v, 2 * v);
  return _mm256_and_si256(_mm256_srlv_epi64(all, shifts), _mm256_set1_epi8(1));
}

// Codes of the columns 8 v to 8 v + 7, one a byte, four k of a column side by side.
template <LevelKind kind>
ONNXQ_INLINE inline __m256i LoadCodes(const uint8_t* codes, int v) {
  constexpr int64_t kBits = CodeBits(kind);
  if constexpr (kBits == 8) {
    return Load(codes + 32 * v);
  } else if constexpr (kBits == 1) {
    return LoadFields1(codes, v);
  } else if constexpr (kBits == 2) {
    return LoadFields2(codes, v);
  } else if constexpr (kBits == 3) {
    return _mm256_or_si256(LoadFields2(codes, v), _mm256_slli_epi64(LoadFields1(codes + 32, v), 2));
  } else {
    const __m256i both = Load(codes + 32 * (v % 2));
    const __m256i four =
        _mm256_and_si256(v < 2 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
    if constexpr (kBits == 4) return four;
    return _mm256_or_si256(four, _mm256_slli_epi64(LoadFields2(codes + 64, v), 4));
  }
}

// 16 of the bytes that levels are, in each half.
ONNXQ_INLINE inline __m256i Table(const QuantWeights& w, int part = 0) {
  return _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.bytes + 16 * part)));
}

// Codes of 16 columns, 16 h to 16 h + 15, as unsigned levels less the offset.
template <LevelKind kind>
ONNXQ_INLINE inline void LoadStep(const QuantWeights& w, const uint8_t* codes, int h, __m256i table,
                                  __m256i (&out)[2]) {
  Each<2>([&](auto v) ONNXQ_INLINE {
    const __m256i code = LoadCodes<kind>(codes, 2 * h + v);
    if constexpr (kind == LevelKind::kAffine4 || kind == LevelKind::kAffine8) {
      out[v] = code;
    } else if constexpr (kind != LevelKind::kTable64) {
      out[v] = _mm256_shuffle_epi8(table, code);
    } else {
      // The blend looks at bit 7 of each byte.
      const __m256i odd = _mm256_slli_epi16(code, 3);
      const __m256i low = _mm256_and_si256(code, _mm256_set1_epi8(15));
      const __m256i first = _mm256_blendv_epi8(_mm256_shuffle_epi8(table, low),
                                               _mm256_shuffle_epi8(Table(w, 1), low), odd);
      const __m256i second = _mm256_blendv_epi8(_mm256_shuffle_epi8(Table(w, 2), low),
                                                _mm256_shuffle_epi8(Table(w, 3), low), odd);
      out[v] = _mm256_blendv_epi8(first, second, _mm256_slli_epi16(code, 2));
    }
  });
}

// The first 16 levels; zeros where there are fewer.
void LoadTable16(const QuantWeights& w, float (&out)[16]) {
  std::memset(out, 0, sizeof out);
  const auto count = std::min<size_t>(16, size_t{1} << CodeBits(w.kind));
  std::memcpy(out, w.levels, count * sizeof(float));
}

}  // namespace
}  // namespace onnxq
