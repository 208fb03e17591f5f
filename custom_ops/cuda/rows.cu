// Per-token quantization and Hadamard.
#include "launch_support.cuh"

namespace onnxq::cuda {
namespace {

template <class T, class Out>
__global__ void __launch_bounds__(kRowThreads) PerToken(const PerTokenArgs a) {
  DeviceBlock block;
  PerTokenBody<T, Out>(block, a);
}

template <class T>
__global__ void __launch_bounds__(512) HadamardRows(const HadamardArgs a) {
  DeviceBlock block;
  HadamardBody<T>(block, a);
}

template <class T, class Out>
int LaunchPerToken(const PerTokenArgs& a, int rows, cudaStream_t stream) {
  PerToken<T, Out><<<static_cast<unsigned>(rows), kRowThreads, kRowSharedBytes, stream>>>(a);
  return LaunchStatus();
}

}  // namespace

int PrepareRows() {
  for (int element = 0; element < 3; ++element) {
    const int status = ForElement(element, [](auto t) {
      return AllowShared(&HadamardRows<decltype(t)>, HadamardSharedBytes(kMaxHadamardPiece));
    });
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace onnxq::cuda

using namespace onnxq::cuda;

ONNXQ_CUDA_EXPORT int onnxq_cuda_per_token(const PerTokenArgs* args, int rows, int element,
                                           int activations, int floats, cudaStream_t stream) {
  if (rows == 0) return 0;
  if (args->k == 0 || rows < 0) return kErrorArguments;
  const bool float8 = static_cast<Activations>(activations) == Activations::kFloat8;
  if (float8 && floats != 0) return kErrorArguments;
  return ForElement(element, [&](auto t) {
    using T = decltype(t);
    if (float8) return LaunchPerToken<T, Float8Out>(*args, rows, stream);
    if (floats == 0) return LaunchPerToken<T, Int8Out>(*args, rows, stream);
    return LaunchPerToken<T, IntegersOut<T>>(*args, rows, stream);
  });
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_hadamard(const HadamardArgs* args, int element,
                                          cudaStream_t stream) {
  const HadamardArgs& a = *args;
  if (a.count == 0) return 0;
  if (a.piece > kMaxHadamardPiece || a.piece % a.block != 0 || a.count % a.block != 0)
    return kErrorArguments;
  if (a.scales != nullptr && (a.group < 1 || a.count % a.piece != 0)) return kErrorArguments;
  const auto blocks = static_cast<unsigned>(CeilDivide(a.count, a.piece));
  const auto threads = static_cast<unsigned>(HadamardThreads(a.piece));
  const auto shared = static_cast<size_t>(HadamardSharedBytes(a.piece));
  return ForElement(element, [&](auto t) {
    HadamardRows<decltype(t)><<<blocks, threads, shared, stream>>>(a);
    return LaunchStatus();
  });
}
