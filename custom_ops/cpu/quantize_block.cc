// QuantizeBlock as ONNX Runtime sees it: checks, shapes, threads, choice of kernel.
#include "quantize_block.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "block_attributes.h"
#include "cpu_kernels.h"
#include "hadamard.h"

namespace onnxq {
namespace {

constexpr const char* kName = "QuantizeBlock";

// Rows are put together to tasks of about this many elements: below it, a task costs more than it
// does.
constexpr int64_t kElementsPerTask = 16384;

}  // namespace

QuantizeRow QuantizeRowFor(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512vnni:
    case Isa::kAvx512bw:
      return QuantizeRowAvx512bw;
    case Isa::kAvx2:
      return QuantizeRowAvx2;
#endif
    default:
      return QuantizeRowScalar;
  }
}

template <ElementType type>
ort::OrtStatus* QuantizeBlock<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                            QuantizeBlock* kernel) {
  Isa isa;
  std::string error;
  if (!SelectIsa(&isa, &error)) return Error(api, kName, error);
  kernel->row_ = QuantizeRowFor(isa);
  kernel->halves_ = HadamardKernelsFor(isa);
  ONNXQ_RETURN_IF_ERROR(ReadBlockFormat(api, info, &kernel->block_, &kernel->format_));
  return GetAllocator(api, info, &kernel->allocator_);
}

template <ElementType type>
ort::OrtStatus* QuantizeBlock<type>::InferShapes(const Api& api,
                                                 ort::OrtShapeInferContext* context) {
  SymbolicShape shape;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
  // Rank 0 also stands for "not known yet"; Compute refuses a true scalar.
  if (shape.dims.empty()) return nullptr;
  // Not `type`: ONNX Runtime asks one kernel of the operator for all of them.
  return SetOutputShape(api, context, 0, shape.type, shape);
}

template <ElementType type>
ort::OrtStatus* QuantizeBlock<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  InputTensor x;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
  if (x.shape.empty()) return Error(api, kName, "x is a scalar");
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &y));
  const int64_t size = std::accumulate(x.shape.begin(), x.shape.end(), int64_t{1},
                                       [](int64_t a, int64_t b) { return a * b; });
  if (size == 0) return nullptr;
  const T* from = static_cast<const T*>(x.data);
  T* to = static_cast<T*>(y);
  Scratch scratch(api);
  const size_t at = scratch.Reserve<float>(type == ElementType::kFloat16 ? size : 0);
  ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
  const int64_t k = x.shape.back();
  const int64_t block = block_ == 0 ? k : block_;
  const int64_t rows = size / k;
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / k);
  const int64_t tasks = (rows + per_task - 1) / per_task;
  return ParallelFor(api, context, static_cast<size_t>(tasks), [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) * per_task;
    for (int64_t row = first; row < std::min(rows, first + per_task); ++row) {
      if constexpr (type == ElementType::kFloat16) {
        float* wide = scratch.Get<float>(at) + row * k;
        halves_->widen(from + row * k, k, wide);
        row_(wide, k, block, format_);
        halves_->narrow(wide, k, to + row * k);
      } else {
        std::memcpy(to + row * k, from + row * k, static_cast<size_t>(k) * sizeof(float));
        row_(to + row * k, k, block, format_);
      }
    }
  });
}

template class QuantizeBlock<ElementType::kFloat32>;
template class QuantizeBlock<ElementType::kFloat16>;

}  // namespace onnxq
