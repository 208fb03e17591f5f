// The row kernels of the integer-only operators, one set for each instruction set. All of it is
// integer arithmetic, so every set gives the same bits; the definitions state the meaning.
#pragma once

#include <cstdint>

namespace onnxq {

// Columns that are worked on at once: what lies between two steps stays in the first cache.
static constexpr int64_t kIntegerBlock = 256;

// A bias and a dyadic factor for each column of a block.
struct ColumnFactors {
  const int32_t* bias;
  const int32_t* multiplier;
  const int32_t* shift;
  bool one_shift;  // all are shift[0]
};

// x * multiplier / 2^shift, halves up, plus zero_point, within low..high.
struct Rescale {
  int32_t multiplier;
  int32_t shift;
  int32_t zero_point;
  int32_t low;
  int32_t high;
};

// z = p[0]; z = (z * x >> s[i]) + p[i + 1].
struct Polynomial {
  int32_t p[5];
  int32_t s[4];
};

// The bits of a multiplier that a float32 has no room for.
static constexpr int32_t kMultiplierLow = 0x7F;

struct ExpConstants {
  int32_t ln2;
  Polynomial polynomial;
  int32_t multiplier;
  int32_t shift;
  int32_t one;       // exp(0)
  bool float_exact;  // of IsPlainSquare polynomials; see FloatIsExact in integer_attributes.cc
};

struct ErfConstants {
  int32_t bound;
  Polynomial polynomial;
  int32_t shift;
};

struct SoftmaxConstants {
  ExpConstants exp;
  int32_t bits;
  int32_t rounding;
};

struct NormConstants {
  int32_t shift;
  int64_t epsilon;
  int32_t out_shift;
  int32_t low;
  int32_t high;
};

struct IntegerKernels {
  // out = clip(round((x + bias) * factor), low, high) for n <= kIntegerBlock columns.
  void (*rescale_columns)(const int32_t* x, const ColumnFactors& factors, int64_t n, int32_t low,
                          int32_t high, int32_t* out);
  // The same plus zero_point, written in `bytes` (1 or 2) a column, modulo 2^8 or 2^16.
  void (*requantize)(const int32_t* x, const ColumnFactors& factors, int64_t n, int32_t zero_point,
                     int32_t low, int32_t high, int bytes, void* out);
  void (*rescale)(const int32_t* x, int64_t n, const Rescale& how, int32_t* out);
  void (*exponential)(const int32_t* x, int64_t n, const ExpConstants& constants, int32_t* out);
  void (*erf)(const int32_t* x, int64_t n, const ErfConstants& constants, int32_t* out);
  // GELU of n <= kIntegerBlock columns: rescaled within 32767, times erf + one, rescaled, in
  // `bytes`.
  void (*gelu)(const int32_t* x, const ColumnFactors& factors, int64_t n,
               const ErfConstants& constants, int32_t one, const Rescale& how, int bytes,
               void* out);
  // out = x * sigmoid(x) * 2^15 for |x| <= 32767.
  void (*silu)(const int32_t* x, int64_t n, const ExpConstants& constants, int32_t* out);
  // Rows with one mask: x [rows, n] and mask (or null) [n] i32 -> out [rows, n] u8; buffer [n].
  void (*softmax)(const int32_t* x, const int32_t* mask, int64_t rows, int64_t n,
                  const SoftmaxConstants& constants, int32_t* buffer, uint8_t* out);
  // One row: x [n] i16 -> out [n] i16; buffer [n]; beta null for RMSNorm, which takes no mean off.
  void (*norm)(const int16_t* x, int64_t n, const int32_t* multiplier, const int64_t* beta,
               const NormConstants& constants, int32_t* buffer, int16_t* out);
  void (*widen8)(const int8_t* x, int64_t n, int32_t* out);
  void (*widen16)(const int16_t* x, int64_t n, int32_t* out);
  void (*narrow8)(const int32_t* x, int64_t n, void* out);  // modulo 2^8: i8 or u8
  void (*narrow16)(const int32_t* x, int64_t n, int16_t* out);
  void (*add)(const int32_t* a, const int32_t* b, int64_t n, int32_t low, int32_t high,
              int16_t* out);
};

extern const IntegerKernels kIntegerScalar;
#if defined(__x86_64__)
extern const IntegerKernels kIntegerAvx2;
extern const IntegerKernels kIntegerAvx512bw;
// IntegerKernels::softmax for AVX-512; its reach: exp(0) from 2^14 + 1 to 2^15 - 1.
void Softmax512(const int32_t* x, const int32_t* mask, int64_t rows, int64_t n,
                const SoftmaxConstants& constants, int32_t* buffer, uint8_t* out);
#endif

// The largest integer whose square is at most x; 0 for negative x.
int64_t IntegerRoot(int64_t x);

}  // namespace onnxq
