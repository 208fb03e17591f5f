// The library's entry points: registration, and what Python checks before it hands the library to
// ONNX Runtime.
#include <string>

#include "cpu/cpu_kernels.h"
#include "isa.h"

#define ONNXQ_EXPORT extern "C" __attribute__((visibility("default")))

// Rows of other providers belong to other libraries.
#define ONNXQ_KERNEL(op, since, provider, dtype) ONNXQ_KERNEL_##provider(op, since, dtype)
#define ONNXQ_KERNEL_CUDA(op, since, dtype)

namespace onnxq {
namespace {

constexpr const char* kDomain = "com.onnxq";
constexpr const char* kProvider = "CPUExecutionProvider";

// ops.def spells dtypes as Python does.
constexpr ElementType float32 = ElementType::kFloat32;
constexpr ElementType float16 = ElementType::kFloat16;
constexpr ElementType int8 = ElementType::kInt8;
constexpr ElementType uint8 = ElementType::kUint8;
constexpr ElementType int16 = ElementType::kInt16;
constexpr ElementType int32 = ElementType::kInt32;
constexpr ElementType int64 = ElementType::kInt64;

// The domain and its operators, made at the first registration and kept for the life of the
// process: sessions hold plain pointers into it.
class Library {
 public:
  explicit Library(const ort::OrtApi* table) : api_(ort::Api::Load(table)) {}

  ort::OrtStatus* Build() {
    ONNXQ_RETURN_IF_ERROR(api_.CreateCustomOpDomain(kDomain, &domain_));
#define ONNXQ_KERNEL_CPU(op, since, dtype)                                \
  static const CustomOp<op<dtype>> op##_##dtype(&api_, kProvider, since); \
  ONNXQ_RETURN_IF_ERROR(api_.CustomOpDomain_Add(domain_, &op##_##dtype));
#include "ops.def"
#undef ONNXQ_KERNEL_CPU
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
ONNXQ_EXPORT const char* onnxq_abi_tag() { return "onnxq-ops-abi-1"; }

// The version of the package that it was built with.
ONNXQ_EXPORT const char* onnxq_version() { return ONNXQ_VERSION; }

// The registered kernels as "operator since provider dtype", one a line.
ONNXQ_EXPORT const char* onnxq_kernels() {
#define ONNXQ_KERNEL_CPU(op, since, dtype) #op " " #since " CPU " #dtype "\n"
  return ""
#include "ops.def"
      ;
#undef ONNXQ_KERNEL_CPU
}

// The instruction sets that this CPU can run, the worst first, separated by spaces.
ONNXQ_EXPORT const char* onnxq_isa_levels() {
  static const std::string levels = [] {
    std::string names;
    for (int level = 0; level < onnxq::kIsaCount; ++level) {
      const auto isa = static_cast<onnxq::Isa>(level);
      if (onnxq::IsaSupported(isa)) names += (names.empty() ? "" : " ") + std::string(IsaName(isa));
    }
    return names;
  }();
  return levels.c_str();
}
