// QuantMatMul as ONNX Runtime sees it.
#include <numeric>

#include "cpu_kernels.h"

namespace onnxq {
namespace {

constexpr size_t kOrderInput = 6;

// [K] places in K, or [1]: 0, which stands for no order.
ort::OrtStatus* CheckOrder(const Api& api, const InputTensor& order, int64_t k) {
  const char* name = "QuantMatMul";
  const auto* places = static_cast<const int32_t*>(order.data);
  if (order.shape != std::vector<int64_t>{k} && order.shape != std::vector<int64_t>{1})
    return Error(
        api, name,
        "order has shape " + Text(order.shape) + ", not [" + std::to_string(k) + "] or [1]");
  if (order.shape[0] != k && *places != 0)
    return Error(api, name, "an order of one place must be 0");
  for (int64_t i = 0; i < order.shape[0]; ++i) {
    if (places[i] < 0 || places[i] >= k)
      return Error(api, name,
                   "order holds " + std::to_string(places[i]) + ", which is not in 0 to " +
                       std::to_string(k - 1));
  }
  return nullptr;
}

}  // namespace

template <ElementType type>
ort::OrtStatus* QuantMatMul<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                          QuantMatMul* kernel) {
  ONNXQ_RETURN_IF_ERROR(kernel->linear_.Create(api, info, kName, 1));
  InputTensor order;
  ONNXQ_RETURN_IF_ERROR(GetConstantInput(api, info, kOrderInput, &kernel->order_checked_, &order));
  if (!kernel->order_checked_) return nullptr;
  return CheckOrder(api, order, kernel->linear_.attributes().k);
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
  InputTensor order;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, kOrderInput, &order));
  if (!order_checked_) ONNXQ_RETURN_IF_ERROR(CheckOrder(api, order, a.k));
  const auto* places = order.shape[0] == a.k ? static_cast<const int32_t*>(order.data) : nullptr;
  std::vector<int64_t> shape = x.shape;
  shape.back() = a.n;
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &y));
  const int64_t m = std::accumulate(x.shape.begin(), x.shape.end() - 1, int64_t{1},
                                    [](int64_t p, int64_t q) { return p * q; });
  if (m == 0) return nullptr;
  return linear_.Multiply(api, context, weights, static_cast<const T*>(x.data), places, m, bias, y,
                          type == ElementType::kFloat16);
}

template class QuantMatMul<ElementType::kFloat32>;
template class QuantMatMul<ElementType::kFloat16>;

}  // namespace onnxq
