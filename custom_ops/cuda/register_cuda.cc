// The CUDA operators as ONNX Runtime sees them: checks, shapes, scratch memory, the stream. And the
// library's entry points. Only host code: kernels are reached through launch.h.
#include <cuda_runtime_api.h>

#include <cmath>
#include <numeric>
#include <string>

#include "launch.h"
#include "op_kernel.h"

#define ONNXQ_EXPORT extern "C" __attribute__((visibility("default")))

// Rows of other providers belong to other libraries.
#define ONNXQ_KERNEL(op, since, provider, dtype) ONNXQ_KERNEL_##provider(op, since, dtype)
#define ONNXQ_KERNEL_CPU(op, since, dtype)

namespace onnxq {
namespace {

constexpr const char* kDomain = "com.onnxq";
constexpr const char* kProvider = "CUDAExecutionProvider";

// ops.def spells dtypes as Python does.
constexpr ElementType float32 = ElementType::kFloat32;
constexpr ElementType float16 = ElementType::kFloat16;
constexpr ElementType bfloat16 = ElementType::kBfloat16;

template <ElementType type>
constexpr int kElement = static_cast<int>(type == float32   ? cuda::Element::kFloat32
                                          : type == float16 ? cuda::Element::kFloat16
                                                            : cuda::Element::kBfloat16);
template <ElementType type>
constexpr int64_t kElementBytes = type == float32 ? 4 : 2;

ort::OrtStatus* Check(const Api& api, const char* op, int code) {
  if (code == 0) return nullptr;
  return Error(api, op, std::string("CUDA: ") + onnxq_cuda_error_text(code), ort::ErrorCode::kFail);
}

ort::OrtStatus* GetStream(const Api& api, const ort::OrtKernelContext* context,
                          OnnxqStream* stream) {
  void* raw = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.KernelContext_GetGPUComputeStream(context, &raw));
  *stream = static_cast<OnnxqStream>(raw);
  return nullptr;
}

int64_t Product(const std::vector<int64_t>& shape, size_t count) {
  return std::accumulate(shape.begin(), shape.begin() + static_cast<int64_t>(count), int64_t{1},
                         [](int64_t a, int64_t b) { return a * b; });
}

// Device memory is cut at multiples of what cudaMalloc gives.
size_t Reserve(Scratch* scratch, int64_t bytes) {
  return scratch->Reserve<char>((bytes + 255) / 256 * 256);
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
    const cuda::PerTokenArgs args = {x.data, q, static_cast<float*>(scale),
                                     static_cast<int>(x.shape.back())};
    return Check(api, kName,
                 onnxq_cuda_per_token(&args, static_cast<int>(rows), kElement<type>, 0, stream));
  }
};

// x: [..., K], core: [c, c] -> y: [..., K].
template <ElementType type>
class Hadamard {
 public:
  static constexpr const char* kName = "Hadamard";
  static constexpr std::array<ElementType, 2> kInputs = {type, float32};
  static constexpr std::array<ElementType, 1> kOutputs = {type};

  static ort::OrtStatus* Create(const Api& api, const ort::OrtKernelInfo* info, Hadamard* kernel) {
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, "block", &kernel->block_));
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "scale", &kernel->scale_));
    if (kernel->block_ < 1) return Error(api, kName, "block must be at least 1");
    if (kernel->block_ > cuda::kMaxHadamardPiece)
      return Error(api, kName,
                   "block = " + std::to_string(kernel->block_) + "; the CUDA kernel takes up to " +
                       std::to_string(cuda::kMaxHadamardPiece),
                   ort::ErrorCode::kNotImplemented);
    if (!std::isfinite(kernel->scale_)) return Error(api, kName, "the scale is not finite");
    return Check(api, kName, onnxq_cuda_prepare());
  }

  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
    SymbolicShape shape;
    ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
    if (shape.dims.empty()) return nullptr;  // not known yet
    return SetOutputShape(api, context, 0, shape.type, shape);
  }

  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    InputTensor x;
    InputTensor core;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &core));
    if (x.shape.empty() || x.shape.back() % block_ != 0)
      return Error(api, kName,
                   "the last extent of x is no multiple of block = " + std::to_string(block_));
    const int64_t c = core.shape.size() == 2 ? core.shape[0] : 0;
    if (c < 1 || c > 256 || core.shape[1] != c)
      return Error(api, kName, "the core is not [c, c] with c from 1 to 256");
    const int64_t rest = block_ / c;
    if (block_ % c != 0 || (rest & (rest - 1)) != 0)
      return Error(api, kName,
                   "block = " + std::to_string(block_) + " is not the core's order " +
                       std::to_string(c) + " times a power of two");
    void* y = nullptr;
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &y));
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    cuda::HadamardArgs args{};
    args.x = x.data;
    args.core = static_cast<const float*>(core.data);
    args.y = y;
    args.count = Product(x.shape, x.shape.size());
    args.block = static_cast<int>(block_);
    args.core_order = static_cast<int>(c);
    args.piece = cuda::HadamardPiece(args.block);
    args.scale = scale_;
    return Check(api, kName, onnxq_cuda_hadamard(&args, kElement<type>, stream));
  }

 private:
  int64_t block_ = 0;
  float scale_ = 1;
};

// x: [..., K] times packed weights -> y: [..., N]; see defs/quant_mat_mul.py.
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
    int64_t layout = 0;
    const std::pair<const char*, int64_t*> integers[] = {
        {"K", &kernel->k_},
        {"N", &kernel->n_},
        {"group", &kernel->group_},
        {"bits", &kernel->bits_},
        {"layout", &layout},
        {"int8_activations", &kernel->int8_activations_},
        {"exponent_scales", &kernel->exponent_scales_}};
    for (const auto& [name, value] : integers) {
      ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, name, value));
    }
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "factor", &kernel->factor_));
    ONNXQ_RETURN_IF_ERROR(kernel->CheckAttributes(api, layout));
    ONNXQ_RETURN_IF_ERROR(Check(api, kName, onnxq_cuda_prepare()));
    ONNXQ_RETURN_IF_ERROR(GetAllocator(api, info, &kernel->allocator_));
    return kernel->LookAtConstants(api, info);
  }

  static ort::OrtStatus* InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
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
    return SetOutputShape(api, context, 0, shape.type, shape);
  }

  ort::OrtStatus* Compute(const Api& api, ort::OrtKernelContext* context) const {
    std::array<InputTensor, 6> inputs;
    for (size_t i = 0; i < inputs.size(); ++i)
      ONNXQ_RETURN_IF_ERROR(GetInput(api, context, i, &inputs[i]));
    InputTensor order;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 6, &order));
    if (order.shape != std::vector<int64_t>{1})
      return Error(api, kName, "the CUDA kernels take no order of columns",
                   ort::ErrorCode::kNotImplemented);
    const InputTensor& x = inputs[0];
    if (x.shape.empty() || x.shape.back() != k_)
      return Error(
          api, kName,
          "x has shape " + Text(x.shape) + "; its last extent must be " + std::to_string(k_));
    cuda::QuantMatMulArgs args{};
    ONNXQ_RETURN_IF_ERROR(SetArgs(api, inputs, &args));
    std::vector<int64_t> shape = x.shape;
    shape.back() = n_;
    ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &args.y));
    const int64_t m = Product(x.shape, x.shape.size() - 1);
    if (m == 0) return nullptr;
    if (m > INT32_MAX) return Error(api, kName, "x has more than 2^31 rows");
    args.m = static_cast<int>(m);
    return Run(api, context, args);
  }

 private:
  ort::OrtStatus* CheckAttributes(const Api& api, int64_t layout) const {
    const auto refuse = [&](const std::string& cause) { return Error(api, kName, cause); };
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
    if (int8_activations_ < 0 || int8_activations_ > 1)
      return Error(api, kName, "the CUDA kernels take int8_activations 0 and 1",
                   ort::ErrorCode::kNotImplemented);
    return nullptr;
  }

  // What the kernels can know beforehand of levels, bias, zero points and codes.
  ort::OrtStatus* LookAtConstants(const Api& api, const ort::OrtKernelInfo* info) {
    std::array<InputTensor, 6> constants;
    for (const size_t i : {size_t{1}, size_t{3}, size_t{4}, size_t{5}}) {
      bool found = false;
      ONNXQ_RETURN_IF_ERROR(GetConstantInput(api, info, i, &found, &constants[i]));
      if (!found) return nullptr;
    }
    const InputTensor& zeros = constants[3];
    if (Product(zeros.shape, zeros.shape.size()) == 1) {
      int8_t zero = 0;
      ONNXQ_RETURN_IF_ERROR(CopyToHost(api, zeros, &zero, 1));
      if (zero != 0) return Error(api, kName, "a zero point for all must be 0");
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
    const bool has_zeros = zeros.shape != std::vector<int64_t>{1, 1, 1};
    format_ = cuda::ClassifyLevels(numbers.data(), static_cast<int>(bits_), has_zeros, false);
    if (format_.kind != cuda::WeightKind::kE4M3) return nullptr;
    bool nan_codes = false;
    ONNXQ_RETURN_IF_ERROR(FindNanCodes(api, constants[1], &nan_codes));
    if (nan_codes) format_ = {};
    return nullptr;
  }

  // From wherever ONNX Runtime keeps the constant.
  static ort::OrtStatus* CopyToHost(const Api& api, const InputTensor& tensor, void* to,
                                    size_t bytes) {
    return Check(api, kName,
                 static_cast<int>(cudaMemcpy(to, tensor.data, bytes, cudaMemcpyDefault)));
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
    return Check(api, kName, status);
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
      return Error(api, kName,
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
      default:
        return Error(api, kName,
                     "no kernel for scales of element type " +
                         std::to_string(static_cast<int>(inputs[2].type)));
    }
    if ((inputs[2].type == ElementType::kUint8) != (exponent_scales_ != 0))
      return Error(api, kName, "scales are exponents where, and only where, they are uint8");
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

  ort::OrtStatus* Run(const Api& api, ort::OrtKernelContext* context,
                      cuda::QuantMatMulArgs args) const {
    OnnxqStream stream{};
    ONNXQ_RETURN_IF_ERROR(GetStream(api, context, &stream));
    Scratch scratch(api);
    const bool integers = int8_activations_ != 0;
    const int64_t rows = args.m;
    const size_t q_at = integers ? Reserve(&scratch, rows * k_ * kElementBytes<type>) : 0;
    const size_t scale_at = integers ? Reserve(&scratch, 4 * rows) : 0;
    const auto kind = static_cast<int>(format_.kind);
    cuda::Plan plan;
    const float placeholder = 1;
    if (integers) args.row_scale = &placeholder;  // counts for the plan, and is set below
    ONNXQ_RETURN_IF_ERROR(Check(api, kName, onnxq_cuda_plan(&args, kind, kElement<type>, &plan)));
    const size_t plan_at = plan.scratch_bytes > 0 ? Reserve(&scratch, plan.scratch_bytes) : 0;
    const bool needed = integers || plan.scratch_bytes > 0;
    if (needed) ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
    if (integers) {
      // The integers as floats of x's type, which holds them exactly.
      const cuda::PerTokenArgs quantize = {args.x, scratch.Get<char>(q_at),
                                           scratch.Get<float>(scale_at), args.k};
      ONNXQ_RETURN_IF_ERROR(
          Check(api, kName, onnxq_cuda_per_token(&quantize, args.m, kElement<type>, 1, stream)));
      args.x = scratch.Get<char>(q_at);
      args.row_scale = scratch.Get<float>(scale_at);
    }
    void* const memory = plan.scratch_bytes > 0 ? scratch.Get<char>(plan_at) : nullptr;
    return Check(
        api, kName,
        onnxq_cuda_quant_mat_mul(&args, kind, kElement<type>, format_.unit, &plan, memory, stream));
  }

  int64_t k_ = 0;
  int64_t n_ = 0;
  int64_t group_ = 0;
  int64_t bits_ = 0;
  int64_t int8_activations_ = 0;
  int64_t exponent_scales_ = 0;
  float factor_ = 1;
  bool no_bias_ = false;
  cuda::WeightFormat format_;
  Allocator allocator_;
};

// The domain and its operators, made at the first registration and kept for the life of the
// process: sessions hold plain pointers into it.
class Library {
 public:
  explicit Library(const ort::OrtApi* table) : api_(ort::Api::Load(table)) {}

  ort::OrtStatus* Build() {
    ONNXQ_RETURN_IF_ERROR(api_.CreateCustomOpDomain(kDomain, &domain_));
#define ONNXQ_KERNEL_CUDA(op, since, dtype)                               \
  static const CustomOp<op<dtype>> op##_##dtype(&api_, kProvider, since); \
  ONNXQ_RETURN_IF_ERROR(api_.CustomOpDomain_Add(domain_, &op##_##dtype));
#include "ops.def"
#undef ONNXQ_KERNEL_CUDA
    return nullptr;
  }

  ort::OrtStatus* AddTo(ort::OrtSessionOptions* options) const {
    return api_.AddCustomOpDomain(options, domain_);
  }

 private:
  ort::Api api_;
  ort::OrtCustomOpDomain* domain_ = nullptr;
};

// Slot 0, CreateStatus, is in every version of the table.
ort::OrtStatus* TooOld(const ort::OrtApiBase* base) {
  const std::string message = std::string("onnxq operators need ONNX Runtime 1.") +
                              std::to_string(ort::kApiVersion) + " or newer, this is " +
                              base->GetVersionString();
  const ort::OrtApi* oldest = base->GetApi(1);
  return ort::Api::Load(oldest).CreateStatus(ort::ErrorCode::kFail, message.c_str());
}

}  // namespace
}  // namespace onnxq

// Called by ONNX Runtime when the library is registered with a session.
ONNXQ_EXPORT onnxq::ort::OrtStatus* RegisterCustomOps(onnxq::ort::OrtSessionOptions* options,
                                                      const onnxq::ort::OrtApiBase* base) {
  using onnxq::ort::OrtStatus;
  const onnxq::ort::OrtApi* table = base->GetApi(onnxq::ort::kApiVersion);
  if (table == nullptr) return onnxq::TooOld(base);
  const onnxq::Api api = onnxq::ort::Api::Load(table);
  return onnxq::Guard(api, "library", [&]() -> OrtStatus* {
    static onnxq::Library library(table);
    static OrtStatus* const built = library.Build();
    if (built != nullptr)
      return onnxq::Error(api, "library", "the operators could not be registered");
    return library.AddTo(options);
  });
}

// The contract between this library and the Python package: raised when an entry point changes.
ONNXQ_EXPORT const char* onnxq_abi_tag() { return "onnxq-ops-cuda-abi-1"; }

// The version of the package that it was built with.
ONNXQ_EXPORT const char* onnxq_version() { return ONNXQ_VERSION; }

// The registered kernels as "operator since provider dtype", one a line.
ONNXQ_EXPORT const char* onnxq_kernels() {
#define ONNXQ_KERNEL_CUDA(op, since, dtype) #op " " #since " CUDA " #dtype "\n"
  return ""
#include "ops.def"
      ;
#undef ONNXQ_KERNEL_CUDA
}
