#include "decoders.cuh"

namespace onnxq::cuda {
namespace {

template <class T, class Decoder>
__global__ void __launch_bounds__(kGemvThreads, 2) Gemv(const QuantMatMulArgs a) {
  DeviceBlock block;
  GemvBody<T, Decoder>(block, a);
}

}  // namespace

int PrepareGemv() {
  return ForEveryDecoder([](auto t, auto decoder) {
    return AllowShared(&Gemv<decltype(t), decltype(decoder)>, kMaxGemvSharedBytes);
  });
}

int LaunchGemv(const QuantMatMulArgs& a, WeightKind kind, int element, const Plan& plan,
               cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(CeilDivide(a.n, kPanel)),
                  static_cast<unsigned>(CeilDivide(a.m, kGemvRows)));
  return ForDecoder(element, kind, [&](auto t, auto decoder) {
    Gemv<decltype(t), decltype(decoder)>
        <<<grid, kGemvThreads, static_cast<size_t>(plan.shared_bytes), stream>>>(a);
    return LaunchStatus();
  });
}

}  // namespace onnxq::cuda
