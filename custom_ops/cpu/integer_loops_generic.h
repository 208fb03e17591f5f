// The row kernels as plain loops, included by one file for each instruction set: the compiler turns
// them into that set's instructions. Everything here has internal linkage.
#pragma once

#include <algorithm>
#include <cstdint>

#include "integer_loops.h"

namespace onnxq {
namespace {

// Products and sums modulo 2^32, without undefined behaviour.
inline int32_t Multiply32(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}
inline int32_t Add32(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

// x / 2^shift, halves up, |x| < 2^62. Shifted as an unsigned number: AVX2 has no other.
inline int64_t RoundShift(int64_t x, int32_t shift) {
  constexpr uint64_t kOffset = uint64_t{1} << 62;
  const uint64_t half = uint64_t{1} << (shift - 1);
  const uint64_t raised = static_cast<uint64_t>(x) + half + kOffset;
  return static_cast<int64_t>((raised >> shift) - (kOffset >> shift));
}

inline int32_t Clip(int64_t x, int32_t low, int32_t high) {
  return static_cast<int32_t>(x < low ? low : x > high ? high : x);
}

inline void RescaleColumns(const int32_t* __restrict x, const ColumnFactors& factors, int64_t n,
                           int32_t low, int32_t high, int32_t* __restrict out) {
  const int32_t* __restrict bias = factors.bias;
  const int32_t* __restrict multiplier = factors.multiplier;
  const int32_t* __restrict shift = factors.shift;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t total = Add32(x[i], bias[i]);
    out[i] = Clip(RoundShift(total * multiplier[i], shift[i]), low, high);
  }
}

inline void RescaleAll(const int32_t* __restrict x, int64_t n, const Rescale& how,
                       int32_t* __restrict out) {
  const Rescale h = how;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = RoundShift(static_cast<int64_t>(x[i]) * h.multiplier, h.shift);
    out[i] = Clip(y + h.zero_point, h.low, h.high);
  }
}

inline int32_t Horner(const Polynomial& f, int32_t x) {
  int32_t z = f.p[0];
  z = Add32(Multiply32(z, x) >> f.s[0], f.p[1]);
  z = Add32(Multiply32(z, x) >> f.s[1], f.p[2]);
  z = Add32(Multiply32(z, x) >> f.s[2], f.p[3]);
  return Add32(Multiply32(z, x) >> f.s[3], f.p[4]);
}

// What I-BERT's polynomials are: x * x + p[3] * x + p[4].
inline bool IsPlainSquare(const Polynomial& f) {
  return f.p[0] == 0 && f.p[1] == 0 && f.p[2] == 1 && f.s[2] == 0 && f.s[3] == 0;
}

template <bool plain>
inline int32_t Evaluate(const Polynomial& f, int32_t x) {
  if constexpr (plain) return Add32(Multiply32(Add32(x, f.p[3]), x), f.p[4]);
  return Horner(f, x);
}

// exp of -distance, 0 <= distance <= 30 * ln2. Two facts make it short. The quotient by ln2 is
// exact in float32: distance + 1/2 is exact, and no quotient by ln2 <= 2^16 comes closer to an
// integer than the error. And rounding halves up is shifting by one less, adding 1 and shifting
// by 1.
template <bool plain>
inline int32_t ExpOf(int32_t distance, const ExpConstants& c, float inverse) {
  const int32_t halvings = static_cast<int32_t>((static_cast<float>(distance) + 0.5F) * inverse);
  const int32_t r = Multiply32(halvings, c.ln2) - distance;
  const uint32_t z = static_cast<uint32_t>(Evaluate<plain>(c.polynomial, r)) << (46 - c.shift);
  const uint64_t product = uint64_t{z} * static_cast<uint32_t>(c.multiplier);
  const auto kept = static_cast<uint32_t>(product >> 32);
  return static_cast<int32_t>(((kept >> std::min(halvings + 13, 31)) + 1) >> 1);
}

template <bool plain>
inline void ExpLoop(const int32_t* __restrict x, int64_t n, const ExpConstants& constants,
                    int32_t* __restrict out) {
  const ExpConstants c = constants;
  const float inverse = 1.0F / static_cast<float>(c.ln2);
  const int32_t lowest = -30 * c.ln2;
  for (int64_t i = 0; i < n; ++i) out[i] = ExpOf<plain>(-std::clamp(x[i], lowest, 0), c, inverse);
}

inline void Exponential(const int32_t* x, int64_t n, const ExpConstants& c, int32_t* out) {
  IsPlainSquare(c.polynomial) ? ExpLoop<true>(x, n, c, out) : ExpLoop<false>(x, n, c, out);
}

template <bool plain>
inline int32_t ErfOf(int32_t x, const ErfConstants& c) {
  // As unsigned numbers: the magnitude of the lowest int32 is 2^31.
  const uint32_t magnitude = x < 0 ? 0U - static_cast<uint32_t>(x) : static_cast<uint32_t>(x);
  const auto bound = static_cast<uint32_t>(c.bound);
  const auto d = static_cast<int32_t>(magnitude < bound ? magnitude : bound) - c.bound;
  const int32_t z = Evaluate<plain>(c.polynomial, d);
  const int32_t signed_z = x > 0 ? z : x < 0 ? -z : 0;
  return signed_z >> c.shift;
}

template <bool plain>
inline void ErfLoop(const int32_t* __restrict x, int64_t n, const ErfConstants& constants,
                    int32_t* __restrict out) {
  const ErfConstants c = constants;
  for (int64_t i = 0; i < n; ++i) out[i] = ErfOf<plain>(x[i], c);
}

inline void Erf(const int32_t* x, int64_t n, const ErfConstants& c, int32_t* out) {
  IsPlainSquare(c.polynomial) ? ErfLoop<true>(x, n, c, out) : ErfLoop<false>(x, n, c, out);
}

template <bool plain>
inline void GeluLoop(const int32_t* __restrict x, int64_t n, const ErfConstants& constants,
                     int32_t one, int32_t* __restrict out) {
  const ErfConstants c = constants;
  for (int64_t i = 0; i < n; ++i) out[i] = Multiply32(x[i], ErfOf<plain>(x[i], c) + one);
}

inline void Gelu(const int32_t* x, int64_t n, const ErfConstants& c, int32_t one, int32_t* out) {
  IsPlainSquare(c.polynomial) ? GeluLoop<true>(x, n, c, one, out)
                              : GeluLoop<false>(x, n, c, one, out);
}

template <bool plain>
inline void SiluLoop(const int32_t* __restrict x, int64_t n, const ExpConstants& constants,
                     int32_t* __restrict out) {
  const ExpConstants c = constants;
  const float inverse = 1.0F / static_cast<float>(c.ln2);
  const int32_t reach = 30 * c.ln2;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = x[i] < 0 ? -x[i] : x[i];
    const int32_t e = ExpOf<plain>(magnitude < reach ? magnitude : reach, c, inverse);
    // Exact: a quotient of two such integers is no closer to another than float64 can tell.
    const auto upper = static_cast<int32_t>(1073709056.0 / static_cast<double>(32767 + e));
    out[i] = Multiply32(x[i], x[i] < 0 ? 32768 - upper : upper);
  }
}

inline void Silu(const int32_t* x, int64_t n, const ExpConstants& c, int32_t* out) {
  IsPlainSquare(c.polynomial) ? SiluLoop<true>(x, n, c, out) : SiluLoop<false>(x, n, c, out);
}

// The lowest value that is told apart from what lies 30 halvings below `most`.
inline int32_t LowestOf(int32_t most, int32_t ln2) {
  const int64_t lowest = int64_t{most} - 30 * int64_t{ln2};
  return static_cast<int32_t>(std::max<int64_t>(lowest, INT32_MIN));
}

template <bool plain>
inline void SoftmaxRow(const int32_t* __restrict x, const int32_t* __restrict mask, int64_t n,
                       const SoftmaxConstants& constants, int32_t* __restrict buffer,
                       uint8_t* __restrict out) {
  const ExpConstants c = constants.exp;
  int32_t most = INT32_MIN;
  if (mask != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] = Add32(x[i], mask[i]);
      most = std::max(most, buffer[i]);
    }
    x = buffer;
  } else {
    for (int64_t i = 0; i < n; ++i) most = std::max(most, x[i]);
  }
  const int32_t lowest = LowestOf(most, c.ln2);
  const float inverse = 1.0F / static_cast<float>(c.ln2);
  int64_t sum = 0;
  for (int64_t first = 0; first < n; first += 65536) {
    const int64_t end = std::min<int64_t>(n, first + 65536);
    uint32_t part = 0;
    for (int64_t i = first; i < end; ++i) {
      const auto distance = static_cast<int32_t>(static_cast<uint32_t>(most) -
                                                 static_cast<uint32_t>(std::max(x[i], lowest)));
      buffer[i] = ExpOf<plain>(distance, c, inverse);
      part += static_cast<uint32_t>(buffer[i]);
    }
    sum += part;
  }
  const auto factor = static_cast<uint32_t>((int64_t{1} << 32) / sum);
  const int32_t places = 31 - constants.bits;
  const auto rounding = static_cast<uint32_t>(constants.rounding);
  const uint32_t top = (1U << constants.bits) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t scaled = static_cast<uint32_t>(buffer[i]) * factor;
    out[i] = static_cast<uint8_t>(std::min(((scaled >> places) + rounding) >> 1, top));
  }
}

inline void Softmax(const int32_t* x, const int32_t* mask, int64_t rows, int64_t n,
                    const SoftmaxConstants& c, int32_t* buffer, uint8_t* out) {
  const bool plain = IsPlainSquare(c.exp.polynomial);
  for (int64_t row = 0; row < rows; ++row, x += n, out += n)
    plain ? SoftmaxRow<true>(x, mask, n, c, buffer, out)
          : SoftmaxRow<false>(x, mask, n, c, buffer, out);
}

// The mean, halves up, by sums of a block at a time: they fit into int32.
inline int32_t MeanOf(const int16_t* __restrict x, int64_t n) {
  int64_t sum = 0;
  for (int64_t first = 0; first < n; first += 32768) {
    const int64_t end = std::min<int64_t>(n, first + 32768);
    int32_t part = 0;
    for (int64_t i = first; i < end; ++i) part += x[i];
    sum += part;
  }
  const int64_t raised = 2 * sum + n;
  const int64_t quotient = raised / (2 * n);
  return static_cast<int32_t>(quotient - (raised % (2 * n) < 0 ? 1 : 0));
}

inline int64_t SumOfSquares(const int32_t* __restrict v, int64_t n, int32_t shift) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t coarse = v[i] >> shift;
    sum += int64_t{coarse} * coarse;
  }
  return sum;
}

// v * factor / 2, rounded down; |v| < 2^17 and the result is below 2^31.
inline void Normalize(int32_t* v, int64_t n, int64_t factor) {
  if (factor == int64_t{1} << 31) {  // does not fit into int32
    for (int64_t i = 0; i < n; ++i) v[i] = Multiply32(v[i], 1 << 30);
    return;
  }
  const auto narrow = static_cast<int32_t>(factor);
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<int32_t>((int64_t{v[i]} * narrow) >> 1);
}

inline void ScaleNormal(const int32_t* __restrict v, int64_t n,
                        const int32_t* __restrict multiplier, const int64_t* __restrict beta,
                        const NormConstants& constants, int16_t* __restrict out) {
  const NormConstants c = constants;
  const int64_t half = int64_t{1} << (c.out_shift - 1);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = int64_t{v[i]} * multiplier[i] + (beta == nullptr ? 0 : beta[i]) + half;
    out[i] = static_cast<int16_t>(Clip(y >> c.out_shift, c.low, c.high));
  }
}

inline void Norm(const int16_t* x, int64_t n, const int32_t* multiplier, const int64_t* beta,
                 const NormConstants& c, int32_t* buffer, int16_t* out) {
  const int32_t mean = beta == nullptr ? 0 : MeanOf(x, n);
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i] - mean;
  const int64_t squares = SumOfSquares(buffer, n, c.shift);
  const int64_t root = std::max<int64_t>(IntegerRoot(squares + c.epsilon), 1);
  Normalize(buffer, n, (int64_t{1} << 31) / (root << c.shift));
  ScaleNormal(buffer, n, multiplier, beta, c, out);
}

inline void Widen8(const int8_t* __restrict x, int64_t n, int32_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}

inline void Widen16(const int16_t* __restrict x, int64_t n, int32_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}

inline void Narrow8(const int32_t* __restrict x, int64_t n, void* out) {
  auto* __restrict bytes = static_cast<uint8_t*>(out);
  for (int64_t i = 0; i < n; ++i) bytes[i] = static_cast<uint8_t>(x[i]);
}

inline void Narrow16(const int32_t* __restrict x, int64_t n, int16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int16_t>(x[i]);
}

// Both are within 2^30.
inline void AddClipped(const int32_t* __restrict a, const int32_t* __restrict b, int64_t n,
                       int32_t low, int32_t high, int16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int16_t>(std::clamp(a[i] + b[i], low, high));
}

inline void GeluColumns(const int32_t* x, const ColumnFactors& factors, int64_t n,
                        const ErfConstants& constants, int32_t one, const Rescale& how, int bytes,
                        void* out) {
  int32_t t[kIntegerBlock];
  int32_t product[kIntegerBlock];
  RescaleColumns(x, factors, n, -32767, 32767, t);
  Gelu(t, n, constants, one, product);
  RescaleAll(product, n, how, t);
  bytes == 1 ? Narrow8(t, n, out) : Narrow16(t, n, static_cast<int16_t*>(out));
}

inline void RequantizeColumns(const int32_t* x, const ColumnFactors& factors, int64_t n,
                              int32_t zero_point, int32_t low, int32_t high, int bytes, void* out) {
  int32_t block[kIntegerBlock];
  RescaleColumns(x, factors, n, low - zero_point, high - zero_point, block);
  for (int64_t i = 0; i < n; ++i) block[i] += zero_point;
  bytes == 1 ? Narrow8(block, n, out) : Narrow16(block, n, static_cast<int16_t*>(out));
}

constexpr IntegerKernels kGenericLoops = {
    RescaleColumns, RequantizeColumns, RescaleAll, Exponential, Erf,     GeluColumns,
    Silu,           Softmax,           Norm,       Widen8,      Widen16, Narrow8,
    Narrow16,       AddClipped,
};

}  // namespace
}  // namespace onnxq
