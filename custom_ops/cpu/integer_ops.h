// The integer-only operators as ONNX Runtime sees them; defs/integer_*.py and defs/requantize.py
// state the meaning.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "integer_loops.h"
#include "op_kernel.h"

namespace onnxq {

// Reads the integer attributes of one node; the first that is missing or out of range stays as an
// error.
class IntegerAttributes {
 public:
  IntegerAttributes(const Api& api, const ort::OrtKernelInfo* info, const char* op)
      : api_(api), info_(info), op_(op) {}

  int64_t Get(const char* name, int64_t low, int64_t high);
  int32_t Get32(const char* name, int32_t low = INT32_MIN, int32_t high = INT32_MAX) {
    return static_cast<int32_t>(Get(name, low, high));
  }
  // p4 to p0 and s3 to s0; refuses what leaves int32 for some x from -extent to 0, or values whose
  // magnitude reaches `limit`.
  Polynomial GetPolynomial(int32_t extent, int64_t limit, bool positive);
  ExpConstants GetExp(const char* multiplier, const char* shift);
  ErfConstants GetErf(int32_t* largest);
  void Refuse(const std::string& cause);

  ort::OrtStatus* status() const { return status_; }

 private:
  const Api& api_;
  const ort::OrtKernelInfo* info_;
  const char* op_;
  ort::OrtStatus* status_ = nullptr;
};

// The kernels for the instruction set in use.
ort::OrtStatus* SelectIntegerKernels(const Api& api, const char* op,
                                     const IntegerKernels** kernels);

int64_t CountElements(const std::vector<int64_t>& shape);

// The output has the shape of input `index`, and `type`; or the type of input `typed_by`.
ort::OrtStatus* InferLike(const Api& api, ort::OrtShapeInferContext* context, size_t index,
                          ElementType type);
ort::OrtStatus* InferTypedBy(const Api& api, ort::OrtShapeInferContext* context, size_t typed_by);

// x, bias, multiplier, shift: what Requantize, IntegerGelu, IntegerSilu and IntegerAdd begin with.
class LinearInput {
 public:
  ort::OrtStatus* Read(const Api& api, const ort::OrtKernelContext* context, const char* op);
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t size() const { return size_; }
  int64_t columns() const { return columns_; }
  // Elements `first` to `first + n`, all of one row and at most a block, rescaled.
  void Rescale(const IntegerKernels& kernels, int64_t first, int64_t n, int32_t low, int32_t high,
               int32_t* out) const;
  // The same plus zero_point, written in `bytes` a column.
  void Requantize(const IntegerKernels& kernels, int64_t first, int64_t n, int32_t zero_point,
                  int32_t low, int32_t high, int bytes, void* out) const;
  // GELU of them, see IntegerKernels.
  void Gelu(const IntegerKernels& kernels, int64_t first, int64_t n, const ErfConstants& constants,
            int32_t one, const onnxq::Rescale& how, int bytes, void* out) const;
  // The end of the block that starts at `first`, not beyond `last`.
  int64_t BlockEnd(int64_t first, int64_t last) const;

 private:
  const int32_t* Factor(int which, int64_t column) const;
  ColumnFactors Factors(int64_t first) const;
  const int32_t* Widened(const IntegerKernels& kernels, int64_t first, int64_t n,
                         int32_t* buffer) const;

  std::vector<int64_t> shape_;
  int64_t size_ = 0;
  int64_t columns_ = 1;
  const int32_t* wide_ = nullptr;
  const int16_t* narrow_ = nullptr;
  std::array<const int32_t*, 3> factors_{};
  std::array<bool, 3> repeated_{};
  // A number for all columns, as often as a block is long.
  std::array<std::array<int32_t, kIntegerBlock>, 3> filled_;
};

#define ONNXQ_INTEGER_OP_BODY(Op)                                                            \
  static constexpr const char* kName = #Op;                                                  \
  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, Op* kernel); \
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);    \
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const;             \
                                                                                             \
 private:                                                                                    \
  const IntegerKernels* kernels_ = nullptr;

using LinearInputs = std::array<ElementType, 5>;
template <ElementType type>
inline constexpr LinearInputs kLinearInputs = {ElementType::kUndefined, ElementType::kInt32,
                                               ElementType::kInt32, ElementType::kInt32, type};

// x, bias, multiplier, shift, zero_point -> y of the type of zero_point.
template <ElementType type>
class Requantize {
 public:
  static constexpr LinearInputs kInputs = kLinearInputs<type>;
  static constexpr std::array<ElementType, 1> kOutputs = {type};
  ONNXQ_INTEGER_OP_BODY(Requantize)
  int32_t low_ = 0;
  int32_t high_ = 0;
};

template <ElementType type>
class IntegerGelu {
 public:
  static constexpr LinearInputs kInputs = kLinearInputs<type>;
  static constexpr std::array<ElementType, 1> kOutputs = {type};
  ONNXQ_INTEGER_OP_BODY(IntegerGelu)
  ErfConstants erf_{};
  int32_t one_ = 0;
  Rescale out_{};
};

template <ElementType type>
class IntegerSilu {
 public:
  static constexpr LinearInputs kInputs = kLinearInputs<type>;
  static constexpr std::array<ElementType, 1> kOutputs = {type};
  ONNXQ_INTEGER_OP_BODY(IntegerSilu)
  ExpConstants exp_{};
  Rescale out_{};
};

// a, bias, multiplier, shift, b, b_multiplier, b_shift -> y i16.
template <ElementType type>
class IntegerAdd {
 public:
  static constexpr std::array<ElementType, 7> kInputs = {
      ElementType::kUndefined, ElementType::kInt32, ElementType::kInt32, ElementType::kInt32, type,
      ElementType::kInt32,     ElementType::kInt32};
  static constexpr std::array<ElementType, 1> kOutputs = {ElementType::kInt16};
  ONNXQ_INTEGER_OP_BODY(IntegerAdd)
  int32_t low_ = 0;
  int32_t high_ = 0;
};

// indices, table, multiplier -> y i16.
template <ElementType type>
class IntegerEmbedding {
 public:
  static constexpr std::array<ElementType, 3> kInputs = {type, ElementType::kInt8,
                                                         ElementType::kInt32};
  static constexpr std::array<ElementType, 1> kOutputs = {ElementType::kInt16};
  ONNXQ_INTEGER_OP_BODY(IntegerEmbedding)
  Rescale how_{};
};

template <ElementType type>
class IntegerExp {
 public:
  static constexpr std::array<ElementType, 1> kInputs = {type};
  static constexpr std::array<ElementType, 1> kOutputs = {type};
  ONNXQ_INTEGER_OP_BODY(IntegerExp)
  ExpConstants exp_{};
};

template <ElementType type>
class IntegerErf {
 public:
  static constexpr std::array<ElementType, 1> kInputs = {type};
  static constexpr std::array<ElementType, 1> kOutputs = {type};
  ONNXQ_INTEGER_OP_BODY(IntegerErf)
  ErfConstants erf_{};
};

template <ElementType type>
class IntegerSqrt {
 public:
  static constexpr std::array<ElementType, 1> kInputs = {type};
  static constexpr std::array<ElementType, 1> kOutputs = {type};
  ONNXQ_INTEGER_OP_BODY(IntegerSqrt)
};

// x [..., S], mask -> y [..., S] u8.
template <ElementType type>
class IntegerSoftmax {
 public:
  static constexpr std::array<ElementType, 2> kInputs = {type, type};
  static constexpr std::array<ElementType, 1> kOutputs = {ElementType::kUint8};
  ONNXQ_INTEGER_OP_BODY(IntegerSoftmax)
  Allocator allocator_;
  SoftmaxConstants constants_{};
};

// x [..., D], multiplier [D], beta [D] -> y [..., D].
template <ElementType type>
class IntegerLayerNorm {
 public:
  static constexpr std::array<ElementType, 3> kInputs = {type, ElementType::kInt32,
                                                         ElementType::kInt64};
  static constexpr std::array<ElementType, 1> kOutputs = {type};
  ONNXQ_INTEGER_OP_BODY(IntegerLayerNorm)
  Allocator allocator_;
  NormConstants constants_{};
};

template <ElementType type>
class IntegerRmsNorm {
 public:
  static constexpr std::array<ElementType, 2> kInputs = {type, ElementType::kInt32};
  static constexpr std::array<ElementType, 1> kOutputs = {type};
  ONNXQ_INTEGER_OP_BODY(IntegerRmsNorm)
  Allocator allocator_;
  NormConstants constants_{};
};

#undef ONNXQ_INTEGER_OP_BODY

}  // namespace onnxq
