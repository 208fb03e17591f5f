// What the CUDA operators share towards ONNX Runtime: types, errors, the stream, scratch memory.
#pragma once

#include <numeric>
#include <string>
#include <vector>

#include "launch.h"
#include "op_kernel.h"

namespace onnxq {

// ops.def spells dtypes as Python does.
constexpr ElementType float32 = ElementType::kFloat32;
constexpr ElementType float16 = ElementType::kFloat16;
constexpr ElementType bfloat16 = ElementType::kBfloat16;
constexpr ElementType int8 = ElementType::kInt8;

template <ElementType type>
constexpr int kElement = static_cast<int>(type == float32   ? cuda::Element::kFloat32
                                          : type == float16 ? cuda::Element::kFloat16
                                                            : cuda::Element::kBfloat16);

inline ort::OrtStatus* Check(const Api& api, const char* op, int code) {
  if (code == 0) return nullptr;
  return Error(api, op, std::string("CUDA: ") + onnxq_cuda_error_text(code), ort::ErrorCode::kFail);
}

inline ort::OrtStatus* GetStream(const Api& api, const ort::OrtKernelContext* context,
                                 OnnxqStream* stream) {
  void* raw = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.KernelContext_GetGPUComputeStream(context, &raw));
  *stream = static_cast<OnnxqStream>(raw);
  return nullptr;
}

inline int64_t Product(const std::vector<int64_t>& shape, size_t count) {
  return std::accumulate(shape.begin(), shape.begin() + static_cast<int64_t>(count), int64_t{1},
                         [](int64_t a, int64_t b) { return a * b; });
}

// Device memory is cut at multiples of what cudaMalloc gives.
inline size_t Reserve(Scratch* scratch, int64_t bytes) {
  return scratch->Reserve<char>((bytes + 255) / 256 * 256);
}

}  // namespace onnxq
