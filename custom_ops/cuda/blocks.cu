// QuantizeBlock.
#include "launch_support.cuh"

namespace onnxq::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlockThreads) BlockVectors(const QuantizeBlockArgs a) {
  DeviceBlock block;
  BlockVectorsBody<T>(block, a);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) BlockWarps(const QuantizeBlockArgs a) {
  DeviceBlock block;
  BlockWarpsBody<T>(block, a);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    RowFactor(const QuantizeBlockArgs a, float* factors) {
  DeviceBlock block;
  RowFactorBody<T>(block, a, factors);
}

template <class T>
int LaunchQuantizeBlock(QuantizeBlockArgs a, float* factors, cudaStream_t stream) {
  if (a.format.scale == BlockScale::kE4M3 && a.format.factor == 0) {
    if (factors == nullptr) return kErrorScratch;
    RowFactor<T>
        <<<static_cast<unsigned>(a.rows), kRowThreads, kRowSharedBytes, stream>>>(a, factors);
    const int status = LaunchStatus();
    if (status != 0) return status;
    a.factors = factors;
  }
  if (BlockLanes<T>(a) > 0) {
    const int64_t words = a.rows * a.k / kVector<T>;
    const auto grid = static_cast<unsigned>(CeilDivide(words, kBlockThreads));
    BlockVectors<T><<<grid, kBlockThreads, 0, stream>>>(a);
  } else {
    const auto grid = static_cast<unsigned>(CeilDivide(a.rows * BlocksOfRow(a), kBlockWarps));
    BlockWarps<T><<<grid, kBlockThreads, 0, stream>>>(a);
  }
  return LaunchStatus();
}

}  // namespace
}  // namespace onnxq::cuda

using namespace onnxq::cuda;

ONNXQ_CUDA_EXPORT int onnxq_cuda_quantize_block(const QuantizeBlockArgs* args, int element,
                                                float* factors, cudaStream_t stream) {
  const QuantizeBlockArgs& a = *args;
  if (a.rows == 0 || a.k == 0) return 0;
  if (a.rows < 0 || a.block < 1 || a.block > a.k) return kErrorArguments;
  return ForElement(element,
                    [&](auto t) { return LaunchQuantizeBlock<decltype(t)>(a, factors, stream); });
}
