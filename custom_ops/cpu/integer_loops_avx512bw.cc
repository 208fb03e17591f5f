// The row kernels of the integer-only operators, for AVX-512: products of 32 by 32 bits are taken
// of the even and of the odd lanes, as the instruction set has them; the rest is left to the
// compiler.
#include <immintrin.h>

#include "integer_loops_generic.h"

namespace onnxq {
namespace {

constexpr int64_t kLanes = 16;
constexpr __mmask16 kOdd = 0xAAAA;

__mmask16 Tail(int64_t n) {
  return n >= kLanes ? static_cast<__mmask16>(0xFFFF) : static_cast<__mmask16>((1U << n) - 1);
}

__m512i Load(const int32_t* from, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, from); }

void Store(int32_t* to, __mmask16 mask, __m512i v) { _mm512_mask_storeu_epi32(to, mask, v); }

__m512i OddOf(__m512i v) { return _mm512_srli_epi64(v, 32); }

// The low halves of even and odd lanes' 64-bit numbers, in order.
__m512i Interleave(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi32(kOdd, even, _mm512_slli_epi64(odd, 32));
}

__m512i Clamp64(__m512i v, __m512i low, __m512i high) {
  return _mm512_max_epi64(_mm512_min_epi64(v, high), low);
}

// x * multiplier / 2^shift, halves up, of 64-bit lanes whose low halves count.
__m512i Scale64(__m512i x, __m512i multiplier, __m512i shift) {
  const __m512i one = _mm512_set1_epi64(1);
  const __m512i half = _mm512_sllv_epi64(one, _mm512_sub_epi64(shift, one));
  return _mm512_srav_epi64(_mm512_add_epi64(_mm512_mul_epi32(x, multiplier), half), shift);
}

// Calls part(i, mask) for vectors of n lanes, the last with a mask.
template <class Part>
inline void ForVectors(int64_t n, const Part& part) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) part(i, static_cast<__mmask16>(0xFFFF));
  if (i < n) part(i, Tail(n - i));
}

// x * multiplier / 2^shift of one shift for all, from 31 on: the results then have 32 bits.
struct OneShift {
  __m512i half;
  __m128i even;
  __m128i odd;
  bool high;  // the odd lanes' results come to lie in their upper halves

  static constexpr int32_t kLeast = 31;

  explicit OneShift(int32_t shift)
      : half(_mm512_set1_epi64(int64_t{1} << (shift - 1))),
        even(_mm_cvtsi32_si128(shift)),
        odd(_mm_cvtsi32_si128(shift >= 32 ? shift - 32 : shift)),
        high(shift >= 32) {}

  __m512i Of(__m512i x, __m512i multiplier, __m512i odd_multiplier) const {
    const __m512i p0 = _mm512_add_epi64(_mm512_mul_epi32(x, multiplier), half);
    const __m512i p1 = _mm512_add_epi64(_mm512_mul_epi32(OddOf(x), odd_multiplier), half);
    const __m512i y1 = _mm512_sra_epi64(p1, odd);
    return _mm512_mask_blend_epi32(kOdd, _mm512_sra_epi64(p0, even),
                                   high ? y1 : _mm512_slli_epi64(y1, 32));
  }
};

__m512i Clamp32(__m512i v, __m512i low, __m512i high) {
  return _mm512_max_epi32(_mm512_min_epi32(v, high), low);
}

__m512i TotalOf(const int32_t* x, const ColumnFactors& factors, int64_t i, __mmask16 mask) {
  return _mm512_add_epi32(Load(x + i, mask), Load(factors.bias + i, mask));
}

// Calls put(i, mask, y) with y = clip(round((x + bias) * factor), low, high).
template <class Put>
inline void ForRescaled(const int32_t* x, const ColumnFactors& factors, int64_t n, int32_t low,
                        int32_t high, const Put& put) {
  if (factors.one_shift && factors.shift[0] >= OneShift::kLeast) {
    const OneShift scale(factors.shift[0]);
    const __m512i lowest = _mm512_set1_epi32(low);
    const __m512i highest = _mm512_set1_epi32(high);
    ForVectors(n, [&](int64_t i, __mmask16 mask) {
      const __m512i multiplier = Load(factors.multiplier + i, mask);
      const __m512i y = scale.Of(TotalOf(x, factors, i, mask), multiplier, OddOf(multiplier));
      put(i, mask, Clamp32(y, lowest, highest));
    });
    return;
  }
  const __m512i lowest = _mm512_set1_epi64(low);
  const __m512i highest = _mm512_set1_epi64(high);
  const __m512i low_half = _mm512_set1_epi64(0xFFFFFFFF);
  ForVectors(n, [&](int64_t i, __mmask16 mask) {
    const __m512i total = TotalOf(x, factors, i, mask);
    const __m512i multiplier = Load(factors.multiplier + i, mask);
    const __m512i shift = Load(factors.shift + i, mask);
    const __m512i even = Scale64(total, multiplier, _mm512_and_si512(shift, low_half));
    const __m512i odd = Scale64(OddOf(total), OddOf(multiplier), OddOf(shift));
    put(i, mask, Interleave(Clamp64(even, lowest, highest), Clamp64(odd, lowest, highest)));
  });
}

void StoreNarrow(void* out, int64_t i, __mmask16 mask, __m512i y, int bytes) {
  if (bytes == 1)
    _mm512_mask_cvtepi32_storeu_epi8(static_cast<int8_t*>(out) + i, mask, y);
  else
    _mm512_mask_cvtepi32_storeu_epi16(static_cast<int16_t*>(out) + i, mask, y);
}

void RescaleColumns512(const int32_t* x, const ColumnFactors& factors, int64_t n, int32_t low,
                       int32_t high, int32_t* out) {
  ForRescaled(x, factors, n, low, high,
              [&](int64_t i, __mmask16 mask, __m512i y) { Store(out + i, mask, y); });
}

void Requantize512(const int32_t* x, const ColumnFactors& factors, int64_t n, int32_t zero_point,
                   int32_t low, int32_t high, int bytes, void* out) {
  const __m512i zero = _mm512_set1_epi32(zero_point);
  ForRescaled(x, factors, n, low - zero_point, high - zero_point,
              [&](int64_t i, __mmask16 mask, __m512i y) {
                StoreNarrow(out, i, mask, _mm512_add_epi32(y, zero), bytes);
              });
}

// Calls put(i, mask, y) with y = clip(round(v * factor) + zero_point, low, high).
template <class Get, class Put>
inline void ForScaled(int64_t n, const Rescale& how, const Get& get, const Put& put) {
  const __m512i multiplier = _mm512_set1_epi32(how.multiplier);
  if (how.shift >= OneShift::kLeast) {
    const OneShift scale(how.shift);
    const __m512i lowest = _mm512_set1_epi32(how.low - how.zero_point);
    const __m512i highest = _mm512_set1_epi32(how.high - how.zero_point);
    const __m512i zero_point = _mm512_set1_epi32(how.zero_point);
    ForVectors(n, [&](int64_t i, __mmask16 mask) {
      const __m512i y = Clamp32(scale.Of(get(i, mask), multiplier, multiplier), lowest, highest);
      put(i, mask, _mm512_add_epi32(y, zero_point));
    });
    return;
  }
  const __m512i lowest = _mm512_set1_epi64(how.low);
  const __m512i highest = _mm512_set1_epi64(how.high);
  const __m512i half = _mm512_set1_epi64(int64_t{1} << (how.shift - 1));
  const __m512i zero_point = _mm512_set1_epi64(how.zero_point);
  const __m128i shift = _mm_cvtsi32_si128(how.shift);
  const auto scale = [&](__m512i v) {
    const __m512i y =
        _mm512_sra_epi64(_mm512_add_epi64(_mm512_mul_epi32(v, multiplier), half), shift);
    return Clamp64(_mm512_add_epi64(y, zero_point), lowest, highest);
  };
  ForVectors(n, [&](int64_t i, __mmask16 mask) {
    const __m512i v = get(i, mask);
    put(i, mask, Interleave(scale(v), scale(OddOf(v))));
  });
}

void RescaleAll512(const int32_t* x, int64_t n, const Rescale& how, int32_t* out) {
  ForScaled(
      n, how, [&](int64_t i, __mmask16 mask) { return Load(x + i, mask); },
      [&](int64_t i, __mmask16 mask, __m512i y) { Store(out + i, mask, y); });
}

// x * (erf(x) + one), |x| <= 32767. Where x is 0 the product is, whatever erf.
template <bool plain>
inline __m512i GeluOf(__m512i x, const ErfConstants& c, int32_t one) {
  const __m512i bound = _mm512_set1_epi32(c.bound);
  const __m512i d = _mm512_sub_epi32(_mm512_min_epi32(_mm512_abs_epi32(x), bound), bound);
  const auto p = [&](int k) { return _mm512_set1_epi32(c.polynomial.p[k]); };
  __m512i z;
  if constexpr (plain) {
    z = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_add_epi32(d, p(3)), d), p(4));
  } else {
    z = p(0);
    for (int k = 0; k < 4; ++k) {
      const __m128i shift = _mm_cvtsi32_si128(c.polynomial.s[k]);
      z = _mm512_add_epi32(_mm512_sra_epi32(_mm512_mullo_epi32(z, d), shift), p(k + 1));
    }
  }
  const __m512i signed_z =
      _mm512_mask_sub_epi32(z, _mm512_movepi32_mask(x), _mm512_setzero_si512(), z);
  const __m512i e = _mm512_sra_epi32(signed_z, _mm_cvtsi32_si128(c.shift));
  return _mm512_mullo_epi32(x, _mm512_add_epi32(e, _mm512_set1_epi32(one)));
}

template <bool plain>
void GeluBlock512(const int32_t* x, const ColumnFactors& factors, int64_t n, const ErfConstants& c,
                  int32_t one, const Rescale& how, int bytes, void* out) {
  int32_t product[kIntegerBlock];
  ForRescaled(x, factors, n, -32767, 32767, [&](int64_t i, __mmask16 mask, __m512i t) {
    Store(product + i, mask, GeluOf<plain>(t, c, one));
  });
  ForScaled(
      n, how, [&](int64_t i, __mmask16 mask) { return Load(product + i, mask); },
      [&](int64_t i, __mmask16 mask, __m512i y) { StoreNarrow(out, i, mask, y, bytes); });
}

void Gelu512(const int32_t* x, const ColumnFactors& factors, int64_t n, const ErfConstants& c,
             int32_t one, const Rescale& how, int bytes, void* out) {
  IsPlainSquare(c.polynomial) ? GeluBlock512<true>(x, factors, n, c, one, how, bytes, out)
                              : GeluBlock512<false>(x, factors, n, c, one, how, bytes, out);
}

int64_t SumOfSquares512(const int32_t* v, int64_t n, int32_t shift) {
  const __m128i places = _mm_cvtsi32_si128(shift);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512i coarse = _mm512_sra_epi32(Load(v + i, Tail(n - i)), places);
    const __m512i odd = OddOf(coarse);
    sum = _mm512_add_epi64(sum, _mm512_mul_epi32(coarse, coarse));
    sum = _mm512_add_epi64(sum, _mm512_mul_epi32(odd, odd));
  }
  return _mm512_reduce_add_epi64(sum);
}

// clip(((v * factor / 2) * multiplier + beta) / 2^shift) for a factor below 2^31.
void NormalizeAndScale512(const int32_t* v, int64_t n, int32_t factor, const int32_t* multiplier,
                          const int64_t* beta, const NormConstants& c, int16_t* out) {
  const __m512i f = _mm512_set1_epi64(factor);
  const __m512i half = _mm512_set1_epi64(int64_t{1} << (c.out_shift - 1));
  const __m128i shift = _mm_cvtsi64_si128(c.out_shift);
  const __m512i lowest = _mm512_set1_epi64(c.low);
  const __m512i highest = _mm512_set1_epi64(c.high);
  // Even and odd columns of beta, which lies in two vectors.
  const __m512i even_of = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  const __m512i odd_of = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
  const auto scale = [&](__m512i value, __m512i m, __m512i b) {
    const __m512i normal = _mm512_srai_epi64(_mm512_mul_epi32(value, f), 1);
    const __m512i y = _mm512_add_epi64(_mm512_add_epi64(_mm512_mul_epi32(normal, m), b), half);
    return Clamp64(_mm512_sra_epi64(y, shift), lowest, highest);
  };
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 tail = Tail(n - i);
    const __m512i value = Load(v + i, tail);
    const __m512i m = Load(multiplier + i, tail);
    __m512i even_beta = _mm512_setzero_si512();
    __m512i odd_beta = even_beta;
    if (beta != nullptr) {
      const __m512i first = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(tail), beta + i);
      const __m512i second =
          _mm512_maskz_loadu_epi64(static_cast<__mmask8>(tail >> 8), beta + i + 8);
      even_beta = _mm512_permutex2var_epi64(first, even_of, second);
      odd_beta = _mm512_permutex2var_epi64(first, odd_of, second);
    }
    const __m512i y =
        Interleave(scale(value, m, even_beta), scale(OddOf(value), OddOf(m), odd_beta));
    _mm512_mask_cvtepi32_storeu_epi16(out + i, tail, y);
  }
}

void Norm512(const int16_t* x, int64_t n, const int32_t* multiplier, const int64_t* beta,
             const NormConstants& c, int32_t* buffer, int16_t* out) {
  const int32_t mean = beta == nullptr ? 0 : MeanOf(x, n);
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i] - mean;
  const int64_t squares = SumOfSquares512(buffer, n, c.shift);
  const int64_t root = std::max<int64_t>(IntegerRoot(squares + c.epsilon), 1);
  const int64_t factor = (int64_t{1} << 31) / (root << c.shift);
  if (factor == int64_t{1} << 31) {
    Normalize(buffer, n, factor);
    ScaleNormal(buffer, n, multiplier, beta, c, out);
    return;
  }
  NormalizeAndScale512(buffer, n, static_cast<int32_t>(factor), multiplier, beta, c, out);
}

constexpr IntegerKernels Vectorized() {
  IntegerKernels kernels = kGenericLoops;
  kernels.rescale_columns = RescaleColumns512;
  kernels.requantize = Requantize512;
  kernels.rescale = RescaleAll512;
  kernels.gelu = Gelu512;
  kernels.softmax = Softmax512;
  kernels.norm = Norm512;
  return kernels;
}

}  // namespace

const IntegerKernels kIntegerAvx512bw = Vectorized();

}  // namespace onnxq
