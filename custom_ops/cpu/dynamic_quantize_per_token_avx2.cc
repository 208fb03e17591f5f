// AVX2 and F16C: 32 elements a step, the tail one at a time.
#include <immintrin.h>

#include "dynamic_quantize_per_token.h"
#include "per_token_scalar.h"

namespace onnxq {
namespace {

constexpr int64_t kStep = 32;

__m256 Load8(const float* x) { return _mm256_loadu_ps(x); }
__m256 Load8(const uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

__m256i AbsBits8(__m256 x) {
  return _mm256_and_si256(_mm256_castps_si256(x),
                          _mm256_set1_epi32(static_cast<int32_t>(kAbsMask)));
}

// Without the sign bit, patterns order as signed integers do.
uint32_t MaxOfLanes(__m256i v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

template <class T>
uint32_t MaxAbsBits(const T* x, int64_t k) {
  __m256i m0 = _mm256_setzero_si256();
  __m256i m1 = m0;
  __m256i m2 = m0;
  __m256i m3 = m0;
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    m0 = _mm256_max_epi32(m0, AbsBits8(Load8(x + i)));
    m1 = _mm256_max_epi32(m1, AbsBits8(Load8(x + i + 8)));
    m2 = _mm256_max_epi32(m2, AbsBits8(Load8(x + i + 16)));
    m3 = _mm256_max_epi32(m3, AbsBits8(Load8(x + i + 24)));
  }
  uint32_t max_bits =
      MaxOfLanes(_mm256_max_epi32(_mm256_max_epi32(m0, m1), _mm256_max_epi32(m2, m3)));
  for (; i < k; ++i) {
    const uint32_t bits = AbsBits(ToFloat(x[i]));
    max_bits = bits > max_bits ? bits : max_bits;
  }
  return max_bits;
}

template <class T>
__m256i Round8(const T* x, __m256 factor) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(Load8(x), factor));
}

template <class T>
void QuantizeRow(const T* x, int64_t k, float factor, int8_t* q) {
  const __m256 factors = _mm256_set1_ps(factor);
  // The packs interleave 128-bit halves; this puts the eight groups of four back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    const __m256i low = _mm256_packs_epi32(Round8(x + i, factors), Round8(x + i + 8, factors));
    const __m256i high =
        _mm256_packs_epi32(Round8(x + i + 16, factors), Round8(x + i + 24, factors));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i),
                        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
  }
  for (; i < k; ++i) q[i] = QuantizeOne(ToFloat(x[i]), factor);
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

const PerTokenRows kPerTokenAvx2 = {QuantizeRows<float>, QuantizeRows<uint16_t>};

}  // namespace onnxq
