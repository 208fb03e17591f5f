// AVX-512 F, BW, VL: 64 elements a step, the tail under a mask.
#include <immintrin.h>

#include "dynamic_quantize_per_token.h"
#include "per_token_scalar.h"

namespace onnxq {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kStep = 4 * kLanes;

__m512 Load16(const float* x) { return _mm512_loadu_ps(x); }
__m512 Load16(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
__m512 Load16(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
__m512 Load16(const uint16_t* x, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}

// The lanes of the 16 from i on that lie within the row.
__mmask16 Remaining(int64_t i, int64_t k) {
  const int64_t left = k - i;
  return left >= kLanes ? __mmask16{0xffff} : static_cast<__mmask16>((1U << left) - 1U);
}

// Without the sign bit, patterns order as signed integers do.
__m512i MaxAbs(__m512i max, __m512 x) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(kAbsMask));
  return _mm512_max_epi32(max, _mm512_and_si512(_mm512_castps_si512(x), mask));
}

template <class T>
uint32_t MaxAbsBits(const T* x, int64_t k) {
  __m512i m0 = _mm512_setzero_si512();
  __m512i m1 = m0;
  __m512i m2 = m0;
  __m512i m3 = m0;
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    m0 = MaxAbs(m0, Load16(x + i));
    m1 = MaxAbs(m1, Load16(x + i + kLanes));
    m2 = MaxAbs(m2, Load16(x + i + 2 * kLanes));
    m3 = MaxAbs(m3, Load16(x + i + 3 * kLanes));
  }
  for (; i < k; i += kLanes) m0 = MaxAbs(m0, Load16(x + i, Remaining(i, k)));
  const __m512i max = _mm512_max_epi32(_mm512_max_epi32(m0, m1), _mm512_max_epi32(m2, m3));
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(max));
}

__m128i Quantize16(__m512 x, __m512 factor) {
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
}

template <class T>
void QuantizeRow(const T* x, int64_t k, float factor, int8_t* q) {
  const __m512 factors = _mm512_set1_ps(factor);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), Quantize16(Load16(x + i), factors));
  }
  if (i < k) {
    const __mmask16 mask = Remaining(i, k);
    _mm_mask_storeu_epi8(q + i, mask, Quantize16(Load16(x + i, mask), factors));
  }
}

template <class T>
void QuantizeRows(const T* x, int64_t rows, int64_t k, int8_t* q, float* scale) {
  for (int64_t row = 0; row < rows; ++row, x += k, q += k) {
    const RowScale s = ScaleOfRow(MaxAbsBits(x, k));
    scale[row] = s.scale;
    if (s.finite) {
      QuantizeRow(x, k, s.factor, q);
    } else {
      std::memset(q, 0, static_cast<size_t>(k));
    }
  }
}

}  // namespace

const PerTokenRows kPerTokenAvx512bw = {QuantizeRows<float>, QuantizeRows<uint16_t>};

}  // namespace onnxq
