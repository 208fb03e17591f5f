// The kernels of FP8 on both sides, and the launches that float8_product.cc makes of them, on
// memory of the CPU. cuBLASLt is a loop, which refuses what a test tells it to.
#include <vector>

#include "emulate.h"

namespace onnxq::cuda {
namespace {

// What cuBLASLt takes, bits: 1 scales of rows, 2 scales of blocks, 4 no scales.
int taken = 7;
std::string calls;  // what ran, a letter each

template <class T>
void RunFloat8Groups(const Float8GroupsArgs& a) {
  Memory memory;
  memory.Input(a.x, a.rows * a.k * static_cast<int>(sizeof(typename T::Bits)));
  memory.Output(a.q, a.rows * a.k);
  memory.Output(a.scale, a.rows * (a.k / a.group) * 4);
  RunGrid(&memory, static_cast<int>(CeilDivide(a.rows * a.k / kVector<T>, kFloat8Threads)), 1, 1,
          kFloat8Threads, [&](HostBlock& block) { Float8GroupsBody<T>(block, a); });
  memory.CheckComplete();
}

template <class T>
void Declare(Memory* memory, const Float8ProductArgs& a) {
  const int64_t groups = a.block == 0 ? 1 : a.k / a.block;
  const int64_t scales = a.block == 0 ? a.n : CeilDivide(a.n, a.block) * Float8ScaleStride(a.k);
  memory->Input(a.scales, 4 * scales);
  if (a.bias != nullptr) memory->Input(a.bias, a.bias_stride == 0 ? 4 : 4 * a.n);
  memory->Input(a.x_scales, 4 * groups * a.m);
  memory->Output(a.y, int64_t{a.m} * a.n * static_cast<int>(sizeof(typename T::Bits)));
}

float Scale(const MatrixProduct& p, int64_t row, int64_t column, int64_t k) {
  if (p.x_scales == nullptr) return 1;
  if (p.scale_block == 0) return p.x_scales[row] * p.weights_scales[column];
  const int64_t stride = Float8ScaleStride(static_cast<int>(p.k));
  return p.x_scales[k / 128 * p.m + row] * p.weights_scales[column / 128 * stride + k / 128];
}

void StoreNumber(const MatrixProduct& p, int64_t at, float value) {
  if (p.output == MatrixType::kFloat32) static_cast<float*>(p.y)[at] = value;
  if (p.output == MatrixType::kFloat16) static_cast<uint16_t*>(p.y)[at] = Half::From(value);
  if (p.output == MatrixType::kBfloat16) static_cast<uint16_t*>(p.y)[at] = Bfloat::From(value);
}

}  // namespace

}  // namespace onnxq::cuda

using namespace onnxq::cuda;

ONNXQ_EXPORT const char* emulate_float8_groups(const Float8GroupsArgs* a, int type) {
  return Guard([&] { ForType(type, [&](auto t) { RunFloat8Groups<decltype(t)>(*a); }); });
}

// The launch function as it is, with a cuBLASLt that takes so much; `ran` gets what it called: s a
// product with scales inside, u one without, f its end, p the plain kernel.
ONNXQ_EXPORT const char* emulate_float8_mat_mul(const Float8ProductArgs* a, int type, int takes,
                                                void* scratch, char* ran) {
  return Guard([&] {
    taken = takes;
    calls.clear();
    const int status = onnxq_cuda_float8_mat_mul(a, type, scratch, nullptr);
    if (status != 0) throw std::runtime_error("code " + std::to_string(status));
    std::copy(calls.begin(), calls.end(), ran);
  });
}

extern "C" {

int onnxq_cuda_float8_groups(const Float8GroupsArgs* args, int element, OnnxqStream) {
  return emulate_float8_groups(args, element) == nullptr ? 0 : 1;
}

int onnxq_cuda_finish_float8(const Float8ProductArgs* args, const float* products, int element,
                             OnnxqStream) {
  const Float8ProductArgs& a = *args;
  calls += 'f';
  ForType(element, [&](auto t) {
    using T = decltype(t);
    Memory memory;
    Declare<T>(&memory, a);
    memory.Input(products, int64_t{a.m} * a.n * 4);
    RunGrid(&memory, static_cast<int>(CeilDivide(int64_t{a.m} * a.n, kFloat8Threads)), 1, 1,
            kFloat8Threads, [&](HostBlock& block) { FinishFloat8Body<T>(block, a, products); });
    memory.CheckComplete();
  });
  return 0;
}

int onnxq_cuda_plain_float8(const Float8ProductArgs* args, int element, OnnxqStream) {
  const Float8ProductArgs& a = *args;
  calls += 'p';
  ForType(element, [&](auto t) {
    using T = decltype(t);
    Memory memory;
    Declare<T>(&memory, a);
    memory.Input(a.q, int64_t{a.m} * a.k);
    memory.Input(a.weights, int64_t{a.n} * a.k);
    RunGrid(&memory, static_cast<int>(CeilDivide(a.m, kFloat8Tile)),
            static_cast<int>(CeilDivide(a.n, kFloat8Tile)), 1, kFloat8Threads,
            [&](HostBlock& block) { PlainFloat8Body<T>(block, a); });
    memory.CheckComplete();
  });
  return 0;
}

int onnxq_cuda_matrix_product(const MatrixProduct* product, OnnxqStream) {
  const MatrixProduct& p = *product;
  const int kind = p.x_scales == nullptr ? 4 : p.scale_block == 0 ? 1 : 2;
  if ((taken & kind) == 0) return kErrorMatrixLibrary;
  calls += p.x_scales == nullptr ? 'u' : 's';
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    const auto* const x = static_cast<const uint8_t*>(p.x) + i / p.n * p.k;
    const auto* const w = static_cast<const uint8_t*>(p.weights) + i % p.n * p.k;
    double sum = 0;
    for (int64_t k = 0; k < p.k; ++k) {
      sum += static_cast<double>(FromE4M3(x[k])) * FromE4M3(w[k]) * Scale(p, i / p.n, i % p.n, k);
    }
    StoreNumber(p, i, static_cast<float>(sum));
  }
  return 0;
}
}
