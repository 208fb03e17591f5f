// The plain product, the expansion of weights, and the choice among the kernels of QuantMatMul.
#include <atomic>

#include "cublas_lt.h"
#include "launch_support.cuh"

namespace onnxq::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kAnyThreads, 4) Any(const QuantMatMulArgs a) {
  DeviceBlock block;
  AnyBody<T>(block, a);
}

template <class T>
__global__ void __launch_bounds__(kExpandThreads) Expand(const QuantMatMulArgs a, uint16_t* out) {
  DeviceBlock block;
  ExpandBody<T>(block, a, out);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads) FinishSums(const QuantMatMulArgs a) {
  DeviceBlock block;
  SumSplitsBody<T>(block, a, 1.0F);
}

__global__ void __launch_bounds__(256)
    FindNanCodes(const uint8_t* codes, int64_t count, int* found) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    if ((codes[i] & 0x7f) == 0x7f) *found = 1;
  }
}

int LaunchAny(const QuantMatMulArgs& a, int element, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(CeilDivide(a.n, kPanel)),
                  static_cast<unsigned>(CeilDivide(a.m, kAnyRows)));
  const auto shared = static_cast<size_t>(AnySharedBytes(a.bits));
  return ForElement(element, [&](auto t) {
    Any<decltype(t)><<<grid, kAnyThreads, shared, stream>>>(a);
    return LaunchStatus();
  });
}

// The weights as a plain matrix, cuBLASLt's product in float32 where rows have scales or there is a
// bias, and straight to y where not.
template <class T>
int LaunchExpanded(QuantMatMulArgs a, void* scratch, cudaStream_t stream) {
  const ExpandScratch parts(a);
  auto* const base = static_cast<char*>(scratch);
  auto* const weights = reinterpret_cast<uint16_t*>(base);
  const dim3 grid(static_cast<unsigned>(CeilDivide(a.n, kPanel)),
                  static_cast<unsigned>(ExpandPieces(a)));
  Expand<T><<<grid, kExpandThreads, size_t{4} << a.bits, stream>>>(a, weights);
  int status = LaunchStatus();
  if (status != 0) return status;
  MatrixProduct product;
  product.m = a.m;
  product.n = a.n;
  product.k = a.k;
  product.input = T::kIndex == Half::kIndex ? MatrixType::kFloat16 : MatrixType::kBfloat16;
  product.output = parts.finish ? MatrixType::kFloat32 : product.input;
  product.x = a.x;
  product.weights = weights;
  product.y = parts.finish ? static_cast<void*>(base + parts.sums) : a.y;
  product.workspace = base + parts.workspace;
  int device = 0;
  status = static_cast<int>(cudaGetDevice(&device));
  if (status == 0) status = RunMatrixProduct(product, device, stream);
  if (status != 0 || !parts.finish) return status;
  a.partial = reinterpret_cast<float*>(base + parts.sums);
  a.splits = 1;
  a.factor = 1.0F;  // it is in the weights
  const auto blocks = static_cast<unsigned>(CeilDivide(int64_t{a.m} * a.n, kSumThreads));
  FinishSums<T><<<blocks, kSumThreads, 0, stream>>>(a);
  return LaunchStatus();
}

}  // namespace
}  // namespace onnxq::cuda

using namespace onnxq::cuda;

ONNXQ_CUDA_EXPORT int onnxq_cuda_prepare() {
  // The limits belong to a device; each of up to 64 is prepared once.
  static std::atomic<bool> done[64] = {};
  int device = 0;
  int status = static_cast<int>(cudaGetDevice(&device));
  if (status != 0) return status;
  if (device < 64 && done[device]) return 0;
  for (const auto prepare : {PrepareGemv, PrepareTile, PrepareRows}) {
    status = prepare();
    if (status != 0) return status;
  }
  MatrixLibraryThere();
  if (device < 64) done[device] = true;
  return 0;
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_classify(const float* levels, int bits, int zero_points,
                                          int nan_codes, int* offset, float* unit) {
  const WeightFormat format = ClassifyLevels(levels, bits, zero_points != 0, nan_codes != 0);
  *offset = format.offset;
  *unit = format.unit;
  return static_cast<int>(format.kind);
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_plan(const QuantMatMulArgs* args, int kind, int element,
                                      int operands, Plan* plan) {
  int device = 0;
  int multiprocessors = 0;
  int status = static_cast<int>(cudaGetDevice(&device));
  if (status != 0) return status;
  status = static_cast<int>(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (status != 0) return status;
  const int bytes = static_cast<Element>(element) == Element::kFloat32 ? 4 : 2;
  *plan = PlanQuantMatMul(*args, static_cast<WeightKind>(kind), bytes, multiprocessors,
                          MatrixLibraryThere(), static_cast<Operands>(operands));
  return 0;
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_quant_mat_mul(const QuantMatMulArgs* args, int kind, int element,
                                               float unit, const Plan* plan, void* scratch,
                                               cudaStream_t stream) {
  if (args->bits < 1 || args->bits > 8) return kErrorArguments;
  if (plan->scratch_bytes > 0 && scratch == nullptr) return kErrorScratch;
  QuantMatMulArgs a = *args;
  if (a.m == 0) return 0;
  const auto weights = static_cast<WeightKind>(kind);
  a.splits = plan->splits;
  a.partial = plan->splits > 1 ? static_cast<float*>(scratch) : nullptr;
  switch (plan->route) {
    case Route::kAny:
      return LaunchAny(a, element, stream);
    case Route::kExpand:
      if (element == static_cast<int>(Element::kFloat16))
        return LaunchExpanded<Half>(a, scratch, stream);
      if (element == static_cast<int>(Element::kBfloat16))
        return LaunchExpanded<Bfloat>(a, scratch, stream);
      return kErrorArguments;
    case Route::kInteger:
      return LaunchIntegers(a, element, scratch, stream);
    case Route::kGemv:
      a.factor *= unit;
      return LaunchGemv(a, weights, element, *plan, stream);
    case Route::kTile:
      a.factor *= unit;
      return LaunchTile(a, weights, element, *plan, stream);
  }
  return kErrorArguments;
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_matrix_product(const MatrixProduct* product, cudaStream_t stream) {
  if (product->m == 0) return 0;
  int device = 0;
  const int status = static_cast<int>(cudaGetDevice(&device));
  return status != 0 ? status : RunMatrixProduct(*product, device, stream);
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_find_nan_codes(const uint8_t* codes, int64_t count, int* found,
                                                cudaStream_t stream) {
  FindNanCodes<<<512, 256, 0, stream>>>(codes, count, found);
  return LaunchStatus();
}

ONNXQ_CUDA_EXPORT const char* onnxq_cuda_error_text(int code) {
  switch (code) {
    case kErrorArguments:
      return "the arguments do not fit the kernel";
    case kErrorMatrixLibrary:
      return "cuBLASLt is not there or took none of the products";
    case kErrorScratch:
      return "scratch memory is missing";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
