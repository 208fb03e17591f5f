// The library's entry points: registration, and what Python checks before it hands the library to
// ONNX Runtime.
#include <dlfcn.h>

#include <cstring>
#include <string>

#include "library.h"
#include "ort_float8.h"
#include "ort_products.h"
#include "ort_rows.h"

// Rows of other providers belong to other libraries.
#define ONNXQ_KERNEL(op, since, provider, dtype) ONNXQ_KERNEL_##provider(op, since, dtype)
#define ONNXQ_KERNEL_CPU(op, since, dtype)

namespace onnxq {
namespace {

constexpr const char* kSibling = "libonnxq_ops_cpu.so";

// The library of CPU kernels in the folder of this one, if there is one of the same build. It stays
// loaded: the domain points into it.
void* OpenSibling() {
  Dl_info own{};
  if (dladdr(reinterpret_cast<const void*>(&OpenSibling), &own) == 0) return nullptr;
  const std::string path = own.dli_fname;
  const std::string sibling = path.substr(0, path.rfind('/') + 1) + kSibling;
  void* const handle = dlopen(sibling.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle == nullptr) return nullptr;
  using Version = const char* (*)();
  const auto version = reinterpret_cast<Version>(dlsym(handle, "onnxq_version"));
  return version != nullptr && std::strcmp(version(), ONNXQ_VERSION) == 0 ? handle : nullptr;
}

// Those of the CPU behind our own, so that a CUDA session has kernels for the other operators and
// types. Without that library they run as their bodies.
void AddSibling(const ort::OrtApi* table, Operators* operators) {
  void* const handle = OpenSibling();
  if (handle == nullptr) return;
  using List = size_t (*)(const ort::OrtApi*, const ort::OrtCustomOp* const**);
  const auto list = reinterpret_cast<List>(dlsym(handle, "onnxq_custom_ops"));
  if (list == nullptr) return;
  const ort::OrtCustomOp* const* ops = nullptr;
  const size_t count = list(table, &ops);
  operators->insert(operators->end(), ops, ops + count);
}

Operators AllOperators(const ort::OrtApi* table) {
  static const Api api = Api::Load(table);
  constexpr const char* kProvider = "CUDAExecutionProvider";
#define ONNXQ_KERNEL_CUDA(op, since, dtype) \
  static const CustomOp<op<dtype>> op##_##dtype(&api, kProvider, since);
#include "ops.def"
#undef ONNXQ_KERNEL_CUDA
#define ONNXQ_KERNEL_CUDA(op, since, dtype) &op##_##dtype,
  Operators operators = {
#include "ops.def"
  };
#undef ONNXQ_KERNEL_CUDA
  AddSibling(table, &operators);
  return operators;
}

}  // namespace
}  // namespace onnxq

// Called by ONNX Runtime when the library is registered with a session.
ONNXQ_EXPORT onnxq::ort::OrtStatus* RegisterCustomOps(onnxq::ort::OrtSessionOptions* options,
                                                      const onnxq::ort::OrtApiBase* base) {
  return onnxq::RegisterDomain(options, base, onnxq::AllOperators);
}

// The contract between this library and the Python package: raised when an entry point changes.
ONNXQ_EXPORT const char* onnxq_abi_tag() { return "onnxq-ops-cuda-abi-1"; }

// The version of the package that it was built with.
ONNXQ_EXPORT const char* onnxq_version() { return ONNXQ_VERSION; }

// The kernels of this library as "operator since provider dtype", one a line.
ONNXQ_EXPORT const char* onnxq_kernels() {
#define ONNXQ_KERNEL_CUDA(op, since, dtype) #op " " #since " CUDA " #dtype "\n"
  return ""
#include "ops.def"
      ;
#undef ONNXQ_KERNEL_CUDA
}
