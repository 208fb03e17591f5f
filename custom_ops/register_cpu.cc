// The library's entry points: registration, and what Python checks before it hands the library to
// ONNX Runtime.
#include <string>

#include "cpu/cpu_kernels.h"
#include "isa.h"
#include "library.h"

// Rows of other providers belong to other libraries.
#define ONNXQ_KERNEL(op, since, provider, dtype) ONNXQ_KERNEL_##provider(op, since, dtype)
#define ONNXQ_KERNEL_CUDA(op, since, dtype)

namespace onnxq {
namespace {

// ops.def spells dtypes as Python does.
constexpr ElementType float32 = ElementType::kFloat32;
constexpr ElementType float16 = ElementType::kFloat16;
constexpr ElementType int8 = ElementType::kInt8;
constexpr ElementType uint8 = ElementType::kUint8;
constexpr ElementType int16 = ElementType::kInt16;
constexpr ElementType int32 = ElementType::kInt32;
constexpr ElementType int64 = ElementType::kInt64;

Operators OwnOperators(const ort::OrtApi* table) {
  static const Api api = Api::Load(table);
  constexpr const char* kProvider = "CPUExecutionProvider";
#define ONNXQ_KERNEL_CPU(op, since, dtype) \
  static const CustomOp<op<dtype>> op##_##dtype(&api, kProvider, since);
#include "ops.def"
#undef ONNXQ_KERNEL_CPU
#define ONNXQ_KERNEL_CPU(op, since, dtype) &op##_##dtype,
  return {
#include "ops.def"
  };
#undef ONNXQ_KERNEL_CPU
}

}  // namespace
}  // namespace onnxq

// Called by ONNX Runtime when the library is registered with a session.
ONNXQ_EXPORT onnxq::ort::OrtStatus* RegisterCustomOps(onnxq::ort::OrtSessionOptions* options,
                                                      const onnxq::ort::OrtApiBase* base) {
  return onnxq::RegisterDomain(options, base, onnxq::OwnOperators);
}

// The operators for a library that registers them together with its own: how many, and where.
ONNXQ_EXPORT size_t onnxq_custom_ops(const onnxq::ort::OrtApi* table,
                                     const onnxq::ort::OrtCustomOp* const** ops) {
  static const onnxq::Operators operators = onnxq::OwnOperators(table);
  *ops = operators.data();
  return operators.size();
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
