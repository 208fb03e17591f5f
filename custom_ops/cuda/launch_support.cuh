// What the files of launch functions share.
#pragma once

#include "launch.h"

#define ONNXQ_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace onnxq::cuda {

// The code of the launch just made; does not wait.
inline int LaunchStatus() { return static_cast<int>(cudaGetLastError()); }

// Lets a kernel use more than 48 KB of shared memory.
template <class Kernel>
int AllowShared(Kernel* kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return 0;
  return static_cast<int>(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(bytes)));
}

// f(T()) for the type of activations that has a number.
template <class F>
int ForElement(int element, const F& f) {
  switch (static_cast<Element>(element)) {
    case Element::kFloat32:
      return f(Float());
    case Element::kFloat16:
      return f(Half());
    case Element::kBfloat16:
      return f(Bfloat());
  }
  return kErrorArguments;
}

// Parts of onnxq_cuda_prepare and of onnxq_cuda_quant_mat_mul, each in its file.
int PrepareGemv();
int PrepareTile();
int PrepareRows();
int LaunchGemv(const QuantMatMulArgs& a, WeightKind kind, int element, const Plan& plan,
               cudaStream_t stream);
int LaunchTile(const QuantMatMulArgs& a, WeightKind kind, int element, const Plan& plan,
               cudaStream_t stream);
int LaunchIntegers(const QuantMatMulArgs& a, int element, void* scratch, cudaStream_t stream);

}  // namespace onnxq::cuda
