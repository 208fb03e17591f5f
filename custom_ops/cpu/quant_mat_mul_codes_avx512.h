// Codes and scales of QuantMatMul in vectors of 512 bits: 16 columns.
//
// Everything here is in an unnamed namespace: see quant_mat_mul_driver.h.
#pragma once

#include <immintrin.h>

#include "quant_mat_mul_driver.h"

namespace onnxq {
namespace {

constexpr int64_t kLanes = 16;

ONNXQ_INLINE inline __m512 FromE4M3(__m512i code) {
  const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
  const __m512i bits = _mm512_slli_epi32(magnitude, 20);
  const __m512 normal = _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(120 << 23)));
  // (1 + M / 8) * 2^-6 - 2^-6, without a subnormal on the way.
  const __m512 subnormal =
      _mm512_sub_ps(_mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(121 << 23))),
                    _mm512_set1_ps(0x1p-6F));
  __m512 value = _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8)),
                                      normal, subnormal);
  value = _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)), value,
                               _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
}

ONNXQ_INLINE inline __m512 FromE8M0(__m512i code) {
  __m512i bits = _mm512_slli_epi32(code, 23);
  bits =
      _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(code, code), _mm512_set1_epi32(1 << 22));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255)),
                               _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(bits);
}

ONNXQ_INLINE inline __m512i Load16Bytes(const void* at) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at)));
}
ONNXQ_INLINE inline __m256i Load16Halves(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

// Sixteen integer scales from element `at` on.
ONNXQ_INLINE inline __m512i IntegerScales(const void* scales, int64_t at) {
  return _mm512_cvtepi16_epi32(Load16Halves(static_cast<const int16_t*>(scales) + at));
}

// Sixteen scales from element `at` on.
ONNXQ_INLINE inline __m512 Scales(ScaleType type, const void* scales, int64_t at) {
  switch (type) {
    case ScaleType::kFloat32:
      return _mm512_loadu_ps(static_cast<const float*>(scales) + at);
    case ScaleType::kFloat16:
      return _mm512_cvtph_ps(Load16Halves(static_cast<const uint16_t*>(scales) + at));
    case ScaleType::kBfloat16:
      return _mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(Load16Halves(static_cast<const uint16_t*>(scales) + at)), 16));
    case ScaleType::kE4M3:
      return FromE4M3(Load16Bytes(static_cast<const uint8_t*>(scales) + at));
    case ScaleType::kE8M0:
      return FromE8M0(Load16Bytes(static_cast<const uint8_t*>(scales) + at));
    case ScaleType::kInt16:
      return _mm512_cvtepi32_ps(IntegerScales(scales, at));
  }
  return _mm512_setzero_ps();
}

// sum + dot * scale: floats, or the bits of integers; kScaled multiplies by the row's first.
template <GroupSum kind>
ONNXQ_INLINE inline __m512 AddGroup(__m512i dot, __m512 scale, __m512 sum, const float* row) {
  if constexpr (kind == GroupSum::kInteger) {
    const __m512i scaled = _mm512_mullo_epi32(dot, _mm512_castps_si512(scale));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sum), scaled));
  }
  __m512 whole = _mm512_cvtepi32_ps(dot);
  if constexpr (kind == GroupSum::kScaled) whole = _mm512_mul_ps(whole, _mm512_set1_ps(*row));
  return _mm512_fmadd_ps(whole, scale, sum);
}

// Scales as integer kernels take them: integer scales as the bits of integers.
ONNXQ_NOINLINE void ConvertScales(ScaleType type, const void* scales, int64_t at, int64_t count,
                                  float* out) {
  for (int64_t i = 0; i < count && type == ScaleType::kInt16; i += kLanes) {
    _mm512_storeu_si512(out + i, IntegerScales(scales, at + i));
  }
  for (int64_t i = 0; i < count && type != ScaleType::kInt16; i += kLanes) {
    _mm512_storeu_ps(out + i, Scales(type, scales, at + i));
  }
}

// E4M3 numbers other than NaN: the four bytes of each lane to four vectors. S.EEEE.MMM becomes the
// upper half of a float, S.0000EEEE.MMM0000, two bytes at a time; 120 more in the exponent makes it
// right. Numbers with E = 0 come from a table: no subnormal floats, which may be flushed or slow.
ONNXQ_INLINE inline void FromE4M3(__m512i codes, __m512 (&out)[4]) {
  const __m512i table = _mm512_castsi128_si512(
      _mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));  // m * 2^-9
  const __m512i places[2] = {_mm512_slli_epi16(codes, 8), codes};
  Each<2>([&](auto i) ONNXQ_INLINE {
    const __m512i moved = _mm512_srai_epi16(places[i], 4);
    const __m512i magnitude = _mm512_and_si512(moved, _mm512_set1_epi16(0x07f0));
    const __mmask32 small = _mm512_testn_epi16_mask(magnitude, _mm512_set1_epi16(0x0780));
    __m512i half = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
    half = _mm512_mask_permutexvar_epi16(half, small, _mm512_srli_epi16(magnitude, 4), table);
    const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
    half = _mm512_ternarylogic_epi32(half, moved, sign, 0xf8);  // half | (moved & sign)
    out[i] = _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
    out[i + 2] = _mm512_castsi512_ps(
        _mm512_and_si512(half, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000U))));
  });
}

// The step 8 KiB ahead: the hardware alone falls behind where there is much to do with each byte,
// and stops at the end of a page.
template <int64_t bytes>
ONNXQ_INLINE inline void Prefetch(const uint8_t* codes) {
  constexpr int64_t kAhead = 8192;
  for (int64_t line = 0; line < bytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + line), _MM_HINT_T0);
  }
}

// A plane of 2-bit fields holds 8 columns in each field. Spread over both halves of a vector and
// moved apart, each column's field lies lowest in its own byte. Columns 0 to 15 and 16 to 31.
ONNXQ_INLINE inline void LoadFields2(const uint8_t* codes, __m512i (&out)[2]) {
  const __m512i mask = _mm512_set1_epi8(3);
  const __m512i all =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  const __m512i first = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
  out[0] = _mm512_and_si512(_mm512_srlv_epi64(all, first), mask);
  out[1] = _mm512_and_si512(_mm512_srlv_epi64(_mm512_srli_epi64(all, 4), first), mask);
}

// The same for a plane of single bits, 4 columns in each.
ONNXQ_INLINE inline void LoadFields1(const uint8_t* codes, __m512i (&out)[2]) {
  const __m512i mask = _mm512_set1_epi8(1);
  const __m512i all =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i first = _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0);
  out[0] = _mm512_and_si512(_mm512_srlv_epi64(all, first), mask);
  out[1] = _mm512_and_si512(_mm512_srlv_epi64(_mm512_srli_epi64(all, 4), first), mask);
}

// Puts the fields of another plane `shift` bits up.
template <int shift>
ONNXQ_INLINE inline void AddFields(const __m512i (&fields)[2], __m512i (&out)[2]) {
  Each<2>([&](auto v) ONNXQ_INLINE {
    out[v] = _mm512_or_si512(out[v], _mm512_slli_epi64(fields[v], shift));
  });
}

// Codes of the columns 0 to 15 and 16 to 31, one a byte, four k of a column side by side.
template <LevelKind kind>
ONNXQ_INLINE inline void LoadCodes(const uint8_t* codes, __m512i (&out)[2]) {
  constexpr int64_t kBits = CodeBits(kind);
  if constexpr (kBits == 8) {
    out[0] = _mm512_loadu_si512(codes);
    out[1] = _mm512_loadu_si512(codes + 64);
  } else if constexpr (kBits == 1) {
    LoadFields1(codes, out);
  } else if constexpr (kBits <= 3) {
    LoadFields2(codes, out);
  } else {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i both = _mm512_loadu_si512(codes);
    out[0] = _mm512_and_si512(both, nibble);
    out[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
  }
  if constexpr (kBits == 3) {
    __m512i fields[2];
    LoadFields1(codes + 32, fields);
    AddFields<2>(fields, out);
  } else if constexpr (kBits == 6) {
    __m512i fields[2];
    LoadFields2(codes + 64, fields);
    AddFields<4>(fields, out);
  }
}

// 16 of the bytes that levels are, in each quarter.
ONNXQ_INLINE inline __m512i Table(const QuantWeights& w, int part = 0) {
  return _mm512_broadcast_i32x4(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.bytes + 16 * part)));
}

// Codes of the columns 0 to 15 and 16 to 31, as unsigned levels less the offset.
template <LevelKind kind>
ONNXQ_INLINE inline void LoadStep(const QuantWeights& w, const uint8_t* codes, __m512i table,
                                  __m512i (&out)[2]) {
  LoadCodes<kind>(codes, out);
  if constexpr (kind == LevelKind::kTable64) {
    Each<2>([&](auto v) ONNXQ_INLINE {
      const __mmask64 odd = _mm512_test_epi8_mask(out[v], _mm512_set1_epi8(16));
      const __mmask64 upper = _mm512_test_epi8_mask(out[v], _mm512_set1_epi8(32));
      const __m512i code = _mm512_and_si512(out[v], _mm512_set1_epi8(15));
      const __m512i low =
          _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table, code), odd, Table(w, 1), code);
      const __m512i high =
          _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(Table(w, 2), code), odd, Table(w, 3), code);
      out[v] = _mm512_mask_mov_epi8(low, upper, high);
    });
  } else if constexpr (kind != LevelKind::kAffine4 && kind != LevelKind::kAffine8) {
    Each<2>([&](auto v) ONNXQ_INLINE { out[v] = _mm512_shuffle_epi8(table, out[v]); });
  }
}

// The first 16 levels; zeros where there are fewer.
ONNXQ_INLINE inline __m512 FloatTable(const QuantWeights& w) {
  const int64_t count = int64_t{1} << std::min<int64_t>(CodeBits(w.kind), 4);
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << count) - 1U), w.levels);
}

// Sixteen zero points from element `at` on, as offset - zero point.
ONNXQ_INLINE inline __m512i Zeros(const QuantWeights& w, int64_t at) {
  const __m512i zero =
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zero_points + at)));
  return _mm512_sub_epi32(_mm512_set1_epi32(w.offset), zero);
}

}  // namespace
}  // namespace onnxq
