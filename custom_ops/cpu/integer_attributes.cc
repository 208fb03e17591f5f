// Attributes of the integer-only operators, checked once, and what the operators share.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "integer_ops.h"
#include "isa.h"

namespace onnxq {
namespace {

constexpr int64_t kInt32Reach = int64_t{1} << 31;
constexpr int64_t kFloatReach = int64_t{1} << 24;  // integers below are exact in float32

// x rounded towards 0 to the 24 bits of a float32.
int64_t TruncateToFloat(int64_t x) {
  int64_t unit = 1;
  while (x / unit >= kFloatReach) unit *= 2;
  return x / unit * unit;
}

// Whether float32, rounding towards 0, gives floor(z * multiplier / 2^(shift - 1)) for a value z of
// the polynomial, with the multiplier in two parts of 24 and 7 bits: z * low is rounded, then
// z * high is added; the second rounding keeps the integer part. From 1 on, so that its exponent
// has room for the halvings.
bool FloatIsExact(int64_t z, const ExpConstants& c) {
  const int64_t low = c.multiplier & kMultiplierLow;
  const int64_t sum = z * (c.multiplier - low) + TruncateToFloat(z * low);
  const int64_t product = z * c.multiplier >> (c.shift - 1);
  return z < kFloatReach && product > 0 && sum >> (c.shift - 1) == product;
}

}  // namespace

void IntegerAttributes::Refuse(const std::string& cause) {
  if (status_ == nullptr) status_ = Error(api_, op_, cause);
}

int64_t IntegerAttributes::Get(const char* name, int64_t low, int64_t high) {
  int64_t value = 0;
  if (status_ != nullptr) return low;
  status_ = api_.KernelInfoGetAttribute_int64(info_, name, &value);
  if (status_ == nullptr && (value < low || value > high))
    Refuse(std::string(name) + " = " + std::to_string(value) + " is not from " +
           std::to_string(low) + " to " + std::to_string(high));
  // What is refused is read on, with a number that nothing overflows with.
  return status_ == nullptr ? value : low;
}

Polynomial IntegerAttributes::GetPolynomial(int32_t extent, int64_t limit, bool positive) {
  static constexpr std::array<const char*, 5> kCoefficients = {"p4", "p3", "p2", "p1", "p0"};
  static constexpr std::array<const char*, 4> kShifts = {"s3", "s2", "s1", "s0"};
  Polynomial f{};
  for (size_t i = 0; i < 5; ++i) f.p[i] = Get32(kCoefficients[i]);
  for (size_t i = 0; i < 4; ++i) f.s[i] = Get32(kShifts[i], 0, 31);
  if (status_ != nullptr) return f;
  for (int64_t x = -extent; x <= 0; ++x) {
    int64_t z = f.p[0];
    for (size_t i = 0; i < 4; ++i) {
      const int64_t product = z * x;
      z = (product >> f.s[i]) + f.p[i + 1];
      if (std::abs(product) >= kInt32Reach || std::abs(z) >= kInt32Reach) {
        Refuse("the polynomial leaves 32 bits at " + std::to_string(x));
        return f;
      }
    }
    if (std::abs(z) >= limit || (positive && z < 0)) {
      Refuse("the polynomial is " + std::to_string(z) + " at " + std::to_string(x));
      return f;
    }
  }
  return f;
}

ExpConstants IntegerAttributes::GetExp(const char* multiplier, const char* shift) {
  ExpConstants c{};
  c.ln2 = Get32("ln2", 1, 1 << 16);
  c.multiplier = Get32(multiplier, 1);
  c.shift = Get32(shift, 14, 46);
  if (status_ != nullptr) return c;
  c.polynomial = GetPolynomial(c.ln2 - 1, int64_t{1} << 30, true);
  if (status_ != nullptr) return c;
  c.float_exact = std::abs(int64_t{c.polynomial.p[3]}) < kFloatReach / 2 &&
                  std::abs(int64_t{c.polynomial.p[4]}) < kFloatReach;
  for (int64_t x = 1 - int64_t{c.ln2}; x <= 0; ++x) {
    int64_t z = c.polynomial.p[0];
    for (size_t i = 0; i < 4; ++i) z = (z * x >> c.polynomial.s[i]) + c.polynomial.p[i + 1];
    const int64_t y = (z * c.multiplier + (int64_t{1} << (c.shift - 1))) >> c.shift;
    if (y > 32767 || z >> (c.shift - 14) >= int64_t{1} << 32) {
      Refuse("exp(" + std::to_string(x) + ") is " + std::to_string(y) + ", above 32767");
      return c;
    }
    c.float_exact = c.float_exact && FloatIsExact(z, c);
    c.one = static_cast<int32_t>(y);
  }
  return c;
}

ErfConstants IntegerAttributes::GetErf(int32_t* largest) {
  ErfConstants c{};
  c.bound = Get32("bound", 1, 1 << 15);
  c.shift = Get32("erf_shift", 0, 31);
  if (status_ != nullptr) return c;
  c.polynomial = GetPolynomial(c.bound, int64_t{1} << 31, false);
  int64_t most = 0;
  for (int64_t x = -c.bound; status_ == nullptr && x <= 0; ++x) {
    int64_t z = c.polynomial.p[0];
    for (size_t i = 0; i < 4; ++i) z = (z * x >> c.polynomial.s[i]) + c.polynomial.p[i + 1];
    most = std::max(most, (std::abs(z) >> c.shift) + 1);
  }
  *largest = static_cast<int32_t>(std::min<int64_t>(most, INT32_MAX));
  return c;
}

int64_t IntegerRoot(int64_t x) {
  if (x <= 0) return 0;
  auto root = static_cast<int64_t>(std::sqrt(static_cast<double>(x)));
  while (root * root > x) --root;
  while ((root + 1) * (root + 1) <= x) ++root;
  return root;
}

ort::OrtStatus* SelectIntegerKernels(const Api& api, const char* op,
                                     const IntegerKernels** kernels) {
  Isa isa;
  std::string error;
  if (!SelectIsa(&isa, &error)) return Error(api, op, error);
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512vnni:
    case Isa::kAvx512bw:
      *kernels = &kIntegerAvx512bw;
      return nullptr;
    case Isa::kAvx2:
      *kernels = &kIntegerAvx2;
      return nullptr;
#endif
    default:
      *kernels = &kIntegerScalar;
      return nullptr;
  }
}

int64_t CountElements(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1},
                         [](int64_t a, int64_t b) { return a * b; });
}

ort::OrtStatus* InferLike(const Api& api, ort::OrtShapeInferContext* context, size_t index,
                          ElementType type) {
  SymbolicShape shape;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, index, &shape));
  // Rank 0 also stands for "not known yet".
  if (shape.dims.empty()) return nullptr;
  return SetOutputShape(api, context, 0, type, shape);
}

ort::OrtStatus* InferTypedBy(const Api& api, ort::OrtShapeInferContext* context, size_t typed_by) {
  SymbolicShape typed;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, typed_by, &typed));
  return InferLike(api, context, 0, typed.type);
}

}  // namespace onnxq
