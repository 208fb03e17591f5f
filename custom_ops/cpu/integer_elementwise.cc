// IntegerEmbedding, IntegerExp, IntegerErf, IntegerSqrt.
#include <algorithm>
#include <atomic>

#include "integer_ops.h"

namespace onnxq {
namespace {

constexpr int64_t kElementsPerTask = 16384;

// Calls part(x, y, n) for pieces of the input's elements, on the thread pool.
template <class T, class Part>
ort::OrtStatus* Unary(const Api& api, ort::OrtKernelContext* context, const Part& part) {
  InputTensor input;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &input));
  void* output = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, input.shape, &output));
  const auto* const x = static_cast<const T*>(input.data);
  auto* const y = static_cast<T*>(output);
  const int64_t size = CountElements(input.shape);
  const int64_t tasks = (size + kElementsPerTask - 1) / kElementsPerTask;
  return ParallelFor(api, context, static_cast<size_t>(tasks), [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) * kElementsPerTask;
    part(x + first, y + first, std::min(kElementsPerTask, size - first));
  });
}

}  // namespace

// IntegerExp
// ---------------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* IntegerExp<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                         IntegerExp* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  kernel->exp_ = attributes.GetExp("multiplier", "shift");
  return attributes.status();
}

template <ElementType type>
ort::OrtStatus* IntegerExp<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  return InferLike(api, context, 0, type);
}

template <ElementType type>
ort::OrtStatus* IntegerExp<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  return Unary<int32_t>(api, context, [&](const int32_t* x, int32_t* y, int64_t n) {
    kernels_->exponential(x, n, exp_, y);
  });
}

template class IntegerExp<ElementType::kInt32>;

// IntegerErf
// ---------------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* IntegerErf<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                         IntegerErf* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  int32_t largest = 0;
  kernel->erf_ = attributes.GetErf(&largest);
  return attributes.status();
}

template <ElementType type>
ort::OrtStatus* IntegerErf<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  return InferLike(api, context, 0, type);
}

template <ElementType type>
ort::OrtStatus* IntegerErf<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  return Unary<int32_t>(
      api, context, [&](const int32_t* x, int32_t* y, int64_t n) { kernels_->erf(x, n, erf_, y); });
}

template class IntegerErf<ElementType::kInt32>;

// IntegerSqrt
// --------------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* IntegerSqrt<type>::Create(const Api& api, const ort::OrtKernelInfo*,
                                          IntegerSqrt* kernel) {
  return SelectIntegerKernels(api, kName, &kernel->kernels_);
}

template <ElementType type>
ort::OrtStatus* IntegerSqrt<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  return InferLike(api, context, 0, type);
}

template <ElementType type>
ort::OrtStatus* IntegerSqrt<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  return Unary<int64_t>(api, context, [](const int64_t* x, int64_t* y, int64_t n) {
    std::transform(x, x + n, y, IntegerRoot);
  });
}

template class IntegerSqrt<ElementType::kInt64>;

// IntegerEmbedding
// ---------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* IntegerEmbedding<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                               IntegerEmbedding* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  kernel->how_.shift = attributes.Get32("shift", 1, 62);
  kernel->how_.low = attributes.Get32("low", INT16_MIN, INT16_MAX);
  kernel->how_.high = attributes.Get32("high", kernel->how_.low, INT16_MAX);
  return attributes.status();
}

template <ElementType type>
ort::OrtStatus* IntegerEmbedding<type>::InferShapes(const Api& api,
                                                    ort::OrtShapeInferContext* context) {
  SymbolicShape indices;
  SymbolicShape table;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &indices));
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 1, &table));
  // Rank 0 also stands for "not known yet".
  if (indices.dims.empty() || table.dims.size() != 2) return nullptr;
  indices.dims.push_back(table.dims[1]);
  indices.names.push_back(table.names[1]);
  return SetOutputShape(api, context, 0, ElementType::kInt16, indices);
}

template <ElementType type>
ort::OrtStatus* IntegerEmbedding<type>::Compute(const Api& api,
                                                ort::OrtKernelContext* context) const {
  InputTensor indices;
  InputTensor table;
  InputTensor multiplier;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &indices));
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &table));
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 2, &multiplier));
  if (table.shape.size() != 2) return Error(api, kName, "the table is not [V, D]");
  const int64_t rows = table.shape[0];
  const int64_t width = table.shape[1];
  if (multiplier.shape.size() != 1 || multiplier.shape[0] != rows)
    return Error(api, kName, "the multiplier has not one element a row of the table");
  const int64_t count = CountElements(indices.shape);
  const auto* const at = static_cast<const int64_t*>(indices.data);
  for (int64_t i = 0; i < count; ++i)
    if (at[i] < -rows || at[i] >= rows)
      return Error(api, kName,
                   "index " + std::to_string(at[i]) + " is not from " + std::to_string(-rows) +
                       " to " + std::to_string(rows - 1));
  std::vector<int64_t> shape = indices.shape;
  shape.push_back(width);
  void* output = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &output));
  auto* const y = static_cast<int16_t*>(output);
  const auto* const codes = static_cast<const int8_t*>(table.data);
  const auto* const factors = static_cast<const int32_t*>(multiplier.data);
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(width, 1));
  const int64_t tasks = (count + per_task - 1) / per_task;
  return ParallelFor(api, context, static_cast<size_t>(tasks), [&](size_t task) {
    const int64_t last = std::min(count, (static_cast<int64_t>(task) + 1) * per_task);
    for (int64_t i = static_cast<int64_t>(task) * per_task; i < last; ++i) {
      const int64_t row = at[i] < 0 ? at[i] + rows : at[i];
      Rescale how = how_;
      how.multiplier = factors[row];
      for (int64_t column = 0; column < width; column += kIntegerBlock) {
        const int64_t n = std::min(kIntegerBlock, width - column);
        int32_t wide[kIntegerBlock];
        int32_t scaled[kIntegerBlock];
        kernels_->widen8(codes + row * width + column, n, wide);
        kernels_->rescale(wide, n, how, scaled);
        kernels_->narrow16(scaled, n, y + i * width + column);
      }
    }
  });
}

template class IntegerEmbedding<ElementType::kInt64>;

}  // namespace onnxq
