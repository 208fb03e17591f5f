// Operators over rows of the last axis: IntegerSoftmax, IntegerLayerNorm, IntegerRmsNorm.
#include <algorithm>

#include "integer_ops.h"

namespace onnxq {
namespace {

constexpr int64_t kElementsPerTask = 8192;
constexpr int64_t kMaxWidth = int64_t{1} << 20;
// Softmax of a row with one number above the rest: its product with 2^32 / sum has 32 bits.
constexpr int32_t kLeastOne = 1 << 14;
constexpr int64_t kBetaReach = int64_t{1} << 61;

// How rows are cut into tasks.
struct RowTasks {
  int64_t rows;
  int64_t per_task;
  int64_t count;

  RowTasks(int64_t size, int64_t width)
      : rows(size / width),
        per_task(std::max<int64_t>(1, kElementsPerTask / width)),
        count((rows + per_task - 1) / per_task) {}

  // Calls row(task, index of the row).
  template <class Row>
  ort::OrtStatus* Run(const Api& api, const ort::OrtKernelContext* context, const Row& row) const {
    return ParallelFor(api, context, static_cast<size_t>(count), [&](size_t index) {
      const auto task = static_cast<int64_t>(index);
      const int64_t last = std::min(rows, (task + 1) * per_task);
      for (int64_t i = task * per_task; i < last; ++i) row(task, i);
    });
  }
};

NormConstants GetNorm(IntegerAttributes* attributes) {
  NormConstants c{};
  c.shift = attributes->Get32("shift", 0, 15);
  c.epsilon = attributes->Get("epsilon", 0, int64_t{1} << 60);
  c.out_shift = attributes->Get32("out_shift", 1, 62);
  c.low = attributes->Get32("low", INT16_MIN, INT16_MAX);
  c.high = attributes->Get32("high", c.low, INT16_MAX);
  return c;
}

ort::OrtStatus* ComputeNorm(const Api& api, ort::OrtKernelContext* context, const char* op,
                            const IntegerKernels& kernels, ort::OrtAllocator* allocator,
                            const NormConstants& constants, bool has_beta) {
  InputTensor x;
  InputTensor multiplier;
  InputTensor beta;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &multiplier));
  const int64_t width = x.shape.empty() ? 0 : x.shape.back();
  if (width < 1 || width > kMaxWidth)
    return Error(api, op, "the last extent of x is not from 1 to 2^20");
  if (multiplier.shape.size() != 1 || multiplier.shape[0] != width)
    return Error(api, op, "the multiplier has not " + std::to_string(width) + " elements");
  if (has_beta) {
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 2, &beta));
    if (beta.shape != multiplier.shape)
      return Error(api, op, "beta has not " + std::to_string(width) + " elements");
    const auto* const values = static_cast<const int64_t*>(beta.data);
    if (std::any_of(values, values + width,
                    [](int64_t b) { return b <= -kBetaReach || b >= kBetaReach; }))
      return Error(api, op, "beta reaches 2^61");
  }
  void* output = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &output));
  const RowTasks tasks(CountElements(x.shape), width);
  Scratch scratch(api);
  const size_t buffers = scratch.Reserve<int32_t>(tasks.count * width);
  ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator));
  return tasks.Run(api, context, [&](int64_t task, int64_t row) {
    kernels.norm(static_cast<const int16_t*>(x.data) + row * width, width,
                 static_cast<const int32_t*>(multiplier.data),
                 static_cast<const int64_t*>(beta.data), constants,
                 scratch.Get<int32_t>(buffers) + task * width,
                 static_cast<int16_t*>(output) + row * width);
  });
}

// How far the mask's start moves with each axis of x, in elements; the last axis apart.
class MaskRows {
 public:
  // False when the mask cannot be broadcast to x.
  bool Build(const std::vector<int64_t>& mask, const std::vector<int64_t>& x) {
    if (mask.size() > x.size()) return false;
    const size_t missing = x.size() - mask.size();
    strides_.assign(x.size(), 0);
    int64_t step = 1;
    for (size_t i = x.size(); i-- > missing;) {
      const int64_t extent = mask[i - missing];
      if (extent != 1 && extent != x[i]) return false;
      if (extent != 1) strides_[i] = step;
      step *= extent;
    }
    x_ = x;
    return true;
  }

  // Where the mask's numbers of a row of x begin, and how many rows from there on share them.
  int64_t StartOf(int64_t row, int64_t* shared) const {
    int64_t start = 0;
    int64_t period = 1;
    bool alike = true;
    *shared = 1;
    for (size_t i = x_.size() - 1; i-- > 0;) {
      start += row / period % x_[i] * strides_[i];
      alike = alike && strides_[i] == 0;
      period *= x_[i];
      if (alike) *shared = period - row % period;
    }
    return start;
  }

  // Whether all columns of a row share one number, which then changes nothing.
  bool IsFlat() const { return strides_.back() == 0; }

 private:
  std::vector<int64_t> x_;
  std::vector<int64_t> strides_;
};

}  // namespace

// IntegerSoftmax
// -----------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* IntegerSoftmax<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                             IntegerSoftmax* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  kernel->constants_.exp = attributes.GetExp("multiplier", "shift");
  kernel->constants_.bits = attributes.Get32("bits", 1, 8);
  kernel->constants_.rounding = attributes.Get32("rounding", 0, 1);
  const int32_t one = kernel->constants_.exp.one;
  if (one <= kLeastOne) attributes.Refuse("exp(0) is " + std::to_string(one) + ", not near 32767");
  ONNXQ_RETURN_IF_ERROR(attributes.status());
  return GetAllocator(api, info, &kernel->allocator_);
}

template <ElementType type>
ort::OrtStatus* IntegerSoftmax<type>::InferShapes(const Api& api,
                                                  ort::OrtShapeInferContext* context) {
  return InferLike(api, context, 0, ElementType::kUint8);
}

template <ElementType type>
ort::OrtStatus* IntegerSoftmax<type>::Compute(const Api& api,
                                              ort::OrtKernelContext* context) const {
  InputTensor x;
  InputTensor mask;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &mask));
  const std::vector<int64_t> outer(x.shape.begin(), x.shape.end() - !x.shape.empty());
  if (x.shape.empty() || (x.shape.back() == 0 && CountElements(outer) > 0))
    return Error(api, kName, "x has rows without columns");
  const int64_t width = std::max<int64_t>(x.shape.back(), 1);
  MaskRows rows;
  if (!rows.Build(mask.shape, x.shape))
    return Error(api, kName, "the mask cannot be broadcast to x");
  void* output = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &output));
  const RowTasks tasks(CountElements(x.shape), width);
  Scratch scratch(api);
  // A number for all columns is spread over a row of the buffer: the sum may wrap.
  const size_t buffers = scratch.Reserve<int32_t>(tasks.count * width * 2);
  ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
  const auto* const numbers = static_cast<const int32_t*>(mask.data);
  return ParallelFor(api, context, static_cast<size_t>(tasks.count), [&](size_t index) {
    const auto task = static_cast<int64_t>(index);
    int32_t* const buffer = scratch.Get<int32_t>(buffers) + task * width * 2;
    const int64_t last = std::min(tasks.rows, (task + 1) * tasks.per_task);
    for (int64_t row = task * tasks.per_task; row < last;) {
      int64_t shared = 0;
      const int32_t* added = numbers + rows.StartOf(row, &shared);
      if (rows.IsFlat() && *added == 0) {
        added = nullptr;
      } else if (rows.IsFlat()) {
        std::fill_n(buffer + width, width, *added);
        added = buffer + width;
      }
      const int64_t count = std::min(shared, last - row);
      kernels_->softmax(static_cast<const int32_t*>(x.data) + row * width, added, count, width,
                        constants_, buffer, static_cast<uint8_t*>(output) + row * width);
      row += count;
    }
  });
}

template class IntegerSoftmax<ElementType::kInt32>;

// Norms
// --------------------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* IntegerLayerNorm<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                               IntegerLayerNorm* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  kernel->constants_ = GetNorm(&attributes);
  ONNXQ_RETURN_IF_ERROR(attributes.status());
  return GetAllocator(api, info, &kernel->allocator_);
}

template <ElementType type>
ort::OrtStatus* IntegerLayerNorm<type>::InferShapes(const Api& api,
                                                    ort::OrtShapeInferContext* context) {
  return InferLike(api, context, 0, type);
}

template <ElementType type>
ort::OrtStatus* IntegerLayerNorm<type>::Compute(const Api& api,
                                                ort::OrtKernelContext* context) const {
  return ComputeNorm(api, context, kName, *kernels_, allocator_.get(), constants_, true);
}

template class IntegerLayerNorm<ElementType::kInt16>;

template <ElementType type>
ort::OrtStatus* IntegerRmsNorm<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                             IntegerRmsNorm* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  kernel->constants_ = GetNorm(&attributes);
  ONNXQ_RETURN_IF_ERROR(attributes.status());
  return GetAllocator(api, info, &kernel->allocator_);
}

template <ElementType type>
ort::OrtStatus* IntegerRmsNorm<type>::InferShapes(const Api& api,
                                                  ort::OrtShapeInferContext* context) {
  return InferLike(api, context, 0, type);
}

template <ElementType type>
ort::OrtStatus* IntegerRmsNorm<type>::Compute(const Api& api,
                                              ort::OrtKernelContext* context) const {
  return ComputeNorm(api, context, kName, *kernels_, allocator_.get(), constants_, false);
}

template class IntegerRmsNorm<ElementType::kInt16>;

}  // namespace onnxq
