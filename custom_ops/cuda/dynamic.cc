// Products with activations that are quantized on the way: which kernels follow which, and where
// they leave what the next one reads.
#include "launch.h"

#define ONNXQ_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

using namespace onnxq::cuda;

namespace {

int ElementBytes(int element) { return static_cast<Element>(element) == Element::kFloat32 ? 4 : 2; }

// The scratch memory, by addresses.
struct Memory {
  char* base;
  template <class T>
  T* At(int64_t at) const {
    return reinterpret_cast<T*>(base + at);
  }
};

OutlierArgs FoundIn(const QuantMatMulArgs& a, const Outliers& o, const DynamicScratch& parts,
                    const Memory& memory) {
  OutlierArgs found{};
  found.x = a.x;
  found.named = o.named;
  found.found = memory.At<uint8_t>(parts.found);
  found.outlier = memory.At<uint8_t>(parts.outlier);
  found.columns = memory.At<int>(parts.columns);
  found.count = memory.At<int>(parts.count);
  found.m = a.m;
  found.k = a.k;
  found.named_count = o.named_count;
  found.pieces = parts.pieces;
  found.threshold = o.threshold;
  return found;
}

}  // namespace

ONNXQ_CUDA_EXPORT int onnxq_cuda_dynamic_plan(const QuantMatMulArgs* args, int kind, int element,
                                              int operands, const Outliers* outliers, Plan* plan) {
  // The plan asks whether these are there, not for what they hold.
  float there = 0;
  QuantMatMulArgs a = *args;
  const bool adds = outliers->named_count > 0 || outliers->threshold > 0;
  a.row_scale = &there;
  a.sums = adds ? &there : nullptr;
  const int status = onnxq_cuda_plan(&a, kind, element, operands, plan);
  if (status != 0) return status;
  plan->scratch_bytes += DynamicScratch(a, plan->route, ElementBytes(element), *outliers).product;
  return 0;
}

ONNXQ_CUDA_EXPORT int onnxq_cuda_dynamic_quant_mat_mul(const QuantMatMulArgs* args, int kind,
                                                       int element, float unit,
                                                       const Outliers* outliers, const Plan* plan,
                                                       void* scratch, OnnxqStream stream) {
  if (args->m == 0) return 0;
  if (scratch == nullptr) return kErrorScratch;
  const DynamicScratch parts(*args, plan->route, ElementBytes(element), *outliers);
  const Memory memory{static_cast<char*>(scratch)};
  const OutlierArgs found = FoundIn(*args, *outliers, parts, memory);
  int status = parts.adds ? onnxq_cuda_find_outliers(&found, element, stream) : 0;
  if (status != 0) return status;

  PerTokenArgs rows{};
  rows.x = args->x;
  rows.q = memory.base;
  rows.scale = memory.At<float>(parts.row_scale);
  rows.outlier = parts.adds ? found.outlier : nullptr;
  rows.k = args->k;
  // As codes for cuBLASLt, else as floats of x's type, which holds them exactly.
  const int floats = plan->route == Route::kInteger ? 0 : 1;
  status = onnxq_cuda_per_token(&rows, args->m, element, static_cast<int>(Activations::kInt8),
                                floats, stream);
  if (status != 0) return status;

  QuantMatMulArgs a = *args;
  a.x = memory.base;
  a.row_scale = rows.scale;
  a.sums = parts.adds ? memory.At<float>(parts.sums) : nullptr;
  status = onnxq_cuda_quant_mat_mul(&a, kind, element, unit, plan, memory.At<char>(parts.product),
                                    stream);
  if (status != 0 || !parts.adds) return status;
  return onnxq_cuda_add_outliers(&a, &found, element, stream);
}
