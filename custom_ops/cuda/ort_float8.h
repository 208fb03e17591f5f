// The product of FP8 on both sides as ONNX Runtime sees it.
#pragma once

#include <cuda_runtime_api.h>

#include "ort_support.h"

namespace onnxq {

// See defs/dynamic_float8_mat_mul.py.
template <ElementType type>
class DynamicFloat8MatMul {
 public:
  static constexpr const char* kName = "DynamicFloat8MatMul";
  // x, weight, scales, bias.
  static constexpr std::array<ElementType, 4> kInputs = {type, ElementType::kFloat8e4m3fn, float32,
                                                         float32};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                DynamicFloat8MatMul* kernel) {
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, "block", &kernel->block_));
    if (kernel->block_ != 0 && kernel->block_ != cuda::kFloat8Block)
      return Error(api, kName, "blocks of " + std::to_string(kernel->block_) + ", not 0 or 128");
    ONNXQ_RETURN_IF_ERROR(Check(api, kName, onnxq_cuda_prepare()));
    ONNXQ_RETURN_IF_ERROR(GetAllocator(api, info, &kernel->allocator_));
    return kernel->LookAtBias(api, info);
  }

  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    SymbolicShape x;
    SymbolicShape weight;
    ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &x));
    ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 1, &weight));
    if (x.dims.empty() || weight.dims.empty()) return nullptr;  // not known yet
    x.dims.back() = weight.dims.front();
    x.names.back() = weight.names.front();
    return SetOutputShape(api, context, 0, x.type, x);
  }

  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    std::array<InputTensor, 4> inputs;
    for (size_t i = 0; i < inputs.size(); ++i)
      ONNXQ_RETURN_IF_ERROR(GetInput(api, context, i, &inputs[i]));
    cuda::Float8ProductArgs args{};
    ONNXQ_RETURN_IF_ERROR(SetArgs(api, inputs, &args));
    std::vector<int64_t> shape = inputs[0].shape;
    shape.back() = args.n;
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &args.y));
    if (args.m == 0) return nullptr;
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    Scratch scratch(api);
    const size_t at = Reserve(&scratch, onnxq_cuda_float8_scratch(&args));
    ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
    return Check(api, kName,
                 onnxq_cuda_float8_mat_mul(&args, kElement<type>, scratch.Get<char>(at), stream));
  }

 private:
  // A bias of [1] that holds 0 is none: then cuBLASLt's product needs no end.
  ort::OrtStatus* LookAtBias(const Api& api, const ort::OrtKernelInfo* info) {
    InputTensor bias;
    bool found = false;
    ONNXQ_RETURN_IF_ERROR(GetConstantInput(api, info, 3, &found, &bias));
    if (!found || Product(bias.shape, bias.shape.size()) != 1) return nullptr;
    float number = 1;
    ONNXQ_RETURN_IF_ERROR(
        Check(api, kName,
              static_cast<int>(cudaMemcpy(&number, bias.data, sizeof number, cudaMemcpyDefault))));
    no_bias_ = number == 0;
    return nullptr;
  }

  ort::OrtStatus* SetArgs(const Api& api, const std::array<InputTensor, 4>& inputs,
                          cuda::Float8ProductArgs* a) const {
    const auto refuse = [&](const std::string& cause) { return Error(api, kName, cause); };
    const auto& [x, weight, scales, bias] = inputs;
    if (weight.shape.size() != 2 || weight.shape[0] < 1 || weight.shape[1] < 1)
      return refuse("weight has shape " + Text(weight.shape) + ", not [N, K]");
    const int64_t n = weight.shape[0];
    const int64_t k = weight.shape[1];
    if (k > INT32_MAX / 64 || n > INT32_MAX - 128) return refuse("K or N is too large");
    if (x.shape.empty() || x.shape.back() != k)
      return refuse("x has shape " + Text(x.shape) + "; its last extent must be " +
                    std::to_string(k));
    if (block_ != 0 && k % block_ != 0)
      return refuse("K = " + std::to_string(k) + " is no multiple of 128");
    const std::vector<int64_t> expected =
        block_ == 0 ? std::vector<int64_t>{n, 1}
                    : std::vector<int64_t>{cuda::CeilDivide(n, block_),
                                           cuda::Float8ScaleStride(static_cast<int>(k))};
    if (scales.shape != expected)
      return refuse("scales has shape " + Text(scales.shape) + ", not " + Text(expected));
    if (bias.shape != std::vector<int64_t>{n} && bias.shape != std::vector<int64_t>{1})
      return refuse("bias has shape " + Text(bias.shape) + ", not [N] or [1]");
    const int64_t m = Product(x.shape, x.shape.size() - 1);
    if (m > INT32_MAX) return refuse("x has more than 2^31 rows");
    a->x = x.data;
    a->weights = static_cast<const uint8_t*>(weight.data);
    a->scales = static_cast<const float*>(scales.data);
    a->bias = no_bias_ ? nullptr : static_cast<const float*>(bias.data);
    a->bias_stride = bias.shape[0] == n ? 1 : 0;
    a->m = static_cast<int>(m);
    a->n = static_cast<int>(n);
    a->k = static_cast<int>(k);
    a->block = static_cast<int>(block_);
    return nullptr;
  }

  int64_t block_ = 0;
  bool no_bias_ = false;
  Allocator allocator_;
};

}  // namespace onnxq
