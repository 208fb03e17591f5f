// What QuantMatMul and its kin hold: packed weights and a bias, checked, and the kernels for them.
#pragma once

#include <cstdint>

#include "op_kernel.h"
#include "quant_mat_mul.h"

namespace onnxq {

struct PerTokenRows;

// Five inputs of the operator from `first_input` on are codes, scales, zero points, levels and
// bias; its attributes are those of QuantMatMul.
class PackedLinear {
 public:
  // Reads and checks the attributes, and what of the inputs is constant.
  ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, const char* name,
                         size_t first_input);
  // y: [..., N] from x: [..., K], of the type of x unless another is given.
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context,
                                     ElementType type = ElementType::kUndefined);

  // The weights of one call; checked now where they are no constants of the model.
  ort::OrtStatus* Bind(const Api& api, const ort::OrtKernelContext* context, QuantWeights* weights,
                       QuantBias* bias) const;

  // y [m, N] = x [m, K] times the weights, plus the bias; T is float or the bits of a half. Row k
  // of the weights meets column order[k] of x, or k where `order` is null.
  template <class T>
  ort::OrtStatus* Multiply(const Api& api, const ort::OrtKernelContext* context,
                           const QuantWeights& weights, const T* x, const int32_t* order, int64_t m,
                           QuantBias bias, void* y, bool y_half) const;
  // The same from activations that are quantized already, q_scale being [m, 1] or [m, G].
  ort::OrtStatus* MultiplyInt8(const Api& api, const ort::OrtKernelContext* context,
                               const QuantWeights& weights, const int8_t* q, const float* q_scale,
                               int64_t m, QuantBias bias, float* y) const;

  const QuantMatMulAttributes& attributes() const { return attributes_; }
  const QuantMatMulKernels& kernels() const { return *kernels_; }
  ort::OrtAllocator* allocator() const { return allocator_.get(); }

 private:
  // Sums over the groups of a row that lies at `q`, and zeros behind it.
  void CompleteRow(const QuantWeights& weights, int8_t* q, int32_t* starts) const;

  const char* name_ = nullptr;
  size_t first_input_ = 1;
  QuantMatMulAttributes attributes_;
  const QuantMatMulKernels* kernels_ = nullptr;
  const PerTokenRows* rows_ = nullptr;
  Allocator allocator_;
  bool prepared_ = false;  // `weights_` and `bias_` are from constants of the model
  QuantWeights weights_{};
  QuantBias bias_{};
};

}  // namespace onnxq
