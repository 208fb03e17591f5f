// The slice of the ONNX Runtime C ABI that our operators use, declared here because no wheel
// carries the headers. OrtApi is an append-only table of function pointers: a slot never moves once
// released, and GetApi(n) answers null when the runtime is older than API version n. So the whole
// contract is a slot number and a signature for each function.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxq::ort {

// The newest API version whose entries are called: 18 brought KernelInfoGetAllocator.
inline constexpr uint32_t kApiVersion = 18;

struct OrtStatus;
struct OrtValue;
struct OrtAllocator;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtOpAttr;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };

enum class ElementType : int {
  kUndefined = 0,
  kFloat32 = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt16 = 5,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16,
  kFloat8e4m3fn = 17,
};

enum class Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum class AttributeType : int { kInt = 1 };
enum class MemType : int { kDefault = 0 };

// The operator as ONNX Runtime sees it: fields past those of the declared version are not read.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ElementType (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ElementType (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  MemType (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};

// ONNXQ_SLOT(slot, result, name, parameters)
#define ONNXQ_ORT_SLOTS(ONNXQ_SLOT)                                                                \
  ONNXQ_SLOT(0, OrtStatus*, CreateStatus, (ErrorCode, const char* message))                        \
  ONNXQ_SLOT(26, OrtStatus*, CreateCustomOpDomain, (const char* name, OrtCustomOpDomain**))        \
  ONNXQ_SLOT(27, OrtStatus*, CustomOpDomain_Add, (OrtCustomOpDomain*, const OrtCustomOp*))         \
  ONNXQ_SLOT(28, OrtStatus*, AddCustomOpDomain, (OrtSessionOptions*, OrtCustomOpDomain*))          \
  ONNXQ_SLOT(51, OrtStatus*, GetTensorMutableData, (OrtValue*, void** data))                       \
  ONNXQ_SLOT(57, OrtStatus*, CreateTensorTypeAndShapeInfo, (OrtTensorTypeAndShapeInfo**))          \
  ONNXQ_SLOT(58, OrtStatus*, SetTensorElementType, (OrtTensorTypeAndShapeInfo*, ElementType))      \
  ONNXQ_SLOT(59, OrtStatus*, SetDimensions,                                                        \
             (OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t rank))                       \
  ONNXQ_SLOT(60, OrtStatus*, GetTensorElementType,                                                 \
             (const OrtTensorTypeAndShapeInfo*, ElementType*))                                     \
  ONNXQ_SLOT(61, OrtStatus*, GetDimensionsCount, (const OrtTensorTypeAndShapeInfo*, size_t* rank)) \
  ONNXQ_SLOT(62, OrtStatus*, GetDimensions,                                                        \
             (const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t rank))                       \
  ONNXQ_SLOT(63, OrtStatus*, GetSymbolicDimensions,                                                \
             (const OrtTensorTypeAndShapeInfo*, const char** names, size_t rank))                  \
  ONNXQ_SLOT(65, OrtStatus*, GetTensorTypeAndShape,                                                \
             (const OrtValue*, OrtTensorTypeAndShapeInfo**))                                       \
  ONNXQ_SLOT(75, OrtStatus*, AllocatorAlloc, (OrtAllocator*, size_t bytes, void** block))          \
  ONNXQ_SLOT(76, OrtStatus*, AllocatorFree, (OrtAllocator*, void* block))                          \
  ONNXQ_SLOT(85, OrtStatus*, KernelInfoGetAttribute_float,                                         \
             (const OrtKernelInfo*, const char* name, float*))                                     \
  ONNXQ_SLOT(86, OrtStatus*, KernelInfoGetAttribute_int64,                                         \
             (const OrtKernelInfo*, const char* name, int64_t*))                                   \
  ONNXQ_SLOT(90, OrtStatus*, KernelContext_GetInput,                                               \
             (const OrtKernelContext*, size_t index, const OrtValue**))                            \
  ONNXQ_SLOT(91, OrtStatus*, KernelContext_GetOutput,                                              \
             (OrtKernelContext*, size_t index, const int64_t* dims, size_t rank, OrtValue**))      \
  ONNXQ_SLOT(93, void, ReleaseStatus, (OrtStatus*))                                                \
  ONNXQ_SLOT(99, void, ReleaseTensorTypeAndShapeInfo, (OrtTensorTypeAndShapeInfo*))                \
  ONNXQ_SLOT(101, void, ReleaseCustomOpDomain, (OrtCustomOpDomain*))                               \
  ONNXQ_SLOT(132, void, ReleaseAllocator, (OrtAllocator*))                                         \
  ONNXQ_SLOT(193, OrtStatus*, KernelContext_GetGPUComputeStream,                                   \
             (const OrtKernelContext*, void** stream))                                             \
  ONNXQ_SLOT(249, OrtStatus*, KernelInfoGetConstantInput_tensor,                                   \
             (const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue**))             \
  ONNXQ_SLOT(268, OrtStatus*, ShapeInferContext_GetInputTypeShape,                                 \
             (const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo**))             \
  ONNXQ_SLOT(269, OrtStatus*, ShapeInferContext_GetAttribute,                                      \
             (const OrtShapeInferContext*, const char* name, const OrtOpAttr**))                   \
  ONNXQ_SLOT(270, OrtStatus*, ShapeInferContext_SetOutputTypeShape,                                \
             (const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*))        \
  ONNXQ_SLOT(271, OrtStatus*, SetSymbolicDimensions,                                               \
             (OrtTensorTypeAndShapeInfo*, const char** names, size_t rank))                        \
  ONNXQ_SLOT(272, OrtStatus*, ReadOpAttr,                                                          \
             (const OrtOpAttr*, AttributeType, void* data, size_t bytes, size_t* written))         \
  ONNXQ_SLOT(274, OrtStatus*, KernelContext_ParallelFor,                                           \
             (const OrtKernelContext*, void (*task)(void*, size_t), size_t total, size_t batches,  \
              void* user_data))                                                                    \
  ONNXQ_SLOT(278, OrtStatus*, KernelInfoGetAllocator,                                              \
             (const OrtKernelInfo*, MemType, OrtAllocator**))

// The entries by name, read out of the runtime's table once.
struct Api {
#define ONNXQ_FIELD(slot, result, name, parameters) result(*name) parameters;
  ONNXQ_ORT_SLOTS(ONNXQ_FIELD)
#undef ONNXQ_FIELD

  static Api Load(const OrtApi* table) {
    using Entry = void (*)();
    const Entry* entries = reinterpret_cast<const Entry*>(table);
    Api api{};
#define ONNXQ_LOAD(slot, result, name, parameters) \
  api.name = reinterpret_cast<result(*) parameters>(entries[slot]);
    ONNXQ_ORT_SLOTS(ONNXQ_LOAD)
#undef ONNXQ_LOAD
    return api;
  }
};

}  // namespace onnxq::ort
