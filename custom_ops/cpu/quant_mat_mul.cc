// QuantMatMul as ONNX Runtime sees it.
#include <numeric>

#include "cpu_kernels.h"

namespace onnxq {

template <ElementType type>
ort::OrtStatus* QuantMatMul<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                          QuantMatMul* kernel) {
  return kernel->linear_.Create(api, info, kName);
}

template <ElementType type>
ort::OrtStatus* QuantMatMul<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  return PackedLinear::InferShapes(api, context);
}

template <ElementType type>
ort::OrtStatus* QuantMatMul<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  InputTensor x;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
  const QuantMatMulAttributes& a = linear_.attributes();
  if (x.shape.empty() || x.shape.back() != a.k)
    return Error(
        api, kName,
        "x has shape " + Text(x.shape) + "; its last extent must be " + std::to_string(a.k));
  QuantWeights weights;
  QuantBias bias;
  ONNXQ_RETURN_IF_ERROR(linear_.Bind(api, context, &weights, &bias));
  std::vector<int64_t> shape = x.shape;
  shape.back() = a.n;
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &y));
  const int64_t m = std::accumulate(x.shape.begin(), x.shape.end() - 1, int64_t{1},
                                    [](int64_t p, int64_t q) { return p * q; });
  if (m == 0) return nullptr;
  return linear_.Multiply(api, context, weights, static_cast<const T*>(x.data), m, bias, y,
                          type == ElementType::kFloat16);
}

template class QuantMatMul<ElementType::kFloat32>;
template class QuantMatMul<ElementType::kFloat16>;

}  // namespace onnxq
