// Products of INT8 on cuBLASLt: what stands before and behind them.
#include "cublas_lt.h"
#include "launch_support.cuh"

namespace onnxq::cuda {
namespace {

__global__ void __launch_bounds__(kExpandThreads)
    ExpandBytes(const QuantMatMulArgs a, uint8_t* out) {
  DeviceBlock block;
  ExpandBytesBody(block, a, out);
}

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    ScaleIntegers(const QuantMatMulArgs a, const int32_t* products) {
  DeviceBlock block;
  ScaleIntegersBody<T>(block, a, products);
}

int LaunchExpand(const QuantMatMulArgs& a, void* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(CeilDivide(a.n, kPanel)),
                  static_cast<unsigned>(ExpandPieces(a)));
  ExpandBytes<<<grid, kExpandThreads, size_t{1} << a.bits, stream>>>(a, static_cast<uint8_t*>(out));
  return LaunchStatus();
}

// Of the product all but types, y and scales.
MatrixProduct ProductOf(const QuantMatMulArgs& a, const ByteScratch& parts, char* base) {
  MatrixProduct product;
  product.m = a.m;
  product.n = a.n;
  product.k = a.k;
  product.x = a.x;
  product.weights = base;
  product.workspace = base + parts.workspace;
  return product;
}

int RunOnThisDevice(const MatrixProduct& product, cudaStream_t stream) {
  int device = 0;
  const int status = static_cast<int>(cudaGetDevice(&device));
  return status != 0 ? status : RunMatrixProduct(product, device, stream);
}

unsigned Pieces(int64_t count, int threads) {
  return static_cast<unsigned>(CeilDivide(count, threads));
}

}  // namespace

int LaunchIntegers(const QuantMatMulArgs& a, int element, void* scratch, cudaStream_t stream) {
  const ByteScratch parts(a);
  auto* const base = static_cast<char*>(scratch);
  int status = LaunchExpand(a, base, stream);
  if (status != 0) return status;
  auto* const products = reinterpret_cast<int32_t*>(base + parts.products);
  MatrixProduct product = ProductOf(a, parts, base);
  product.input = MatrixType::kInt8;
  product.output = MatrixType::kInt32;
  product.y = products;
  status = RunOnThisDevice(product, stream);
  if (status != 0) return status;
  return ForElement(element, [&](auto t) {
    ScaleIntegers<decltype(t)>
        <<<Pieces(int64_t{a.m} * a.n, kScaleThreads), kScaleThreads, 0, stream>>>(a, products);
    return LaunchStatus();
  });
}

}  // namespace onnxq::cuda
