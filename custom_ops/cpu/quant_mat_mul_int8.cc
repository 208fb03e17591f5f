// QuantMatMulInt8 as ONNX Runtime sees it.
#include <numeric>

#include "cpu_kernels.h"

namespace onnxq {

template <ElementType type>
ort::OrtStatus* QuantMatMulInt8<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                              QuantMatMulInt8* kernel) {
  ONNXQ_RETURN_IF_ERROR(kernel->linear_.Create(api, info, kName, 2));
  if (!kernel->linear_.attributes().integers())
    return Error(api, kName, "int8_activations must be 1 or 2; QuantMatMul takes floats");
  return nullptr;
}

template <ElementType type>
ort::OrtStatus* QuantMatMulInt8<type>::InferShapes(const Api& api,
                                                   ort::OrtShapeInferContext* context) {
  return PackedLinear::InferShapes(api, context, ElementType::kFloat32);
}

template <ElementType type>
ort::OrtStatus* QuantMatMulInt8<type>::Compute(const Api& api,
                                               ort::OrtKernelContext* context) const {
  InputTensor q;
  InputTensor q_scale;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &q));
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &q_scale));
  const QuantMatMulAttributes& a = linear_.attributes();
  if (q.shape.empty() || q.shape.back() != a.k)
    return Error(
        api, kName,
        "q has shape " + Text(q.shape) + "; its last extent must be " + std::to_string(a.k));
  QuantWeights weights;
  QuantBias bias;
  ONNXQ_RETURN_IF_ERROR(linear_.Bind(api, context, &weights, &bias));
  std::vector<int64_t> shape = q.shape;
  shape.back() = a.activations == Activations::kInt8Groups ? weights.groups : 1;
  if (q_scale.shape != shape)
    return Error(api, kName, "q_scale has shape " + Text(q_scale.shape) + ", not " + Text(shape));
  shape.back() = a.n;
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &y));
  const int64_t m = std::accumulate(q.shape.begin(), q.shape.end() - 1, int64_t{1},
                                    [](int64_t p, int64_t r) { return p * r; });
  if (m == 0) return nullptr;
  return linear_.MultiplyInt8(api, context, weights, static_cast<const int8_t*>(q.data),
                              static_cast<const float*>(q_scale.data), m, bias,
                              static_cast<float*>(y));
}

template class QuantMatMulInt8<ElementType::kInt8>;

}  // namespace onnxq
