// The products with packed weights as ONNX Runtime sees them.
#pragma once

#include "packed_product.h"

namespace onnxq {

// See defs/quant_mat_mul.py.
template <ElementType type>
class QuantMatMul {
 public:
  static constexpr const char* kName = "QuantMatMul";
  // x, codes, scales (of several types), zero_points, levels, bias, order.
  static constexpr std::array<ElementType, 7> kInputs = {
      type,    ElementType::kUint8, ElementType::kUndefined, ElementType::kInt8, float32,
      float32, ElementType::kInt32};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                QuantMatMul* kernel) {
    ONNXQ_RETURN_IF_ERROR(kernel->product_.Create(api, info, kName));
    return kernel->CheckConstantOrder(api, info);
  }
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    return PackedProduct<type>::InferShapes(api, context);
  }
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    InputTensor order;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, kOrderInput, &order));
    if (order.shape == std::vector<int64_t>{1} && product_.k() != 1)
      return product_.Compute(api, context, {});
    if (order.shape != std::vector<int64_t>{product_.k()})
      return Error(api, kName, "order has shape " + Text(order.shape) + ", not [K] or [1]");
    return product_.Compute(api, context, {}, static_cast<const int32_t*>(order.data));
  }

 private:
  static constexpr size_t kOrderInput = 6;

  // An order that is no constant cannot be looked at without waiting for the device: the kernel
  // takes zeros for columns that do not exist.
  ort::OrtStatus* CheckConstantOrder(const Api& api, const ort::OrtKernelInfo* info) const {
    InputTensor order;
    bool found = false;
    ONNXQ_RETURN_IF_ERROR(GetConstantInput(api, info, kOrderInput, &found, &order));
    if (!found || order.shape != std::vector<int64_t>{product_.k()}) return nullptr;
    std::vector<int32_t> columns(static_cast<size_t>(product_.k()));
    ONNXQ_RETURN_IF_ERROR(
        product_.CopyToHost(api, order, columns.data(), columns.size() * sizeof(int32_t)));
    for (const int32_t column : columns) {
      if (column < 0 || column >= product_.k())
        return Error(api, kName,
                     "place " + std::to_string(column) + " of the order is not in 0 to " +
                         std::to_string(product_.k() - 1));
    }
    return nullptr;
  }

  PackedProduct<type> product_;
};

// The same with columns of outliers in float; see defs/dynamic_quant_mat_mul.py.
template <ElementType type>
class DynamicQuantMatMul {
 public:
  static constexpr const char* kName = "DynamicQuantMatMul";
  // Those of QuantMatMul, and outliers.
  static constexpr std::array<ElementType, 7> kInputs = {
      type,    ElementType::kUint8, ElementType::kUndefined, ElementType::kInt8, float32,
      float32, ElementType::kInt64};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                DynamicQuantMatMul* kernel) {
    ONNXQ_RETURN_IF_ERROR(kernel->product_.Create(api, info, kName));
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "threshold", &kernel->threshold_));
    if (!kernel->product_.int8_activations())
      return Error(api, kName, "int8_activations must be 1; QuantMatMul takes float activations");
    if (!(kernel->threshold_ >= 0 && std::isfinite(kernel->threshold_)))
      return Error(api, kName, "the threshold is negative or not finite");
    return kernel->CheckNamed(api, info);
  }
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    return PackedProduct<type>::InferShapes(api, context);
  }
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    InputTensor named;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, kNamedInput, &named));
    if (named.shape.size() != 1 || named.shape[0] > INT32_MAX)
      return Error(api, kName, "outliers has shape " + Text(named.shape) + ", not [R]");
    return product_.Compute(
        api, context,
        {static_cast<const int64_t*>(named.data), static_cast<int>(named.shape[0]), threshold_});
  }

 private:
  static constexpr size_t kNamedInput = 6;

  // Columns that are not constant cannot be looked at without waiting for the device: the kernels
  // pass by those that do not exist.
  ort::OrtStatus* CheckNamed(const Api& api, const ort::OrtKernelInfo* info) const {
    InputTensor named;
    bool found = false;
    ONNXQ_RETURN_IF_ERROR(GetConstantInput(api, info, kNamedInput, &found, &named));
    if (!found || named.shape.size() != 1) return nullptr;
    std::vector<int64_t> columns(static_cast<size_t>(named.shape[0]));
    if (columns.empty()) return nullptr;
    ONNXQ_RETURN_IF_ERROR(
        product_.CopyToHost(api, named, columns.data(), columns.size() * sizeof(int64_t)));
    for (const int64_t column : columns) {
      if (column < 0 || column >= product_.k())
        return Error(api, kName,
                     "outlier column " + std::to_string(column) + " is not in 0 to " +
                         std::to_string(product_.k() - 1));
    }
    return nullptr;
  }

  PackedProduct<type> product_;
  float threshold_ = 0;
};

// Rows that an operator before has quantized; see defs/quant_mat_mul_int8.py.
template <ElementType type>
class QuantMatMulInt8 {
 public:
  static constexpr const char* kName = "QuantMatMulInt8";
  // q, q_scale, and QuantMatMul's but for x and the order.
  static constexpr std::array<ElementType, 7> kInputs = {
      type,    float32, ElementType::kUint8, ElementType::kUndefined, ElementType::kInt8,
      float32, float32};
  static constexpr std::array<ElementType, 1> kOutputs = {float32};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                QuantMatMulInt8* kernel) {
    ONNXQ_RETURN_IF_ERROR(kernel->product_.Create(api, info, kName, 2));
    if (!kernel->product_.int8_activations())
      return Error(api, kName, "int8_activations must be 1 or 2");
    return nullptr;
  }
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    return PackedProduct<float16>::InferShapes(api, context, float32);
  }
  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    InputTensor q;
    InputTensor scale;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &q));
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &scale));
    std::vector<int64_t> rows = q.shape;
    if (!rows.empty()) rows.back() = 1;
    if (scale.shape != rows)
      return Error(api, kName, "q_scale has shape " + Text(scale.shape) + ", not " + Text(rows));
    return product_.ComputeInt8(api, context, static_cast<const float*>(scale.data));
  }

 private:
  PackedProduct<float16> product_;
};

}  // namespace onnxq
