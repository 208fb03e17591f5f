// Hadamard as ONNX Runtime sees it: checks, shapes, threads, choice of kernel.
#include "hadamard.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cpu_kernels.h"
#include "isa.h"

namespace onnxq {
namespace {

constexpr const char* kName = "Hadamard";

// Blocks are cut into tasks of at least this many elements: below it, a task costs more than it
// does.
constexpr int64_t kElementsPerTask = 32768;

bool IsPowerOfTwo(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

}  // namespace

const HadamardKernels* HadamardKernelsFor(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512vnni:
    case Isa::kAvx512bw:
      return &kHadamardAvx512bw;
    case Isa::kAvx2:
      return &kHadamardAvx2;
#endif
    default:
      return &kHadamardScalar;
  }
}

template <ElementType type>
ort::OrtStatus* Hadamard<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                       Hadamard* kernel) {
  Isa isa;
  std::string error;
  if (!SelectIsa(&isa, &error)) return Error(api, kName, error);
  kernel->kernels_ = HadamardKernelsFor(isa);
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, "block", &kernel->block_));
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "scale", &kernel->scale_));
  if (kernel->block_ < 1) return Error(api, kName, "block must be at least 1");
  if (!std::isfinite(kernel->scale_)) return Error(api, kName, "the scale is not finite");
  return GetAllocator(api, info, &kernel->allocator_);
}

template <ElementType type>
ort::OrtStatus* Hadamard<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  SymbolicShape shape;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
  // Rank 0 also stands for "not known yet"; Compute refuses a true scalar.
  if (shape.dims.empty()) return nullptr;
  // Not `type`: ONNX Runtime asks one kernel of the operator for all of them.
  return SetOutputShape(api, context, 0, shape.type, shape);
}

template <ElementType type>
ort::OrtStatus* Hadamard<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  InputTensor x;
  InputTensor core;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &core));
  if (x.shape.empty() || x.shape.back() % block_ != 0)
    return Error(api, kName,
                 "the last extent of x is no multiple of block = " + std::to_string(block_));
  const int64_t c = core.shape.size() == 2 ? core.shape[0] : 0;
  if (c < 1 || c > kMaxCore || core.shape[1] != c)
    return Error(api, kName, "the core is not [c, c] with c from 1 to 256");
  if (block_ % c != 0 || !IsPowerOfTwo(block_ / c))
    return Error(api, kName,
                 "block = " + std::to_string(block_) + " is not the core's order " +
                     std::to_string(c) + " times a power of two");
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &y));
  const int64_t size = std::accumulate(x.shape.begin(), x.shape.end(), int64_t{1},
                                       [](int64_t a, int64_t b) { return a * b; });
  if (size == 0) return nullptr;
  const auto* signs = static_cast<const float*>(core.data);
  const T* from = static_cast<const T*>(x.data);
  T* to = static_cast<T*>(y);

  Scratch scratch(api);
  const size_t at = scratch.Reserve<float>(type == ElementType::kFloat16 ? size : 0);
  ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
  const int64_t blocks = size / block_;
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / block_);
  const int64_t tasks = (blocks + per_task - 1) / per_task;
  return ParallelFor(api, context, static_cast<size_t>(tasks), [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) * per_task;
    const int64_t count = std::min(per_task, blocks - first);
    const int64_t begin = first * block_;
    const int64_t elements = count * block_;
    if constexpr (type == ElementType::kFloat16) {
      float* wide = scratch.Get<float>(at) + begin;
      kernels_->widen(from + begin, elements, wide);
      kernels_->blocks(wide, count, block_, signs, c, scale_);
      kernels_->narrow(wide, elements, to + begin);
    } else {
      std::memcpy(to + begin, from + begin, static_cast<size_t>(elements) * sizeof(float));
      kernels_->blocks(to + begin, count, block_, signs, c, scale_);
    }
  });
}

template class Hadamard<ElementType::kFloat32>;
template class Hadamard<ElementType::kFloat16>;

}  // namespace onnxq
