// FP8 of both sides: rows by groups, and what stands behind and beside cuBLASLt's products.
#include "launch_support.cuh"

namespace onnxq::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kFloat8Threads) Float8Groups(const Float8GroupsArgs a) {
  DeviceBlock block;
  Float8GroupsBody<T>(block, a);
}

template <class T>
__global__ void __launch_bounds__(kFloat8Threads)
    FinishFloat8(const Float8ProductArgs a, const float* products) {
  DeviceBlock block;
  FinishFloat8Body<T>(block, a, products);
}

template <class T>
__global__ void __launch_bounds__(kFloat8Threads) PlainFloat8(const Float8ProductArgs a) {
  DeviceBlock block;
  PlainFloat8Body<T>(block, a);
}

unsigned Pieces(int64_t count, int size) { return static_cast<unsigned>(CeilDivide(count, size)); }

}  // namespace

}  // namespace onnxq::cuda

using namespace onnxq::cuda;

ONNXQ_CUDA_EXPORT int onnxq_cuda_float8_groups(const Float8GroupsArgs* args, int element,
                                               cudaStream_t stream) {
  const Float8GroupsArgs& a = *args;
  if (a.rows == 0 || a.k == 0) return 0;
  return ForElement(element, [&](auto t) {
    using T = decltype(t);
    const int lanes = a.group / kVector<T>;
    const bool fits = a.rows > 0 && lanes >= 1 && lanes <= kWarp && (lanes & (lanes - 1)) == 0 &&
                      a.group == lanes * kVector<T> && a.k % a.group == 0;
    if (!fits) return kErrorArguments;
    const unsigned blocks = Pieces(a.rows * a.k / kVector<T>, kFloat8Threads);
    Float8Groups<T><<<blocks, kFloat8Threads, 0, stream>>>(a);
    return LaunchStatus();
  });
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_finish_float8(const Float8ProductArgs* args, const float* products,
                                               int element, cudaStream_t stream) {
  const Float8ProductArgs& a = *args;
  return ForElement(element, [&](auto t) {
    FinishFloat8<decltype(t)>
        <<<Pieces(int64_t{a.m} * a.n, kFloat8Threads), kFloat8Threads, 0, stream>>>(a, products);
    return LaunchStatus();
  });
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_plain_float8(const Float8ProductArgs* args, int element,
                                              cudaStream_t stream) {
  const Float8ProductArgs& a = *args;
  const dim3 grid(Pieces(a.m, kFloat8Tile), Pieces(a.n, kFloat8Tile));
  return ForElement(element, [&](auto t) {
    PlainFloat8<decltype(t)><<<grid, kFloat8Threads, kFloat8SharedBytes, stream>>>(a);
    return LaunchStatus();
  });
}
