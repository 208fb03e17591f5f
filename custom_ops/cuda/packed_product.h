// What the operators with packed weights share: checks, shapes, scratch memory, the stream. Only
// host code: kernels are reached through launch.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>

#include "ort_support.h"

namespace onnxq {

// What QuantMatMul and DynamicQuantMatMul share: x: [..., K] times packed weights -> y: [..., N].
template <ElementType type>
class PackedProduct {
 public:
  // first_weight: the input that holds the codes.
  ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, const char* name,
                         size_t first_weight = 1) {
    name_ = name;
    first_weight_ = first_weight;
    int64_t layout = 0;
    const std::pair<const char*, int64_t*> integers[] = {
        {"K", &k_},       {"N", &n_},          {"group", &group_},
        {"bits", &bits_}, {"layout", &layout}, {"exponent_scales", &exponent_scales_}};
    for (const auto& [attribute, value] : integers) {
      ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, attribute, value));
    }
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "factor", &factor_));
    int64_t int8_activations = 0;
    ONNXQ_RETURN_IF_ERROR(
        api.KernelInfoGetAttribute_int64(info, "int8_activations", &int8_activations));
    if (int8_activations < 0 || int8_activations > 1)
      return Error(api, name_, "the CUDA kernels take int8_activations 0 and 1",
                   ort::ErrorCode::kNotImplemented);
    int8_activations_ = int8_activations != 0;
    ONNXQ_RETURN_IF_ERROR(CheckAttributes(api, layout));
    ONNXQ_RETURN_IF_ERROR(Check(api, name_, onnxq_cuda_prepare()));
    ONNXQ_RETURN_IF_ERROR(GetAllocator(api, info, &allocator_));
    return LookAtConstants(api, info);
  }

  bool int8_activations() const { return int8_activations_; }
  int64_t k() const { return k_; }

  // y is of the type of x, or of the one given.
  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context,
                                     ElementType of_y = ElementType::kUndefined) {
    SymbolicShape shape;
    ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
    if (shape.dims.empty()) return nullptr;  // not known yet
    const ort::OrtOpAttr* attribute = nullptr;
    ONNXQ_RETURN_IF_ERROR(api.ShapeInferContext_GetAttribute(context, "N", &attribute));
    int64_t n = 0;
    size_t bytes = 0;
    ONNXQ_RETURN_IF_ERROR(
        api.ReadOpAttr(attribute, ort::AttributeType::kInt, &n, sizeof n, &bytes));
    shape.dims.back() = n;
    shape.names.back().clear();
    const bool as_x = of_y == ElementType::kUndefined;
    return SetOutputShape(api, context, 0, as_x ? shape.type : of_y, shape);
  }

  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context,
                          const cuda::Outliers& outliers, const int32_t* order = nullptr) const {
    cuda::QuantMatMulArgs args{};
    std::vector<int64_t> shape;
    ONNXQ_RETURN_IF_ERROR(Bind(api, context, &args, &shape));
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &args.y));
    return args.m == 0 ? nullptr : Run(api, context, args, outliers, order);
  }

  // x holds INT8 already, with `scales` [M]; y is float32.
  ort::OrtStatus* ComputeInt8(const Api& api, ort::OrtKernelContext* context,
                              const float* scales) const {
    cuda::QuantMatMulArgs args{};
    std::vector<int64_t> shape;
    void* y = nullptr;
    ONNXQ_RETURN_IF_ERROR(Bind(api, context, &args, &shape));
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &y));
    if (args.m == 0) return nullptr;
    args.row_scale = scales;
    args.sums = static_cast<float*>(y);
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    const auto kind = static_cast<int>(format_.kind);
    cuda::Plan plan;
    ONNXQ_RETURN_IF_ERROR(
        Check(api, name_,
              onnxq_cuda_plan(&args, kind, kElement<type>, static_cast<int>(StoredAs()), &plan)));
    Scratch scratch(api);
    const int64_t count = int64_t{args.m} * k_;
    const bool widens = plan.route != cuda::Route::kInteger;
    const size_t wide_at = widens ? Reserve(&scratch, 2 * count) : 0;
    const size_t plan_at = plan.scratch_bytes > 0 ? Reserve(&scratch, plan.scratch_bytes) : 0;
    ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
    if (widens) {
      const cuda::WidenArgs widen = {static_cast<const int8_t*>(args.x),
                                     scratch.Get<uint16_t>(wide_at), count};
      ONNXQ_RETURN_IF_ERROR(Check(api, name_, onnxq_cuda_widen(&widen, stream)));
      args.x = widen.y;
    }
    void* const memory = plan.scratch_bytes > 0 ? scratch.Get<char>(plan_at) : nullptr;
    return Check(
        api, name_,
        onnxq_cuda_quant_mat_mul(&args, kind, kElement<type>, format_.unit, &plan, memory, stream));
  }

  // From wherever ONNX Runtime keeps the constant.
  ort::OrtStatus* CopyToHost(const Api& api, const InputTensor& tensor, void* to,
                             size_t bytes) const {
    return Check(api, name_,
                 static_cast<int>(cudaMemcpy(to, tensor.data, bytes, cudaMemcpyDefault)));
  }

 private:
  // Reads the inputs; shape: of y.
  ort::OrtStatus* Bind(const Api& api, ort::OrtKernelContext* context, cuda::QuantMatMulArgs* args,
                       std::vector<int64_t>* shape) const {
    std::array<InputTensor, 6> inputs;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &inputs[0]));
    for (size_t i = 1; i < inputs.size(); ++i)
      ONNXQ_RETURN_IF_ERROR(GetInput(api, context, first_weight_ + i - 1, &inputs[i]));
    const InputTensor& x = inputs[0];
    if (x.shape.empty() || x.shape.back() != k_)
      return Error(
          api, name_,
          "x has shape " + Text(x.shape) + "; its last extent must be " + std::to_string(k_));
    ONNXQ_RETURN_IF_ERROR(SetArgs(api, inputs, args));
    const int64_t m = Product(x.shape, x.shape.size() - 1);
    if (m > INT32_MAX) return Error(api, name_, "x has more than 2^31 rows");
    args->m = static_cast<int>(m);
    *shape = x.shape;
    shape->back() = n_;
    return nullptr;
  }

  ort::OrtStatus* CheckAttributes(const Api& api, int64_t layout) const {
    const auto refuse = [&](const std::string& cause) { return Error(api, name_, cause); };
    if (layout != 1)
      return refuse("weights in layout " + std::to_string(layout) +
                    "; this library reads layout 1");
    if (bits_ < 1 || bits_ > 8 || bits_ == 5 || bits_ == 7)
      return refuse("codes of " + std::to_string(bits_) +
                    " bits; there are kernels for 1, 2, 3, 4, 6 and 8");
    if (k_ < 1 || n_ < 1) return refuse("K and N must be at least 1");
    if (k_ > INT32_MAX / 64 || n_ > INT32_MAX - 128) return refuse("K or N is too large");
    if (group_ < 16 && group_ < k_)
      return refuse("groups of " + std::to_string(group_) + "; the least is 16, or all of K");
    if (group_ % 4 != 0 && group_ < k_) return refuse("the group is not a multiple of 4");
    if (!std::isfinite(factor_)) return refuse("the factor is not finite");
    return nullptr;
  }

  // What the kernels can know beforehand of levels, bias, zero points and codes.
  ort::OrtStatus* LookAtConstants(const Api& api, const ort::OrtKernelInfo* info) {
    std::array<InputTensor, 6> constants;
    for (const size_t i : {size_t{1}, size_t{3}, size_t{4}, size_t{5}}) {
      bool found = false;
      ONNXQ_RETURN_IF_ERROR(
          GetConstantInput(api, info, first_weight_ + i - 1, &found, &constants[i]));
      if (!found) return nullptr;
    }
    const InputTensor& zeros = constants[3];
    if (Product(zeros.shape, zeros.shape.size()) == 1) {
      int8_t zero = 0;
      ONNXQ_RETURN_IF_ERROR(CopyToHost(api, zeros, &zero, 1));
      if (zero != 0) return Error(api, name_, "a zero point for all must be 0");
    }
    const InputTensor& bias = constants[5];
    if (Product(bias.shape, bias.shape.size()) == 1) {
      float number = 1;
      ONNXQ_RETURN_IF_ERROR(CopyToHost(api, bias, &number, sizeof number));
      no_bias_ = number == 0;
    }
    const InputTensor& levels = constants[4];
    if (Product(levels.shape, levels.shape.size()) != int64_t{1} << bits_) return nullptr;
    std::array<float, 256> numbers{};
    ONNXQ_RETURN_IF_ERROR(CopyToHost(api, levels, numbers.data(), sizeof(float) << bits_));
    int8_levels_ = cuda::HasInt8Levels(numbers.data(), static_cast<int>(bits_));
    const bool has_zeros = zeros.shape != std::vector<int64_t>{1, 1, 1};
    format_ = cuda::ClassifyLevels(numbers.data(), static_cast<int>(bits_), has_zeros, false);
    if (format_.kind != cuda::WeightKind::kE4M3) return nullptr;
    bool nan_codes = false;
    ONNXQ_RETURN_IF_ERROR(FindNanCodes(api, constants[1], &nan_codes));
    if (nan_codes) format_ = {};
    return nullptr;
  }

  ort::OrtStatus* FindNanCodes(const Api& api, const InputTensor& codes, bool* there) const {
    Scratch scratch(api);
    const size_t at = Reserve(&scratch, sizeof(int));
    ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
    int* const found = scratch.Get<int>(at);
    int answer = 0;
    int status = static_cast<int>(cudaMemset(found, 0, sizeof(int)));
    if (status == 0) {
      status = onnxq_cuda_find_nan_codes(static_cast<const uint8_t*>(codes.data),
                                         Product(codes.shape, codes.shape.size()), found, nullptr);
    }
    if (status == 0) {
      status = static_cast<int>(cudaMemcpy(&answer, found, sizeof answer, cudaMemcpyDeviceToHost));
    }
    *there = answer != 0;
    return Check(api, name_, status);
  }

  ort::OrtStatus* SetArgs(const Api& api, const std::array<InputTensor, 6>& inputs,
                          cuda::QuantMatMulArgs* a) const {
    const int64_t panels = cuda::CeilDivide(n_, cuda::kPanel);
    const int64_t count = cuda::CeilDivide(k_, group_);
    const std::vector<int64_t> groups = {panels, count, cuda::kPanel};
    const std::vector<int64_t> expected[] = {
        {},  {panels, cuda::CeilDivide(k_, 4), 16 * bits_}, groups, groups, {int64_t{1} << bits_},
        {n_}};
    const std::vector<int64_t> none[] = {{}, {}, {}, {1, 1, 1}, {}, {1}};
    constexpr const char* kNames[] = {"x", "codes", "scales", "zero_points", "levels", "bias"};
    for (size_t i = 1; i < inputs.size(); ++i) {
      if (inputs[i].shape == expected[i] || (!none[i].empty() && inputs[i].shape == none[i]))
        continue;
      return Error(api, name_,
                   std::string(kNames[i]) + " has shape " + Text(inputs[i].shape) + ", not " +
                       Text(expected[i]) + (none[i].empty() ? "" : " or " + Text(none[i])));
    }
    switch (inputs[2].type) {
      case float32:
        a->scale_type = cuda::ScaleType::kFloat32;
        break;
      case float16:
        a->scale_type = cuda::ScaleType::kFloat16;
        break;
      case bfloat16:
        a->scale_type = cuda::ScaleType::kBfloat16;
        break;
      case ElementType::kFloat8e4m3fn:
        a->scale_type = cuda::ScaleType::kE4M3;
        break;
      case ElementType::kUint8:
        a->scale_type = cuda::ScaleType::kE8M0;
        break;
      case ElementType::kInt16:
        a->scale_type = cuda::ScaleType::kInt16;
        break;
      default:
        return Error(api, name_,
                     "no kernel for scales of element type " +
                         std::to_string(static_cast<int>(inputs[2].type)));
    }
    if ((inputs[2].type == ElementType::kUint8) != (exponent_scales_ != 0))
      return Error(api, name_, "scales are exponents where, and only where, they are uint8");
    if (inputs[2].type == ElementType::kInt16 && !int8_activations())
      return Error(api, name_, "i16 scales are for INT8 activations");
    a->x = inputs[0].data;
    a->codes = static_cast<const uint8_t*>(inputs[1].data);
    a->scales = inputs[2].data;
    // A [1, 1, 1] that is not constant is taken for the 0 that it must hold.
    const bool zeros = inputs[3].shape == groups && groups != std::vector<int64_t>{1, 1, 1};
    a->zero_points = zeros ? static_cast<const int8_t*>(inputs[3].data) : nullptr;
    a->levels = static_cast<const float*>(inputs[4].data);
    a->bias = no_bias_ ? nullptr : static_cast<const float*>(inputs[5].data);
    a->bias_stride = inputs[5].shape[0] == n_ ? 1 : 0;
    a->n = static_cast<int>(n_);
    a->k = static_cast<int>(k_);
    a->group = static_cast<int>(group_ < k_ ? group_ : k_);
    a->groups = static_cast<int>(count);
    a->splits = 1;
    a->bits = static_cast<int>(bits_);
    a->offset = format_.offset;
    a->factor = factor_;
    return nullptr;
  }

  // What the levels can be stored as, to be multiplied by quantized rows.
  cuda::Operands StoredAs() const {
    return int8_activations_ && int8_levels_ ? cuda::Operands::kInt8 : cuda::Operands::kNone;
  }

  ort::OrtStatus* Run(const Api& api, ort::OrtKernelContext* context, cuda::QuantMatMulArgs args,
                      const cuda::Outliers& outliers, const int32_t* order) const {
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    const auto kind = static_cast<int>(format_.kind);
    const int operands = static_cast<int>(StoredAs());
    cuda::Plan plan;
    const int planned = int8_activations_ ? onnxq_cuda_dynamic_plan(&args, kind, kElement<type>,
                                                                    operands, &outliers, &plan)
                                          : onnxq_cuda_plan(&args, kind, kElement<type>, 0, &plan);
    ONNXQ_RETURN_IF_ERROR(Check(api, name_, planned));
    Scratch scratch(api);
    constexpr int64_t kBytes = type == float32 ? 4 : 2;
    const int64_t count = int64_t{args.m} * k_;
    const size_t gather_at = order != nullptr ? Reserve(&scratch, kBytes * count) : 0;
    const size_t plan_at = plan.scratch_bytes > 0 ? Reserve(&scratch, plan.scratch_bytes) : 0;
    if (order != nullptr || plan.scratch_bytes > 0)
      ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
    if (order != nullptr) {
      const cuda::GatherArgs gather = {args.x, order, scratch.Get<char>(gather_at), count, args.k};
      ONNXQ_RETURN_IF_ERROR(Check(api, name_, onnxq_cuda_gather(&gather, kElement<type>, stream)));
      args.x = gather.y;
    }
    void* const memory = plan.scratch_bytes > 0 ? scratch.Get<char>(plan_at) : nullptr;
    return Check(api, name_,
                 int8_activations_
                     ? onnxq_cuda_dynamic_quant_mat_mul(&args, kind, kElement<type>, format_.unit,
                                                        &outliers, &plan, memory, stream)
                     : onnxq_cuda_quant_mat_mul(&args, kind, kElement<type>, format_.unit, &plan,
                                                memory, stream));
  }

  const char* name_ = "";
  size_t first_weight_ = 1;
  int64_t k_ = 0;
  int64_t n_ = 0;
  int64_t group_ = 0;
  int64_t bits_ = 0;
  bool int8_activations_ = false;
  int64_t exponent_scales_ = 0;
  float factor_ = 1;
  bool no_bias_ = false;
  bool int8_levels_ = false;
  cuda::WeightFormat format_;
  Allocator allocator_;
};

}  // namespace onnxq
