// The plain C interface of the CUDA kernels: pointers to device memory, sizes, a stream. Nothing
// here allocates or waits, so that calls can be captured in a CUDA graph.
//
// Every function returns 0, or a code that onnxq_cuda_error_text explains. custom_ops/cuda_calls.py
// mirrors the structs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float8_product.h"
#include "hadamard.h"
#include "outliers.h"
#include "plan.h"
#include "quantize_block.h"
#include "rearrange.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
using OnnxqStream = cudaStream_t;
#else
using OnnxqStream = void*;
#endif

// Types of activations, as ELEMENT_TYPES of cuda_calls.py numbers them.
namespace onnxq::cuda {
enum class Element : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// What rows of activations are quantized to: INT8, or FP8 E4M3, each row with a scale.
enum class Activations : int { kInt8 = 0, kFloat8 = 1 };

// Codes of our own, beside cudaError_t and cublas_lt.h's kErrorMatrixLibrary.
inline constexpr int kErrorArguments = 100001;
inline constexpr int kErrorScratch = 100003;
}  // namespace onnxq::cuda

extern "C" {

// Prepares the present device: limits of shared memory, cuBLASLt. To be called before any launch,
// outside of stream capture; later calls are cheap.
int onnxq_cuda_prepare();

// CUDA that the library was built with: 1000 · major + 10 · minor.
int onnxq_cuda_runtime_version();

// The WeightKind of levels (host memory), their offset and unit; see ClassifyLevels.
int onnxq_cuda_classify(const float* levels, int bits, int zero_points, int nan_codes, int* offset,
                        float* unit);

// How to run a product on the present device; element is an Element, kind a WeightKind, operands an
// Operands.
int onnxq_cuda_plan(const onnxq::cuda::QuantMatMulArgs* args, int kind, int element, int operands,
                    onnxq::cuda::Plan* plan);

// Runs a plan; `scratch` has plan->scratch_bytes, 256-byte aligned. args->partial is not read. x is
// int8 where the route is kInteger, else of `element`.
int onnxq_cuda_quant_mat_mul(const onnxq::cuda::QuantMatMulArgs* args, int kind, int element,
                             float unit, const onnxq::cuda::Plan* plan, void* scratch,
                             OnnxqStream stream);

// activations is an Activations; floats: 1 writes integers in the type of x, 0 codes.
int onnxq_cuda_per_token(const onnxq::cuda::PerTokenArgs* args, int rows, int element,
                         int activations, int floats, OnnxqStream stream);

// Rows in FP8 with a scale a group of columns.
int onnxq_cuda_float8_groups(const onnxq::cuda::Float8GroupsArgs* args, int element,
                             OnnxqStream stream);

int onnxq_cuda_hadamard(const onnxq::cuda::HadamardArgs* args, int element, OnnxqStream stream);

// The parts of DynamicQuantMatMul. Finds the columns of outliers: writes found, outlier, columns
// and count. Then args->y = args->sums + the product of the outliers that were found.
int onnxq_cuda_find_outliers(const onnxq::cuda::OutlierArgs* args, int element, OnnxqStream stream);
int onnxq_cuda_add_outliers(const onnxq::cuda::QuantMatMulArgs* args,
                            const onnxq::cuda::OutlierArgs* outliers, int element,
                            OnnxqStream stream);

// A product with rows of x quantized to INT8 first, but for columns of outliers: plan and launch,
// as above. Of args, row_scale and sums are not read. operands is an Operands: what the levels can
// be stored as.
int onnxq_cuda_dynamic_plan(const onnxq::cuda::QuantMatMulArgs* args, int kind, int element,
                            int operands, const onnxq::cuda::Outliers* outliers,
                            onnxq::cuda::Plan* plan);
int onnxq_cuda_dynamic_quant_mat_mul(const onnxq::cuda::QuantMatMulArgs* args, int kind,
                                     int element, float unit, const onnxq::cuda::Outliers* outliers,
                                     const onnxq::cuda::Plan* plan, void* scratch,
                                     OnnxqStream stream);

// DynamicFloat8MatMul, from weights as they are; `scratch` has the bytes that the first function
// says, 256-byte aligned. Of args, q and x_scales are not read.
int64_t onnxq_cuda_float8_scratch(const onnxq::cuda::Float8ProductArgs* args);
int onnxq_cuda_float8_mat_mul(const onnxq::cuda::Float8ProductArgs* args, int element,
                              void* scratch, OnnxqStream stream);

// Its parts beside cuBLASLt: what ends products that have no scales of rows yet, and the plain
// kernel.
int onnxq_cuda_finish_float8(const onnxq::cuda::Float8ProductArgs* args, const float* products,
                             int element, OnnxqStream stream);
int onnxq_cuda_plain_float8(const onnxq::cuda::Float8ProductArgs* args, int element,
                            OnnxqStream stream);

// QuantizeBlock; `factors` (device memory for [rows]) is needed for E4M3 scales with factor 0.
int onnxq_cuda_quantize_block(const onnxq::cuda::QuantizeBlockArgs* args, int element,
                              float* factors, OnnxqStream stream);

// A plain product on cuBLASLt: int8 to int32, or FP8 with fused scales of rows or of blocks.
int onnxq_cuda_matrix_product(const onnxq::cuda::MatrixProduct* product, OnnxqStream stream);

// Columns of x in another order; and INT8 numbers as float16.
int onnxq_cuda_gather(const onnxq::cuda::GatherArgs* args, int element, OnnxqStream stream);
int onnxq_cuda_widen(const onnxq::cuda::WidenArgs* args, OnnxqStream stream);

// Sets *found (device memory) to 1 where a byte is a code of E4M3's NaN; it must be 0 before.
int onnxq_cuda_find_nan_codes(const uint8_t* codes, int64_t count, int* found, OnnxqStream stream);

const char* onnxq_cuda_error_text(int code);
}
