// The kernel classes of the CPU library, one template a operator, over the activations' dtype.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "integer_ops.h"
#include "op_kernel.h"
#include "packed_linear.h"
#include "quantize_block.h"

namespace onnxq {

struct HadamardKernels;
struct PerTokenRows;

// x: [..., K] -> q: [..., K] i8, scale: [..., 1] f32.
template <ElementType type>
class DynamicQuantizePerToken {
 public:
  static constexpr const char* kName = "DynamicQuantizePerToken";
  static constexpr std::array<ElementType, 1> kInputs = {type};
  static constexpr std::array<ElementType, 2> kOutputs = {ElementType::kInt8,
                                                          ElementType::kFloat32};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                DynamicQuantizePerToken* kernel);
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const;

 private:
  using T = std::conditional_t<type == ElementType::kFloat16, uint16_t, float>;
  const PerTokenRows* rows_ = nullptr;
};

// x: [..., K] times packed weights -> y: [..., N]; see defs/quant_mat_mul.py.
template <ElementType type>
class QuantMatMul {
 public:
  static constexpr const char* kName = "QuantMatMul";
  // x, codes, scales (of several types), zero_points, levels, bias, order.
  static constexpr std::array<ElementType, 7> kInputs = {type,
                                                         ElementType::kUint8,
                                                         ElementType::kUndefined,
                                                         ElementType::kInt8,
                                                         ElementType::kFloat32,
                                                         ElementType::kFloat32,
                                                         ElementType::kInt32};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                QuantMatMul* kernel);
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const;

 private:
  using T = std::conditional_t<type == ElementType::kFloat16, uint16_t, float>;
  PackedLinear linear_;
  bool order_checked_ = false;  // a constant of the model
};

// q: [..., K] i8 and q_scale: [..., 1] or [..., G] f32 times packed weights -> y: [..., N] f32; see
// defs/quant_mat_mul_int8.py.
template <ElementType type>
class QuantMatMulInt8 {
 public:
  static constexpr const char* kName = "QuantMatMulInt8";
  // q, q_scale, codes, scales (of several types), zero_points, levels, bias.
  static constexpr std::array<ElementType, 7> kInputs = {type,
                                                         ElementType::kFloat32,
                                                         ElementType::kUint8,
                                                         ElementType::kUndefined,
                                                         ElementType::kInt8,
                                                         ElementType::kFloat32,
                                                         ElementType::kFloat32};
  static constexpr std::array<ElementType, 1> kOutputs = {ElementType::kFloat32};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                QuantMatMulInt8* kernel);
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const;

 private:
  PackedLinear linear_;
};

// The same as QuantMatMul with columns of outliers in float; see defs/dynamic_quant_mat_mul.py.
template <ElementType type>
class DynamicQuantMatMul {
 public:
  static constexpr const char* kName = "DynamicQuantMatMul";
  // Those of QuantMatMul, and outliers.
  static constexpr std::array<ElementType, 7> kInputs = {type,
                                                         ElementType::kUint8,
                                                         ElementType::kUndefined,
                                                         ElementType::kInt8,
                                                         ElementType::kFloat32,
                                                         ElementType::kFloat32,
                                                         ElementType::kInt64};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                DynamicQuantMatMul* kernel);
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const;

 private:
  PackedLinear linear_;
  const HadamardKernels* halves_ = nullptr;  // converts from and to halves
  float threshold_ = 0;
};

// What Hadamard and HadamardQuantize share: the attributes and the inputs x and core.
struct Rotation {
  ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, const char* op);
  // Reads and checks both inputs; core is [c, c].
  ort::OrtStatus* Bind(const Api& api, const ort::OrtKernelContext* context, InputTensor* x,
                       const float** core, int64_t* c) const;

  const char* name = nullptr;
  const HadamardKernels* kernels = nullptr;
  Allocator allocator;
  int64_t block = 0;
  float scale = 1;
};

// x: [..., K], core: [c, c] -> y: [..., K]; see defs/hadamard.py.
template <ElementType type>
class Hadamard {
 public:
  static constexpr const char* kName = "Hadamard";
  static constexpr std::array<ElementType, 2> kInputs = {type, ElementType::kFloat32};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, Hadamard* kernel);
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const;

 private:
  using T = std::conditional_t<type == ElementType::kFloat16, uint16_t, float>;
  Rotation rotation_;
};

// x: [..., K], core: [c, c] -> q: [..., K] i8, q_scale: [..., G] f32; see
// defs/hadamard_quantize.py.
template <ElementType type>
class HadamardQuantize {
 public:
  static constexpr const char* kName = "HadamardQuantize";
  static constexpr std::array<ElementType, 2> kInputs = {type, ElementType::kFloat32};
  static constexpr std::array<ElementType, 2> kOutputs = {ElementType::kInt8,
                                                          ElementType::kFloat32};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                HadamardQuantize* kernel);
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const;

 private:
  using T = std::conditional_t<type == ElementType::kFloat16, uint16_t, float>;
  Rotation rotation_;
  const PerTokenRows* rows_ = nullptr;
  int64_t group_ = 0;
};

// x: [..., K] -> y: [..., K], rounded block by block; see defs/quantize_block.py.
template <ElementType type>
class QuantizeBlock {
 public:
  static constexpr const char* kName = "QuantizeBlock";
  static constexpr std::array<ElementType, 1> kInputs = {type};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                QuantizeBlock* kernel);
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const;

 private:
  using T = std::conditional_t<type == ElementType::kFloat16, uint16_t, float>;
  QuantizeRow row_ = nullptr;
  const HadamardKernels* halves_ = nullptr;  // converts from and to halves
  Allocator allocator_;
  int64_t block_ = 0;
  BlockFormat format_{};
};

}  // namespace onnxq
