// What QuantMatMul and its kin hold: packed weights and a bias, checked, and the kernels for them.
#pragma once

#include <cstdint>

#include "op_kernel.h"
#include "quant_mat_mul.h"

namespace onnxq {

struct PerTokenRows;

// Inputs 1 to 5 of the operator are codes, scales, zero points, levels and bias; its attributes
// those of QuantMatMul.
class PackedLinear {
 public:
  // Reads and checks the attributes, and what of the inputs is constant.
  ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, const char* name);
  // y: [..., N] from x: [..., K].
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context);

  // The weights of one call; checked now where they are no constants of the model.
  ort::OrtStatus* Bind(const Api& api, const ort::OrtKernelContext* context, QuantWeights* weights,
                       QuantBias* bias) const;

  // y [m, N] = x [m, K] times the weights, plus the bias; T is float or the bits of a half.
  template <class T>
  ort::OrtStatus* Multiply(const Api& api, const ort::OrtKernelContext* context,
                           const QuantWeights& weights, const T* x, int64_t m, QuantBias bias,
                           void* y, bool y_half) const;

  const QuantMatMulAttributes& attributes() const { return attributes_; }
  const QuantMatMulKernels& kernels() const { return *kernels_; }
  ort::OrtAllocator* allocator() const { return allocator_.get(); }

 private:
  const char* name_ = nullptr;
  QuantMatMulAttributes attributes_;
  const QuantMatMulKernels* kernels_ = nullptr;
  const PerTokenRows* rows_ = nullptr;
  Allocator allocator_;
  bool prepared_ = false;  // `weights_` and `bias_` are from constants of the model
  QuantWeights weights_{};
  QuantBias bias_{};
};

}  // namespace onnxq
