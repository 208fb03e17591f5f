// cuBLASLt, found at run time: onnxruntime-gpu brings it, and this library must load without it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxq::cuda {

// cudaDataType_t.
enum class MatrixType : int {
  kFloat32 = 0,
  kFloat16 = 2,
  kInt8 = 3,
  kInt32 = 10,
  kBfloat16 = 14,
  kFloat8e4m3 = 28,
};

inline constexpr int kErrorMatrixLibrary = 100002;
inline constexpr size_t kMatrixWorkspace = size_t{32} << 20;  // what NVIDIA advises for Hopper

// y[m, n] = sum over k of x[m, k] · weights[n, k], all row-major; in float32, or exactly in int32.
// FP8 operands may carry float32 scales: one a row of x and one a row of weights; or, with
// scale_block, one a row of x and 128 of its columns, and one a 128 by 128 block of the weights.
struct MatrixProduct {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  MatrixType input = MatrixType::kFloat16;
  MatrixType output = MatrixType::kFloat16;
  const void* x = nullptr;
  const void* weights = nullptr;
  void* y = nullptr;
  const float* x_scales = nullptr;        // [m] or [k / 128, m], or null
  const float* weights_scales = nullptr;  // [n] or [n / 128, k / 128 rounded up to 4s], or null
  int scale_block = 0;                    // 0 or 128
  void* workspace = nullptr;              // kMatrixWorkspace bytes, 256-byte aligned
};

// Whether cuBLASLt was found; looks for it at the first call.
bool MatrixLibraryThere();

// 0, or kErrorMatrixLibrary. The algorithm for a shape is looked up once and kept.
int RunMatrixProduct(const MatrixProduct& product, int device, void* stream);

}  // namespace onnxq::cuda
