// Products of operands of one byte, INT8 and FP8, on cuBLASLt: what stands before and behind them.
#include "cublas_lt.h"
#include "launch_support.cuh"

namespace onnxq::cuda {
namespace {

__global__ void __launch_bounds__(kExpandThreads)
    ExpandBytes(const QuantMatMulArgs a, bool as_codes, uint8_t* out) {
  DeviceBlock block;
  ExpandBytesBody(block, a, as_codes, out);
}

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    ScaleIntegers(const QuantMatMulArgs a, const int32_t* products) {
  DeviceBlock block;
  ScaleIntegersBody<T>(block, a, products);
}

__global__ void __launch_bounds__(kColumnThreads)
    ColumnScales(const QuantMatMulArgs a, float factor, float* scales) {
  DeviceBlock block;
  ColumnScalesBody(block, a, factor, scales);
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    ScaleFloats(const QuantMatMulArgs a, const float* products, const float* column_scales) {
  DeviceBlock block;
  ScaleFloatsBody<T>(block, a, products, column_scales);
}

template <class T>
__global__ void __launch_bounds__(kFloat8Threads) Float8Groups(const Float8GroupsArgs a) {
  DeviceBlock block;
  Float8GroupsBody<T>(block, a);
}

int LaunchExpand(const QuantMatMulArgs& a, bool as_codes, void* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(CeilDivide(a.n, kPanel)),
                  static_cast<unsigned>(ExpandPieces(a)));
  ExpandBytes<<<grid, kExpandThreads, size_t{1} << a.bits, stream>>>(a, as_codes,
                                                                     static_cast<uint8_t*>(out));
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
  int status = LaunchExpand(a, false, base, stream);
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

// The scales go into cuBLASLt's product where it takes them and nothing else is to be added; else a
// kernel of ours multiplies by them. Which of both holds for a shape is found out once.
int LaunchFloat8(const QuantMatMulArgs& a, int element, void* scratch, cudaStream_t stream) {
  const ByteScratch parts(a);
  auto* const base = static_cast<char*>(scratch);
  int status = LaunchExpand(a, true, base, stream);
  if (status != 0) return status;
  auto* const scales = reinterpret_cast<float*>(base + parts.scales);
  ColumnScales<<<Pieces(a.n, kColumnThreads), kColumnThreads, 0, stream>>>(a, a.factor, scales);
  status = LaunchStatus();
  if (status != 0) return status;
  MatrixProduct product = ProductOf(a, parts, base);
  product.input = MatrixType::kFloat8e4m3;
  const auto type = static_cast<Element>(element);
  if (a.bias == nullptr && a.sums == nullptr && type != Element::kFloat32) {
    product.output = type == Element::kFloat16 ? MatrixType::kFloat16 : MatrixType::kBfloat16;
    product.y = a.y;
    product.x_scales = a.row_scale;
    product.weights_scales = scales;
    status = RunOnThisDevice(product, stream);
    if (status != kErrorMatrixLibrary) return status;
  }
  auto* const products = reinterpret_cast<float*>(base + parts.products);
  product.output = MatrixType::kFloat32;
  product.y = products;
  product.x_scales = nullptr;
  product.weights_scales = nullptr;
  status = RunOnThisDevice(product, stream);
  if (status != 0) return status;
  return ForElement(element, [&](auto t) {
    ScaleFloats<decltype(t)>
        <<<Pieces(int64_t{a.m} * a.n, kColumnThreads), kColumnThreads, 0, stream>>>(a, products,
                                                                                    scales);
    return LaunchStatus();
  });
}

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
