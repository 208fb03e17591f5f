// QuantizeBlock as ONNX Runtime sees it: checks, shapes, threads, choice of kernel.
#include "quantize_block.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cpu_kernels.h"
#include "hadamard.h"

namespace onnxq {
namespace {

constexpr const char* kName = "QuantizeBlock";

// Rows are put together to tasks of about this many elements: below it, a task costs more than it
// does.
constexpr int64_t kElementsPerTask = 16384;

ort::OrtStatus* ReadFormat(const Api& api, const ort::OrtKernelInfo* info, int64_t* block,
                           BlockFormat* format) {
  int64_t mantissa = 0;
  int64_t min_exponent = 0;
  int64_t scale = 0;
  const std::pair<const char*, int64_t*> integers[] = {{"block", block},
                                                       {"mantissa", &mantissa},
                                                       {"min_exponent", &min_exponent},
                                                       {"scale", &scale}};
  for (const auto& [name, value] : integers) {
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, name, value));
  }
  const std::pair<const char*, float*> floats[] = {{"lowest", &format->lowest},
                                                   {"largest", &format->largest},
                                                   {"factor", &format->factor},
                                                   {"clip", &format->clip}};
  for (const auto& [name, value] : floats) {
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, name, value));
  }
  const auto refuse = [&](const std::string& cause) { return Error(api, kName, cause); };
  if (*block < 0) return refuse("block = " + std::to_string(*block) + " is below 0");
  if (mantissa < 0 || mantissa > 15)
    return refuse("mantissa = " + std::to_string(mantissa) + " is not in 0 to 15");
  if (min_exponent < -30 || min_exponent > 15)
    return refuse("min_exponent = " + std::to_string(min_exponent) + " is not in -30 to 15");
  if (scale < 0 || scale > 3) return refuse("scale = " + std::to_string(scale) + " is not 0 to 3");
  if (!(format->largest > 0 && format->largest <= 65536))
    return refuse("largest is not in (0, 65536]");
  if (!(-format->lowest > 0 && -format->lowest <= 65536))
    return refuse("lowest is not in [-65536, 0)");
  if (!(format->factor >= 0 && std::isfinite(format->factor)))
    return refuse("factor is negative or not finite");
  if (!(format->clip > 0 && format->clip <= 1)) return refuse("clip is not in (0, 1]");
  format->mantissa = static_cast<int32_t>(mantissa);
  format->min_exponent = static_cast<int32_t>(min_exponent);
  format->scale = static_cast<BlockScale>(scale);
  return nullptr;
}

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
  ONNXQ_RETURN_IF_ERROR(ReadFormat(api, info, &kernel->block_, &kernel->format_));
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
