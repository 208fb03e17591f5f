// The operators on rows and blocks of activations as ONNX Runtime sees them: checks, shapes, the
// stream. Only host code: kernels are reached through launch.h.
#pragma once

#include <cmath>

#include "block_attributes.h"
#include "ort_support.h"

namespace onnxq {

// The output is as the input: its type, not the kernel's, for ONNX Runtime asks one kernel of an
// operator for all of them.
inline ort::OrtStatus* SameShape(const Api& api, ort::OrtShapeInferContext* context) {
  SymbolicShape shape;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
  if (shape.dims.empty()) return nullptr;  // not known yet
  return SetOutputShape(api, context, 0, shape.type, shape);
}

// x: [..., K] -> q: [..., K] i8, scale: [..., 1] f32.
template <ElementType type>
class DynamicQuantizePerToken {
 public:
  static constexpr const char* kName = "DynamicQuantizePerToken";
  static constexpr std::array<ElementType, 1> kInputs = {type};
  static constexpr std::array<ElementType, 2> kOutputs = {ElementType::kInt8, float32};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo*,
                                DynamicQuantizePerToken*) {
    return Check(api, kName, onnxq_cuda_prepare());
  }

  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    SymbolicShape shape;
    ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
    if (shape.dims.empty()) return nullptr;  // not known yet
    ONNXQ_RETURN_IF_ERROR(SetOutputShape(api, context, 0, ElementType::kInt8, shape));
    shape.dims.back() = 1;
    shape.names.back().clear();
    return SetOutputShape(api, context, 1, float32, shape);
  }

  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    InputTensor x;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
    if (x.shape.empty()) return Error(api, kName, "x is a scalar; it needs a token axis [..., K]");
    std::vector<int64_t> scale_shape = x.shape;
    scale_shape.back() = 1;
    void* q = nullptr;
    void* scale = nullptr;
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &q));
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 1, scale_shape, &scale));
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    const int64_t rows = Product(x.shape, x.shape.size() - 1);
    if (rows > INT32_MAX || x.shape.back() > INT32_MAX)
      return Error(api, kName, "x has more than 2^31 rows or columns");
    const cuda::PerTokenArgs args = {x.data, q, static_cast<float*>(scale), nullptr,
                                     static_cast<int>(x.shape.back())};
    return Check(api, kName,
                 onnxq_cuda_per_token(&args, static_cast<int>(rows), kElement<type>,
                                      static_cast<int>(cuda::Activations::kInt8), 0, stream));
  }
};

// What Hadamard and HadamardQuantize share: the attributes, the inputs x and core.
struct Rotation {
  ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, const char* op) {
    name = op;
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, "block", &block));
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "scale", &scale));
    if (block < 1) return Error(api, name, "block must be at least 1");
    if (block > cuda::kMaxHadamardPiece)
      return Error(api, name,
                   "block = " + std::to_string(block) + "; the CUDA kernel takes up to " +
                       std::to_string(cuda::kMaxHadamardPiece),
                   ort::ErrorCode::kNotImplemented);
    if (!std::isfinite(scale)) return Error(api, name, "the scale is not finite");
    return Check(api, name, onnxq_cuda_prepare());
  }

  // Reads and checks both inputs, and fills the arguments but for y, scales and group.
  ort::OrtStatus* Bind(const Api& api, const ort::OrtKernelContext* context, InputTensor* x,
                       cuda::HadamardArgs* args) const {
    InputTensor core;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, x));
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &core));
    if (x->shape.empty() || x->shape.back() % block != 0)
      return Error(api, name,
                   "the last extent of x is no multiple of block = " + std::to_string(block));
    const int64_t c = core.shape.size() == 2 ? core.shape[0] : 0;
    if (c < 1 || c > 256 || core.shape[1] != c)
      return Error(api, name, "the core is not [c, c] with c from 1 to 256");
    const int64_t rest = block / c;
    if (block % c != 0 || (rest & (rest - 1)) != 0)
      return Error(api, name,
                   "block = " + std::to_string(block) + " is not the core's order " +
                       std::to_string(c) + " times a power of two");
    args->x = x->data;
    args->core = static_cast<const float*>(core.data);
    args->count = Product(x->shape, x->shape.size());
    args->block = static_cast<int>(block);
    args->core_order = static_cast<int>(c);
    args->piece = cuda::HadamardPiece(args->block);
    args->scale = scale;
    return nullptr;
  }

  const char* name = "";
  int64_t block = 0;
  float scale = 1;
};

// x: [..., K], core: [c, c] -> y: [..., K].
template <ElementType type>
class Hadamard {
 public:
  static constexpr const char* kName = "Hadamard";
  static constexpr std::array<ElementType, 2> kInputs = {type, float32};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, Hadamard* kernel) {
    return kernel->rotation_.Create(api, info, kName);
  }

  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    return SameShape(api, context);
  }

  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    InputTensor x;
    cuda::HadamardArgs args{};
    ONNXQ_RETURN_IF_ERROR(rotation_.Bind(api, context, &x, &args));
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &args.y));
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    return Check(api, kName, onnxq_cuda_hadamard(&args, kElement<type>, stream));
  }

 private:
  Rotation rotation_;
};

// x: [..., K], core: [c, c] -> q: [..., K] i8, q_scale: [..., G] f32; a thread block takes a row.
template <ElementType type>
class HadamardQuantize {
 public:
  static constexpr const char* kName = "HadamardQuantize";
  static constexpr std::array<ElementType, 2> kInputs = {type, float32};
  static constexpr std::array<ElementType, 2> kOutputs = {ElementType::kInt8, float32};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info,
                                HadamardQuantize* kernel) {
    ONNXQ_RETURN_IF_ERROR(kernel->rotation_.Create(api, info, kName));
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, "group", &kernel->group_));
    return kernel->group_ < 1 ? Error(api, kName, "group must be at least 1") : nullptr;
  }

  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    SymbolicShape shape;
    ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
    if (shape.dims.empty()) return nullptr;  // not known yet
    ONNXQ_RETURN_IF_ERROR(SetOutputShape(api, context, 0, ElementType::kInt8, shape));
    const int64_t k = shape.dims.back();
    int64_t group = 0;
    size_t bytes = 0;
    const ort::OrtOpAttr* attribute = nullptr;
    ONNXQ_RETURN_IF_ERROR(api.ShapeInferContext_GetAttribute(context, "group", &attribute));
    ONNXQ_RETURN_IF_ERROR(
        api.ReadOpAttr(attribute, ort::AttributeType::kInt, &group, sizeof group, &bytes));
    shape.dims.back() = k < 0 || group < 1 ? -1 : Groups(k, group);
    shape.names.back().clear();
    return SetOutputShape(api, context, 1, float32, shape);
  }

  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    InputTensor x;
    cuda::HadamardArgs args{};
    ONNXQ_RETURN_IF_ERROR(rotation_.Bind(api, context, &x, &args));
    const int64_t k = x.shape.back();
    if (k > cuda::kMaxHadamardPiece)
      return Error(api, kName,
                   "rows of " + std::to_string(k) + " columns; the CUDA kernel takes up to " +
                       std::to_string(cuda::kMaxHadamardPiece),
                   ort::ErrorCode::kNotImplemented);
    std::vector<int64_t> scale_shape = x.shape;
    scale_shape.back() = Groups(k, group_);
    void* scales = nullptr;
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &args.y));
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 1, scale_shape, &scales));
    args.scales = static_cast<float*>(scales);
    args.piece = static_cast<int>(k);
    args.group = static_cast<int>(group_ < k ? group_ : k);
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    return Check(api, kName, onnxq_cuda_hadamard(&args, kElement<type>, stream));
  }

 private:
  static int64_t Groups(int64_t k, int64_t group) {
    return group >= k ? (k > 0 ? 1 : 0) : cuda::CeilDivide(k, group);
  }

  Rotation rotation_;
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
                                QuantizeBlock* kernel) {
    ONNXQ_RETURN_IF_ERROR(ReadBlockFormat(api, info, &kernel->block_, &kernel->format_));
    ONNXQ_RETURN_IF_ERROR(Check(api, kName, onnxq_cuda_prepare()));
    return GetAllocator(api, info, &kernel->allocator_);
  }

  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    return SameShape(api, context);
  }

  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    InputTensor x;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
    if (x.shape.empty()) return Error(api, kName, "x is a scalar");
    cuda::QuantizeBlockArgs args{};
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &args.y));
    args.x = x.data;
    args.rows = Product(x.shape, x.shape.size() - 1);
    const int64_t k = x.shape.back();
    if (args.rows > INT32_MAX || k > INT32_MAX)
      return Error(api, kName, "x has more than 2^31 rows or columns");
    if (args.rows == 0 || k == 0) return nullptr;
    args.k = static_cast<int>(k);
    args.block = block_ == 0 || block_ > k ? args.k : static_cast<int>(block_);
    args.format = format_;
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    const bool by_row = format_.scale == BlockScale::kE4M3 && format_.factor == 0;
    Scratch scratch(api);
    const size_t at = by_row ? Reserve(&scratch, 4 * args.rows) : 0;
    if (by_row) ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
    float* const factors = by_row ? scratch.Get<float>(at) : nullptr;
    return Check(api, kName, onnxq_cuda_quantize_block(&args, kElement<type>, factors, stream));
  }

 private:
  int64_t block_ = 0;
  BlockFormat format_{};
  Allocator allocator_;
};

}  // namespace onnxq
