// Operators that begin with a bias and a dyadic factor a column: Requantize, IntegerGelu,
// IntegerSilu, IntegerAdd.
#include <algorithm>
#include <limits>

#include "integer_ops.h"

namespace onnxq {
namespace {

// Rows are cut into tasks of about this many elements.
constexpr int64_t kElementsPerTask = 16384;

constexpr std::array<const char*, 3> kFactorNames = {"bias", "multiplier", "shift"};

// What y holds, and how it is written.
template <ElementType type>
struct Output;
template <>
struct Output<ElementType::kInt8> {
  using T = int8_t;
};
template <>
struct Output<ElementType::kUint8> {
  using T = uint8_t;
};
template <>
struct Output<ElementType::kInt16> {
  using T = int16_t;
};
template <ElementType type>
using OutputOf = typename Output<type>::T;

template <class T>
void Narrow(const IntegerKernels& kernels, const int32_t* x, int64_t n, T* out) {
  if constexpr (sizeof(T) == 1)
    kernels.narrow8(x, n, out);
  else
    kernels.narrow16(x, n, out);
}

template <class T>
void GetLimits(IntegerAttributes* attributes, int32_t* low, int32_t* high) {
  *low = attributes->Get32("low", std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
  *high = attributes->Get32("high", *low, std::numeric_limits<T>::max());
}

template <class T>
Rescale GetRescale(IntegerAttributes* attributes) {
  Rescale how{};
  how.multiplier = attributes->Get32("out_multiplier");
  how.shift = attributes->Get32("out_shift", 1, 62);
  GetLimits<T>(attributes, &how.low, &how.high);
  return how;
}

template <class T>
ort::OrtStatus* ReadZeroPoint(const Api& api, const ort::OrtKernelContext* context, const char* op,
                              int32_t* zero_point) {
  InputTensor tensor;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 4, &tensor));
  if (CountElements(tensor.shape) != 1) return Error(api, op, "zero_point is not one number");
  *zero_point = *static_cast<const T*>(tensor.data);
  return nullptr;
}

// Calls part(first, n) for pieces of at most a block that lie within one row, on the thread pool.
template <class Part>
ort::OrtStatus* ForBlocks(const Api& api, const ort::OrtKernelContext* context,
                          const LinearInput& input, const Part& part) {
  const int64_t columns = input.columns();
  const int64_t rows_per_task =
      std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(columns, 1));
  const int64_t per_task = rows_per_task * columns;
  const int64_t tasks = per_task == 0 ? 0 : (input.size() + per_task - 1) / per_task;
  return ParallelFor(api, context, static_cast<size_t>(tasks), [&](size_t task) {
    const int64_t last = std::min(input.size(), (static_cast<int64_t>(task) + 1) * per_task);
    for (int64_t first = static_cast<int64_t>(task) * per_task; first < last;) {
      const int64_t end = input.BlockEnd(first, last);
      part(first, end - first);
      first = end;
    }
  });
}

// Reads x, its factors and the zero point; calls part(input, zero point, first, n, y + first) for
// the blocks of y, which has the shape of x and numbers of type T.
template <class T, class Part>
ort::OrtStatus* ComputeBlocks(const Api& api, ort::OrtKernelContext* context, const char* op,
                              const Part& part) {
  LinearInput input;
  ONNXQ_RETURN_IF_ERROR(input.Read(api, context, op));
  int32_t zero_point = 0;
  ONNXQ_RETURN_IF_ERROR(ReadZeroPoint<T>(api, context, op, &zero_point));
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, input.shape(), &y));
  T* const out = static_cast<T*>(y);
  return ForBlocks(api, context, input, [&](int64_t first, int64_t n) {
    part(input, zero_point, first, n, out + first);
  });
}

ort::OrtStatus* ReadFactor(const Api& api, const ort::OrtKernelContext* context, size_t index,
                           const char* op, const char* name, int32_t* value) {
  InputTensor tensor;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, index, &tensor));
  if (CountElements(tensor.shape) != 1)
    return Error(api, op, std::string(name) + " is not one number");
  *value = *static_cast<const int32_t*>(tensor.data);
  return nullptr;
}

}  // namespace

ort::OrtStatus* LinearInput::Read(const Api& api, const ort::OrtKernelContext* context,
                                  const char* op) {
  InputTensor x;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
  if (x.type == ElementType::kInt32)
    wide_ = static_cast<const int32_t*>(x.data);
  else if (x.type == ElementType::kInt16)
    narrow_ = static_cast<const int16_t*>(x.data);
  else
    return Error(api, op, "the first input is neither int32 nor int16");
  if (x.shape.empty()) return Error(api, op, "the first input is a scalar");
  shape_ = std::move(x.shape);
  size_ = CountElements(shape_);
  columns_ = shape_.back();
  for (size_t i = 0; i < 3; ++i) {
    InputTensor factor;
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, i + 1, &factor));
    const int64_t count = CountElements(factor.shape);
    if (factor.shape.size() != 1 || (count != 1 && count != columns_))
      return Error(api, op,
                   std::string(kFactorNames[i]) + " has neither 1 nor " + std::to_string(columns_) +
                       " elements");
    factors_[i] = static_cast<const int32_t*>(factor.data);
    repeated_[i] = count == 1;
    if (i == 2 && std::any_of(factors_[i], factors_[i] + count,
                              [](int32_t shift) { return shift < 1 || shift > 62; }))
      return Error(api, op, "a shift is not from 1 to 62");
    if (repeated_[i]) filled_[i].fill(factors_[i][0]);
  }
  return nullptr;
}

int64_t LinearInput::BlockEnd(int64_t first, int64_t last) const {
  const int64_t row_end = (first / columns_ + 1) * columns_;
  return std::min({first + kIntegerBlock, row_end, last});
}

const int32_t* LinearInput::Factor(int which, int64_t column) const {
  const auto i = static_cast<size_t>(which);
  return repeated_[i] ? filled_[i].data() : factors_[i] + column;
}

ColumnFactors LinearInput::Factors(int64_t first) const {
  const int64_t column = first % columns_;
  return {Factor(0, column), Factor(1, column), Factor(2, column), repeated_[2]};
}

const int32_t* LinearInput::Widened(const IntegerKernels& kernels, int64_t first, int64_t n,
                                    int32_t* buffer) const {
  if (wide_ != nullptr) return wide_ + first;
  kernels.widen16(narrow_ + first, n, buffer);
  return buffer;
}

void LinearInput::Rescale(const IntegerKernels& kernels, int64_t first, int64_t n, int32_t low,
                          int32_t high, int32_t* out) const {
  int32_t buffer[kIntegerBlock];
  const int32_t* const x = Widened(kernels, first, n, buffer);
  kernels.rescale_columns(x, Factors(first), n, low, high, out);
}

void LinearInput::Requantize(const IntegerKernels& kernels, int64_t first, int64_t n,
                             int32_t zero_point, int32_t low, int32_t high, int bytes,
                             void* out) const {
  int32_t buffer[kIntegerBlock];
  const int32_t* const x = Widened(kernels, first, n, buffer);
  kernels.requantize(x, Factors(first), n, zero_point, low, high, bytes, out);
}

void LinearInput::Gelu(const IntegerKernels& kernels, int64_t first, int64_t n,
                       const ErfConstants& constants, int32_t one, const onnxq::Rescale& how,
                       int bytes, void* out) const {
  int32_t buffer[kIntegerBlock];
  const int32_t* const x = Widened(kernels, first, n, buffer);
  kernels.gelu(x, Factors(first), n, constants, one, how, bytes, out);
}

// Requantize
// ---------------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* Requantize<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                         Requantize* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  GetLimits<OutputOf<type>>(&attributes, &kernel->low_, &kernel->high_);
  return attributes.status();
}

template <ElementType type>
ort::OrtStatus* Requantize<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  return InferTypedBy(api, context, 4);
}

template <ElementType type>
ort::OrtStatus* Requantize<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  using T = OutputOf<type>;
  return ComputeBlocks<T>(
      api, context, kName,
      [&](const LinearInput& input, int32_t zero_point, int64_t first, int64_t n, T* out) {
        input.Requantize(*kernels_, first, n, zero_point, low_, high_, sizeof(T), out);
      });
}

template class Requantize<ElementType::kInt8>;
template class Requantize<ElementType::kUint8>;
template class Requantize<ElementType::kInt16>;

// IntegerGelu
// --------------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* IntegerGelu<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                          IntegerGelu* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  int32_t largest = 0;
  kernel->erf_ = attributes.GetErf(&largest);
  kernel->one_ = attributes.Get32("one", -65535, 65535);
  if (std::abs(kernel->one_) + int64_t{largest} > 65535)
    attributes.Refuse("erf(x) + 1 reaches 2^16");
  kernel->out_ = GetRescale<OutputOf<type>>(&attributes);
  return attributes.status();
}

template <ElementType type>
ort::OrtStatus* IntegerGelu<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  return InferTypedBy(api, context, 4);
}

template <ElementType type>
ort::OrtStatus* IntegerGelu<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  using T = OutputOf<type>;
  return ComputeBlocks<T>(
      api, context, kName,
      [&](const LinearInput& input, int32_t zero_point, int64_t first, int64_t n, T* out) {
        Rescale how = out_;
        how.zero_point = zero_point;
        input.Gelu(*kernels_, first, n, erf_, one_, how, sizeof(T), out);
      });
}

template class IntegerGelu<ElementType::kInt8>;
template class IntegerGelu<ElementType::kUint8>;
template class IntegerGelu<ElementType::kInt16>;

// IntegerSilu
// --------------------------------------------------------------------------------------

template <ElementType type>
ort::OrtStatus* IntegerSilu<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                          IntegerSilu* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  kernel->exp_ = attributes.GetExp("exp_multiplier", "exp_shift");
  kernel->out_ = GetRescale<OutputOf<type>>(&attributes);
  return attributes.status();
}

template <ElementType type>
ort::OrtStatus* IntegerSilu<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  return InferTypedBy(api, context, 4);
}

template <ElementType type>
ort::OrtStatus* IntegerSilu<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  using T = OutputOf<type>;
  return ComputeBlocks<T>(
      api, context, kName,
      [&](const LinearInput& input, int32_t zero_point, int64_t first, int64_t n, T* out) {
        int32_t t[kIntegerBlock];
        int32_t product[kIntegerBlock];
        Rescale how = out_;
        how.zero_point = zero_point;
        input.Rescale(*kernels_, first, n, -32767, 32767, t);
        kernels_->silu(t, n, exp_, product);
        kernels_->rescale(product, n, how, t);
        Narrow(*kernels_, t, n, out);
      });
}

template class IntegerSilu<ElementType::kInt8>;
template class IntegerSilu<ElementType::kUint8>;
template class IntegerSilu<ElementType::kInt16>;

// IntegerAdd
// ---------------------------------------------------------------------------------------

namespace {

constexpr int32_t kAddendReach = 1 << 30;

// Whether b is a with leading axes dropped or of extent 1: its rows are repeated.
bool RepeatsOver(const std::vector<int64_t>& b, const std::vector<int64_t>& a) {
  if (b.empty() || b.size() > a.size() || b.back() != a.back()) return false;
  const size_t missing = a.size() - b.size();
  size_t own = 0;
  while (own < b.size() && b[own] == 1 && a[missing + own] != 1) ++own;
  return std::equal(b.begin() + static_cast<std::ptrdiff_t>(own), b.end(),
                    a.begin() + static_cast<std::ptrdiff_t>(missing + own));
}

}  // namespace

template <ElementType type>
ort::OrtStatus* IntegerAdd<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                         IntegerAdd* kernel) {
  ONNXQ_RETURN_IF_ERROR(SelectIntegerKernels(api, kName, &kernel->kernels_));
  IntegerAttributes attributes(api, info, kName);
  GetLimits<int16_t>(&attributes, &kernel->low_, &kernel->high_);
  return attributes.status();
}

template <ElementType type>
ort::OrtStatus* IntegerAdd<type>::InferShapes(const Api& api, ort::OrtShapeInferContext* context) {
  return InferLike(api, context, 0, ElementType::kInt16);
}

template <ElementType type>
ort::OrtStatus* IntegerAdd<type>::Compute(const Api& api, ort::OrtKernelContext* context) const {
  LinearInput input;
  ONNXQ_RETURN_IF_ERROR(input.Read(api, context, kName));
  InputTensor second;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 4, &second));
  if (!RepeatsOver(second.shape, input.shape()))
    return Error(api, kName, "the rows of b cannot be repeated over those of a");
  Rescale how{};
  ONNXQ_RETURN_IF_ERROR(ReadFactor(api, context, 5, kName, "b_multiplier", &how.multiplier));
  ONNXQ_RETURN_IF_ERROR(ReadFactor(api, context, 6, kName, "b_shift", &how.shift));
  if (how.shift < 1 || how.shift > 62) return Error(api, kName, "b_shift is not from 1 to 62");
  how.low = -kAddendReach;
  how.high = kAddendReach;
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, input.shape(), &y));
  auto* const out = static_cast<int16_t*>(y);
  const auto* const b = static_cast<const int16_t*>(second.data);
  const int64_t period = CountElements(second.shape);
  return ForBlocks(api, context, input, [&](int64_t first, int64_t n) {
    int32_t left[kIntegerBlock];
    int32_t right[kIntegerBlock];
    int32_t widened[kIntegerBlock];
    input.Rescale(*kernels_, first, n, -kAddendReach, kAddendReach, left);
    kernels_->widen16(b + first % period, n, widened);
    kernels_->rescale(widened, n, how, right);
    kernels_->add(left, right, n, low_, high_, out + first);
  });
}

template class IntegerAdd<ElementType::kInt16>;

}  // namespace onnxq
