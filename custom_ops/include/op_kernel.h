// What every operator shares: errors, tensor views, ORT's thread pool, and the table of callbacks.
//
// A kernel class declares
//   static constexpr const char* kName;                    operator name in domain com.onnxq
//   static constexpr std::array<ElementType, n> kInputs;   element type of each input; kUndefined
//                                                          takes any, and the kernel must check
//   static constexpr std::array<ElementType, n> kOutputs;  element type of each output
//   static OrtStatus* Create(const Api&, const OrtKernelInfo*, Kernel*);   reads attributes
//   OrtStatus* Compute(const Api&, OrtKernelContext*) const;
//   static OrtStatus* InferShapes(const Api&, OrtShapeInferContext*);
// and CustomOp<Kernel> turns it into an OrtCustomOp. No exception leaves these callbacks.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"

#define ONNXQ_RETURN_IF_ERROR(expression)                                \
  do {                                                                   \
    if (::onnxq::ort::OrtStatus* status_ = (expression)) return status_; \
  } while (false)

namespace onnxq {

using ort::Api;
using ort::ElementType;

// An error that names the operator and the cause.
inline ort::OrtStatus* Error(const Api& api, const char* op, const std::string& cause,
                             ort::ErrorCode code = ort::ErrorCode::kInvalidArgument) {
  return api.CreateStatus(code, (std::string("com.onnxq:") + op + ": " + cause).c_str());
}

// A shape as messages show it.
inline std::string Text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + "]";
}

// Runs `body` and turns any exception into an error: the C ABI cannot carry one.
template <class Body>
ort::OrtStatus* Guard(const Api& api, const char* op, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    return Error(api, op, error.what(), ort::ErrorCode::kFail);
  } catch (...) {
    return Error(api, op, "unknown C++ exception", ort::ErrorCode::kFail);
  }
}

// Releases a shape object with the runtime that made it.
struct ReleaseShapeInfo {
  const Api* api;
  void operator()(ort::OrtTensorTypeAndShapeInfo* info) const {
    api->ReleaseTensorTypeAndShapeInfo(info);
  }
};
using ShapeInfo = std::unique_ptr<ort::OrtTensorTypeAndShapeInfo, ReleaseShapeInfo>;

// A dense row-major input. `data` may be null when an extent is 0.
struct InputTensor {
  const void* data = nullptr;
  ElementType type = ElementType::kUndefined;
  std::vector<int64_t> shape;
};

inline ort::OrtStatus* ViewTensor(const Api& api, const ort::OrtValue* value, InputTensor* tensor) {
  ort::OrtTensorTypeAndShapeInfo* raw = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &raw));
  const ShapeInfo info(raw, ReleaseShapeInfo{&api});
  size_t rank = 0;
  ONNXQ_RETURN_IF_ERROR(api.GetTensorElementType(info.get(), &tensor->type));
  ONNXQ_RETURN_IF_ERROR(api.GetDimensionsCount(info.get(), &rank));
  tensor->shape.resize(rank);
  ONNXQ_RETURN_IF_ERROR(api.GetDimensions(info.get(), tensor->shape.data(), rank));
  void* data = nullptr;
  // The table has no accessor for const data; the kernel only reads it.
  ONNXQ_RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<ort::OrtValue*>(value), &data));
  tensor->data = data;
  return nullptr;
}

inline ort::OrtStatus* GetInput(const Api& api, const ort::OrtKernelContext* context, size_t index,
                                InputTensor* tensor) {
  const ort::OrtValue* value = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.KernelContext_GetInput(context, index, &value));
  return ViewTensor(api, value, tensor);
}

// The input when it is a constant of the model, which then lives as long as the kernel; `found`
// says whether it is.
inline ort::OrtStatus* GetConstantInput(const Api& api, const ort::OrtKernelInfo* info,
                                        size_t index, bool* found, InputTensor* tensor) {
  int is_constant = 0;
  const ort::OrtValue* value = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  *found = is_constant != 0 && value != nullptr;
  return *found ? ViewTensor(api, value, tensor) : nullptr;
}

// ONNX Runtime's allocator for this kernel, arena included.
struct ReleaseAllocator {
  const Api* api;
  void operator()(ort::OrtAllocator* allocator) const { api->ReleaseAllocator(allocator); }
};
using Allocator = std::unique_ptr<ort::OrtAllocator, ReleaseAllocator>;

inline ort::OrtStatus* GetAllocator(const Api& api, const ort::OrtKernelInfo* info,
                                    Allocator* allocator) {
  ort::OrtAllocator* raw = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAllocator(info, ort::MemType::kDefault, &raw));
  *allocator = Allocator(raw, ReleaseAllocator{&api});
  return nullptr;
}

// Memory for the length of one Compute, cut into parts that begin at multiples of 64 bytes.
class Scratch {
 public:
  explicit Scratch(const Api& api) : api_(api) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_ == nullptr) return;
    if (ort::OrtStatus* const status = api_.AllocatorFree(allocator_, block_)) {
      api_.ReleaseStatus(status);
    }
  }

  // Reserves room for `count` elements of T; Get with the answer gives the address after Allocate.
  template <class T>
  size_t Reserve(int64_t count) {
    const size_t at = size_;
    size_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }

  ort::OrtStatus* Allocate(ort::OrtAllocator* allocator) {
    allocator_ = allocator;
    ONNXQ_RETURN_IF_ERROR(api_.AllocatorAlloc(allocator, size_ + 63, &block_));
    base_ = static_cast<char*>(block_) + (64 - reinterpret_cast<uintptr_t>(block_) % 64) % 64;
    return nullptr;
  }

  template <class T>
  T* Get(size_t at) const {
    return reinterpret_cast<T*>(base_ + at);
  }

 private:
  const Api& api_;
  ort::OrtAllocator* allocator_ = nullptr;
  void* block_ = nullptr;
  char* base_ = nullptr;
  size_t size_ = 0;
};

inline ort::OrtStatus* MakeOutput(const Api& api, ort::OrtKernelContext* context, size_t index,
                                  const std::vector<int64_t>& shape, void** data) {
  ort::OrtValue* value = nullptr;
  ONNXQ_RETURN_IF_ERROR(
      api.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  return api.GetTensorMutableData(value, data);
}

// Calls task(i) for i in [0, total) on ORT's own thread pool, and on no other.
template <class Task>
ort::OrtStatus* ParallelFor(const Api& api, const ort::OrtKernelContext* context, size_t total,
                            const Task& task) {
  if (total <= 1) {
    if (total == 1) task(0);
    return nullptr;
  }
  const auto call = [](void* data, size_t index) { (*static_cast<const Task*>(data))(index); };
  return api.KernelContext_ParallelFor(context, call, total, 0, const_cast<Task*>(&task));
}

// The shape of a graph value while shapes are inferred: an extent is -1 where it is not known, and
// then `names` may hold its symbol (an empty string where it has none).
struct SymbolicShape {
  ElementType type = ElementType::kUndefined;
  std::vector<int64_t> dims;
  std::vector<std::string> names;
};

inline ort::OrtStatus* GetInputShape(const Api& api, const ort::OrtShapeInferContext* context,
                                     size_t index, SymbolicShape* shape) {
  ort::OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
  ONNXQ_RETURN_IF_ERROR(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  ONNXQ_RETURN_IF_ERROR(api.GetTensorElementType(info, &shape->type));
  ONNXQ_RETURN_IF_ERROR(api.GetDimensionsCount(info, &rank));
  shape->dims.resize(rank);
  std::vector<const char*> names(rank, nullptr);
  ONNXQ_RETURN_IF_ERROR(api.GetDimensions(info, shape->dims.data(), rank));
  ONNXQ_RETURN_IF_ERROR(api.GetSymbolicDimensions(info, names.data(), rank));
  shape->names.clear();
  for (const char* name : names) shape->names.emplace_back(name == nullptr ? "" : name);
  return nullptr;
}

// An unknown extent without a name would be taken for the number -1, and refused where a Reshape
// reads it: it gets a name of its own.
inline std::string FreshSymbol() {
  static std::atomic<uint64_t> count{0};
  return "onnxq_unknown_" + std::to_string(count++);
}

inline ort::OrtStatus* SetOutputShape(const Api& api, const ort::OrtShapeInferContext* context,
                                      size_t index, ElementType type, SymbolicShape shape) {
  for (size_t i = 0; i < shape.dims.size(); ++i) {
    if (shape.dims[i] < 0 && shape.names[i].empty()) shape.names[i] = FreshSymbol();
  }
  ort::OrtTensorTypeAndShapeInfo* raw = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.CreateTensorTypeAndShapeInfo(&raw));
  const ShapeInfo info(raw, ReleaseShapeInfo{&api});
  std::vector<const char*> names;
  for (const std::string& symbol : shape.names) names.push_back(symbol.c_str());
  ONNXQ_RETURN_IF_ERROR(api.SetTensorElementType(info.get(), type));
  ONNXQ_RETURN_IF_ERROR(api.SetDimensions(info.get(), shape.dims.data(), shape.dims.size()));
  ONNXQ_RETURN_IF_ERROR(api.SetSymbolicDimensions(info.get(), names.data(), names.size()));
  return api.ShapeInferContext_SetOutputTypeShape(context, index, info.get());
}

// One kernel class as ONNX Runtime sees it.
template <class Kernel>
struct CustomOp : ort::OrtCustomOp {
  CustomOp(const Api* runtime, const char* execution_provider, int since_version)
      : ort::OrtCustomOp{}, api(runtime), provider(execution_provider), since(since_version) {
    version = ort::kApiVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return Self(op).provider; };
    GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::kInputs[i]; };
    GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kInputs.size(); };
    GetOutputType = [](const OrtCustomOp*, size_t i) { return Kernel::kOutputs[i]; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::kOutputs.size(); };
    GetInputCharacteristic = Required;
    GetOutputCharacteristic = Required;
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ort::MemType::kDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    CreateKernelV2 = Create;
    KernelComputeV2 = Compute;
    KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
    InferOutputShape = [](const OrtCustomOp* op, ort::OrtShapeInferContext* context) {
      const Api& runtime = *Self(op).api;
      return Guard(runtime, Kernel::kName, [&] { return Kernel::InferShapes(runtime, context); });
    };
    GetStartVersion = [](const OrtCustomOp* op) { return Self(op).since; };
    // Not bounded above: a later domain version keeps the meaning unless ops.def raises `since`.
    GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  }

  const Api* api;
  const char* provider;
  int since;

 private:
  struct Instance {
    const Api* api;
    Kernel kernel;
  };

  static const CustomOp& Self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

  static ort::Characteristic Required(const OrtCustomOp*, size_t) {
    return ort::Characteristic::kRequired;
  }

  static ort::OrtStatus* Create(const OrtCustomOp* op, const ort::OrtApi*,
                                const ort::OrtKernelInfo* info, void** kernel) {
    const Api& runtime = *Self(op).api;
    return Guard(runtime, Kernel::kName, [&]() -> ort::OrtStatus* {
      auto instance = std::make_unique<Instance>(Instance{&runtime, Kernel{}});
      ONNXQ_RETURN_IF_ERROR(Kernel::Create(runtime, info, &instance->kernel));
      *kernel = instance.release();
      return nullptr;
    });
  }

  static ort::OrtStatus* Compute(void* kernel, ort::OrtKernelContext* context) {
    const Instance& instance = *static_cast<const Instance*>(kernel);
    return Guard(*instance.api, Kernel::kName,
                 [&] { return instance.kernel.Compute(*instance.api, context); });
  }
};

}  // namespace onnxq
