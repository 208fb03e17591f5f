// The columns of outliers of DynamicQuantMatMul.
#include "launch_support.cuh"

namespace onnxq::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kFindThreads) FindOutliers(const OutlierArgs a) {
  DeviceBlock block;
  FindOutliersBody<T>(block, a);
}

__global__ void __launch_bounds__(kOrderThreads) OrderColumns(const OutlierArgs a) {
  DeviceBlock block;
  OrderColumnsBody(block, a);
}

template <class T>
__global__ void __launch_bounds__(kAddThreads)
    AddOutliers(const QuantMatMulArgs a, const OutlierArgs o) {
  DeviceBlock block;
  AddOutliersBody<T>(block, a, o);
}

}  // namespace
}  // namespace onnxq::cuda

using namespace onnxq::cuda;

ONNXQ_CUDA_EXPORT int onnxq_cuda_find_outliers(const OutlierArgs* args, int element,
                                               cudaStream_t stream) {
  const OutlierArgs& a = *args;
  if (a.k < 1 || a.pieces < 1) return kErrorArguments;
  const dim3 grid(static_cast<unsigned>(CeilDivide(a.k, kFindColumns)),
                  static_cast<unsigned>(a.pieces));
  const int status = ForElement(element, [&](auto t) {
    FindOutliers<decltype(t)><<<grid, kFindThreads, kFindSharedBytes, stream>>>(a);
    return LaunchStatus();
  });
  if (status != 0) return status;
  OrderColumns<<<1, kOrderThreads, kOrderSharedBytes, stream>>>(a);
  return LaunchStatus();
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_add_outliers(const QuantMatMulArgs* args,
                                              const OutlierArgs* outliers, int element,
                                              cudaStream_t stream) {
  const QuantMatMulArgs& a = *args;
  if (a.m == 0) return 0;
  if (a.sums == nullptr) return kErrorScratch;
  const dim3 grid(static_cast<unsigned>(CeilDivide(a.n, kPanel)),
                  static_cast<unsigned>(CeilDivide(a.m, kAddWarps * kAddRows)));
  return ForElement(element, [&](auto t) {
    AddOutliers<decltype(t)><<<grid, kAddThreads, size_t{4} << a.bits, stream>>>(a, *outliers);
    return LaunchStatus();
  });
}
