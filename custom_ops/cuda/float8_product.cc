// Products of FP8 on both sides: which kernels follow which, and which of them ends the product.
#include "launch.h"

#define ONNXQ_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

using namespace onnxq::cuda;

namespace {

bool Fits(const Float8ProductArgs& a) {
  return a.m >= 0 && a.n > 0 && a.k > 0 &&
         (a.block == 0 || (a.block == kFloat8Block && a.k % kFloat8Block == 0));
}

// Codes and scales of the rows of x.
int RoundRows(const Float8ProductArgs& a, uint8_t* q, float* scales, int element,
              OnnxqStream stream) {
  if (a.block != 0) {
    const Float8GroupsArgs groups = {a.x, q, scales, a.m, a.k, a.block};
    return onnxq_cuda_float8_groups(&groups, element, stream);
  }
  const PerTokenArgs rows = {a.x, q, scales, nullptr, a.k};
  return onnxq_cuda_per_token(&rows, a.m, element, static_cast<int>(Activations::kFloat8), 0,
                              stream);
}

// Of cuBLASLt's product all but y and scales.
MatrixProduct ProductOf(const Float8ProductArgs& a, char* workspace) {
  MatrixProduct product;
  product.m = a.m;
  product.n = a.n;
  product.k = a.k;
  product.input = MatrixType::kFloat8e4m3;
  product.x = a.q;
  product.weights = a.weights;
  product.scale_block = a.block;
  product.workspace = workspace;
  return product;
}

// With all scales inside and straight to y, where nothing else is to be added.
int RunScaled(const Float8ProductArgs& a, MatrixProduct product, Element type, OnnxqStream stream) {
  if (a.bias != nullptr || type == Element::kFloat32) return kErrorMatrixLibrary;
  product.output = type == Element::kFloat16 ? MatrixType::kFloat16 : MatrixType::kBfloat16;
  product.y = a.y;
  product.x_scales = a.x_scales;
  product.weights_scales = a.scales;
  return onnxq_cuda_matrix_product(&product, stream);
}

// To float32, scales of blocks inside, which a kernel ends.
int RunAndFinish(const Float8ProductArgs& a, MatrixProduct product, float* products, int element,
                 OnnxqStream stream) {
  product.output = MatrixType::kFloat32;
  product.y = products;
  product.x_scales = a.block == 0 ? nullptr : a.x_scales;
  product.weights_scales = a.block == 0 ? nullptr : a.scales;
  const int status = onnxq_cuda_matrix_product(&product, stream);
  return status != 0 ? status : onnxq_cuda_finish_float8(&a, products, element, stream);
}

}  // namespace

ONNXQ_CUDA_EXPORT int64_t onnxq_cuda_float8_scratch(const Float8ProductArgs* args) {
  return Float8Scratch(*args).bytes;
}

// What cuBLASLt takes on this device is found out once a shape, by asking it.
ONNXQ_CUDA_EXPORT int onnxq_cuda_float8_mat_mul(const Float8ProductArgs* args, int element,
                                                void* scratch, OnnxqStream stream) {
  Float8ProductArgs a = *args;
  if (!Fits(a)) return kErrorArguments;
  if (a.m == 0) return 0;
  if (scratch == nullptr) return kErrorScratch;
  const Float8Scratch parts(a);
  auto* const base = static_cast<char*>(scratch);
  auto* const q = reinterpret_cast<uint8_t*>(base);
  auto* const scales = reinterpret_cast<float*>(base + parts.x_scales);
  int status = RoundRows(a, q, scales, element, stream);
  if (status != 0) return status;
  a.q = q;
  a.x_scales = scales;
  if (a.k % 16 == 0 && a.n % 16 == 0) {
    const MatrixProduct product = ProductOf(a, base + parts.workspace);
    status = RunScaled(a, product, static_cast<Element>(element), stream);
    if (status != kErrorMatrixLibrary) return status;
    auto* const products = reinterpret_cast<float*>(base + parts.products);
    status = RunAndFinish(a, product, products, element, stream);
    if (status != kErrorMatrixLibrary) return status;
  }
  return onnxq_cuda_plain_float8(&a, element, stream);
}
