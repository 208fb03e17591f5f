// The integer softmax for AVX-512, 64 columns at a time. Between the exponential and the output the
// numbers have 16 bits, 32 of them in a vector, in the order in which packing leaves them.
#include <immintrin.h>

#include <cmath>

#include "integer_loops_generic.h"

namespace onnxq {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 4 * kLanes;
constexpr __mmask16 kOdd = 0xAAAA;
constexpr int kTowardsZero = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

__m512i OddOf(__m512i v) { return _mm512_srli_epi64(v, 32); }

// The upper halves of the products of unsigned numbers.
__m512i MultiplyHigh(__m512i a, __m512i b) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(OddOf(a), b);
  return _mm512_mask_blend_epi32(kOdd, OddOf(even), odd);
}

// Twice the exponential, rounded down, in integers: what ExpOf computes before it rounds. Distances
// come with 13 * ln2 added: the quotient by ln2 is then the count of the last shift but one.
template <bool plain>
struct DoubledExp {
  __m512i raise_by;
  __m512i ln2;
  __m512i multiplier;
  __m512i p[5];
  __m128i s[4];
  __m128i raise;
  __m512 inverse;
  __m512 half_inverse;

  explicit DoubledExp(const ExpConstants& c)
      : raise_by(_mm512_set1_epi32(13 * c.ln2)),
        ln2(_mm512_set1_epi32(c.ln2)),
        multiplier(_mm512_set1_epi32(c.multiplier)),
        raise(_mm_cvtsi32_si128(46 - c.shift)),
        inverse(_mm512_set1_ps(1.0F / static_cast<float>(c.ln2))),
        half_inverse(_mm512_set1_ps(0.5F / static_cast<float>(c.ln2))) {
    for (int i = 0; i < 5; ++i) p[i] = _mm512_set1_epi32(c.polynomial.p[i]);
    for (int i = 0; i < 4; ++i) s[i] = _mm_cvtsi32_si128(c.polynomial.s[i]);
  }

  __m512i Of(__m512i d, __m512i most) const {
    const __m512i raised = _mm512_sub_epi32(_mm512_add_epi32(most, raise_by), d);
    const __m512 quotient = _mm512_fmadd_ps(_mm512_cvtepi32_ps(raised), inverse, half_inverse);
    const __m512i places = _mm512_cvttps_epi32(quotient);
    const __m512i r = _mm512_sub_epi32(_mm512_mullo_epi32(places, ln2), raised);
    __m512i z;
    if constexpr (plain) {
      z = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_add_epi32(r, p[3]), r), p[4]);
    } else {
      z = p[0];
      for (int i = 0; i < 4; ++i)
        z = _mm512_add_epi32(_mm512_sra_epi32(_mm512_mullo_epi32(z, r), s[i]), p[i + 1]);
    }
    // A count of 32 and more gives 0.
    return _mm512_srlv_epi32(MultiplyHigh(_mm512_sll_epi32(z, raise), multiplier), places);
  }
};

// The same in float32, where ExpConstants::float_exact says that it is exact: up to the polynomial
// all are integers below 2^24; the product is rounded towards 0 twice: its integer part is kept.
struct DoubledExpFloat {
  __m512 ln2;
  __m512 inverse;
  __m512 p1;
  __m512 p0;
  __m512 high;
  __m512 low;

  explicit DoubledExpFloat(const ExpConstants& c)
      : ln2(_mm512_set1_ps(static_cast<float>(c.ln2))),
        inverse(_mm512_set1_ps(std::nextafter(-1.0F / static_cast<float>(c.ln2), -1.0F))),
        p1(_mm512_set1_ps(static_cast<float>(c.polynomial.p[3]))),
        p0(_mm512_set1_ps(static_cast<float>(c.polynomial.p[4]))),
        high(Part(c.multiplier & ~kMultiplierLow, c.shift)),
        low(Part(c.multiplier & kMultiplierLow, c.shift)) {}

  static __m512 Part(int32_t multiplier, int32_t shift) {
    const auto unit = static_cast<float>(int64_t{1} << (shift - 1));
    return _mm512_set1_ps(static_cast<float>(multiplier) / unit);
  }

  __m512i Of(__m512i d, __m512i most) const {
    const __m512 x = _mm512_cvtepi32_ps(_mm512_sub_epi32(d, most));
    // 2^23 + halvings: there float32 has integers alone, so that rounding is what divides. 1 / ln2
    // is too large by less than 2^-22, and a quotient is at most 30.
    const __m512 magic = _mm512_set1_ps(8388608.0F);
    const __m512 raised = _mm512_fmadd_round_ps(x, inverse, magic, kTowardsZero);
    const __m512 r = _mm512_fmadd_ps(_mm512_sub_ps(raised, magic), ln2, x);
    const __m512 z = _mm512_fmadd_ps(_mm512_add_ps(r, p1), r, p0);
    const __m512 rest = _mm512_mul_round_ps(z, low, kTowardsZero);
    const __m512 y = _mm512_fmadd_round_ps(z, high, rest, kTowardsZero);
    // Divided by 2^halvings in the exponent; the rest of `raised` is shifted out.
    const __m512i halvings = _mm512_slli_epi32(_mm512_castps_si512(raised), 23);
    const __m512i shifted = _mm512_sub_epi32(_mm512_castps_si512(y), halvings);
    return _mm512_cvttps_epi32(_mm512_castsi512_ps(shifted));
  }
};

// The scores of one row; beyond its end they are the lowest number.
struct Scores {
  const int32_t* x;
  const int32_t* mask;
  int64_t n;

  __m512i At(int64_t i) const {
    const __m512i d = _mm512_loadu_si512(x + i);
    return mask == nullptr ? d : _mm512_add_epi32(d, _mm512_loadu_si512(mask + i));
  }

  __mmask16 Valid(int64_t i) const {
    return static_cast<__mmask16>((1U << std::clamp<int64_t>(n - i, 0, kLanes)) - 1);
  }

  __m512i AtEnd(int64_t i) const {
    const __mmask16 valid = Valid(i);
    const __m512i d = _mm512_mask_loadu_epi32(_mm512_set1_epi32(INT32_MIN), valid, x + i);
    if (mask == nullptr) return d;
    return _mm512_mask_add_epi32(d, valid, d, _mm512_maskz_loadu_epi32(valid, mask + i));
  }

  int32_t Largest() const {
    __m512i most = _mm512_set1_epi32(INT32_MIN);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) most = _mm512_max_epi32(most, At(i));
    if (i < n) most = _mm512_max_epi32(most, AtEnd(i));
    return _mm512_reduce_max_epi32(most);
  }
};

// The exponentials of 64 columns in 16 bits each to `to`, from twice as much; returns sums of four.
template <class Doubled>
inline __m512i ExpBlock(const Doubled& doubled, int32_t* to) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi16(1);
  const auto pair = [&](int64_t i) {
    // Halves are rounded up by the mean with 0.
    return _mm512_avg_epu16(_mm512_packus_epi32(doubled(i), doubled(i + kLanes)), zero);
  };
  const __m512i a = pair(0);
  const __m512i b = pair(2 * kLanes);
  _mm512_storeu_si512(to, a);
  _mm512_storeu_si512(to + kLanes, b);
  return _mm512_add_epi32(_mm512_madd_epi16(a, ones), _mm512_madd_epi16(b, ones));
}

template <class Exp>
inline int64_t ExpRow(const Exp& exp, const Scores& scores, int32_t largest, int32_t ln2,
                      int32_t* to) {
  const __m512i most = _mm512_set1_epi32(largest);
  const __m512i lowest = _mm512_set1_epi32(LowestOf(largest, ln2));
  const auto doubled = [&](__m512i d) { return exp.Of(_mm512_max_epi32(d, lowest), most); };
  int64_t sum = 0;
  for (int64_t first = 0; first < scores.n; first += 65536) {
    const int64_t end = std::min<int64_t>(scores.n, first + 65536);
    __m512i part = _mm512_setzero_si512();
    int64_t i = first;
    for (; i + kBlock <= end; i += kBlock) {
      const auto of = [&](int64_t k) { return doubled(scores.At(i + k)); };
      part = _mm512_add_epi32(part, ExpBlock(of, to + i / 2));
    }
    if (i < end) {
      const auto of = [&](int64_t k) {
        return _mm512_maskz_mov_epi32(scores.Valid(i + k), doubled(scores.AtEnd(i + k)));
      };
      part = _mm512_add_epi32(part, ExpBlock(of, to + i / 2));
    }
    sum += static_cast<uint32_t>(_mm512_reduce_add_epi32(part));
  }
  return sum;
}

// e * factor / 2^(32 - bits) of 16-bit numbers, from the product's upper 16 bits. A sum that leaves
// them stands for a result above the largest, which saturation gives.
struct Quotients {
  __m512i upper;
  __m512i lower;
  __m512i half;
  __m128i places;

  Quotients(int64_t factor, const SoftmaxConstants& c)
      : upper(_mm512_set1_epi16(static_cast<int16_t>(factor >> 16))),
        lower(_mm512_set1_epi16(static_cast<int16_t>(factor))),
        half(_mm512_set1_epi16(static_cast<int16_t>(c.rounding << (15 - c.bits)))),
        places(_mm_cvtsi32_si128(16 - c.bits)) {}

  __m512i Of(const int32_t* from) const {
    const __m512i e = _mm512_loadu_si512(from);
    const __m512i product =
        _mm512_add_epi16(_mm512_mullo_epi16(e, upper), _mm512_mulhi_epu16(e, lower));
    return _mm512_srl_epi16(_mm512_adds_epu16(product, half), places);
  }

  // 64 columns, in order again.
  __m512i Bytes(const int32_t* from) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i packed = _mm512_packus_epi16(Of(from), Of(from + kLanes));
    return _mm512_permutexvar_epi32(order, packed);
  }
};

// One row of outputs from exponentials.
inline void QuotientRow(const int32_t* e, int64_t n, int64_t sum, const SoftmaxConstants& c,
                        uint8_t* out) {
  // Exact: the quotient of 2^32 by an integer is no closer to an integer than float64 can tell.
  const Quotients quotients(static_cast<int64_t>(4294967296.0 / static_cast<double>(sum)), c);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) _mm512_storeu_si512(out + i, quotients.Bytes(e + i / 2));
  if (i < n) {
    const __mmask64 valid = (uint64_t{1} << (n - i)) - 1;
    _mm512_mask_storeu_epi8(out + i, valid, quotients.Bytes(e + i / 2));
  }
}

// Short rows go in groups, step by step: a row alone waits for its maximum, its sum and a division.
constexpr int64_t kGroup = 16;
constexpr int64_t kNear = 2048;

template <class Exp>
void SoftmaxRows(const int32_t* x, const int32_t* mask, int64_t rows, int64_t n,
                 const SoftmaxConstants& c, int32_t* buffer, uint8_t* out) {
  const Exp exp(c.exp);
  int32_t near[kNear];
  const int64_t width = (n + kBlock - 1) / kBlock * kBlock / 2;
  int32_t* const e = width <= kNear ? near : buffer;
  const int64_t group = std::clamp<int64_t>(kNear / width, 1, kGroup);
  int32_t largest[kGroup];
  int64_t sums[kGroup];
  for (int64_t first = 0; first < rows; first += group) {
    const int64_t count = std::min(group, rows - first);
    const auto row = [&](int64_t k) { return Scores{x + (first + k) * n, mask, n}; };
    for (int64_t k = 0; k < count; ++k) largest[k] = row(k).Largest();
    for (int64_t k = 0; k < count; ++k)
      sums[k] = ExpRow(exp, row(k), largest[k], c.exp.ln2, e + k * width);
    for (int64_t k = 0; k < count; ++k)
      QuotientRow(e + k * width, n, sums[k], c, out + (first + k) * n);
  }
}

}  // namespace

void Softmax512(const int32_t* x, const int32_t* mask, int64_t rows, int64_t n,
                const SoftmaxConstants& c, int32_t* buffer, uint8_t* out) {
  const bool plain = IsPlainSquare(c.exp.polynomial);
  const auto softmax = plain && c.exp.float_exact ? SoftmaxRows<DoubledExpFloat>
                       : plain                    ? SoftmaxRows<DoubledExp<true>>
                                                  : SoftmaxRows<DoubledExp<false>>;
  softmax(x, mask, rows, n, c, buffer, out);
}

}  // namespace onnxq
