// Activations in the form that the products take.
#include "launch_support.cuh"

namespace onnxq::cuda {
namespace {

template <class Bits>
__global__ void __launch_bounds__(kRearrangeThreads) Gather(const GatherArgs a) {
  DeviceBlock block;
  GatherBody<Bits>(block, a);
}

__global__ void __launch_bounds__(kRearrangeThreads) Widen(const WidenArgs a) {
  DeviceBlock block;
  WidenBody(block, a);
}

}  // namespace
}  // namespace onnxq::cuda

using namespace onnxq::cuda;

ONNXQ_CUDA_EXPORT int onnxq_cuda_gather(const GatherArgs* args, int element, cudaStream_t stream) {
  if (args->count == 0) return 0;
  const auto blocks = static_cast<unsigned>(CeilDivide(args->count, kRearrangeThreads));
  return ForElement(element, [&](auto t) {
    using Bits = typename decltype(t)::Bits;
    Gather<Bits><<<blocks, kRearrangeThreads, 0, stream>>>(*args);
    return LaunchStatus();
  });
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_widen(const WidenArgs* args, cudaStream_t stream) {
  if (args->count == 0) return 0;
  const auto blocks = static_cast<unsigned>(CeilDivide(args->count, 4 * kRearrangeThreads));
  Widen<<<blocks, kRearrangeThreads, 0, stream>>>(*args);
  return LaunchStatus();
}
