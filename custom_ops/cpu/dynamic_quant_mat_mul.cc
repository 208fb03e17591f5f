// DynamicQuantMatMul as ONNX Runtime sees it: finds the columns of outliers, has the rest
// multiplied as QuantMatMul does, and adds the outliers' product.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cpu_kernels.h"
#include "hadamard.h"
#include "isa.h"
#include "per_token_scalar.h"

namespace onnxq {
namespace {

constexpr const char* kName = "DynamicQuantMatMul";
constexpr size_t kOutliersInput = 6;
constexpr int64_t kPanelsPerTask = 4;
constexpr int32_t kNamed = INT32_MAX;

// Raises most [k] to the largest magnitudes of the columns of x [m, k], as bit patterns: NaN lies
// above all numbers.
void RaiseToMagnitudes(const float* x, int64_t m, int64_t k, int32_t* most) {
  for (int64_t row = 0; row < m; ++row, x += k) {
    for (int64_t i = 0; i < k; ++i)
      most[i] = std::max(most[i], static_cast<int32_t>(AbsBits(x[i])));
  }
}

// Moves the columns out of x [m, k] to `moved` [m, columns] and leaves zeros.
void MoveColumns(float* x, int64_t m, int64_t k, const int64_t* columns, int64_t count,
                 float* moved) {
  for (int64_t row = 0; row < m; ++row, x += k) {
    for (int64_t i = 0; i < count; ++i) {
      *moved++ = x[columns[i]];
      x[columns[i]] = 0;
    }
  }
}

}  // namespace

template <ElementType type>
ort::OrtStatus* DynamicQuantMatMul<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                                 DynamicQuantMatMul* kernel) {
  ONNXQ_RETURN_IF_ERROR(kernel->linear_.Create(api, info, kName, 1));
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "threshold", &kernel->threshold_));
  if (kernel->linear_.attributes().activations != Activations::kInt8)
    return Error(api, kName, "int8_activations must be 1; QuantMatMul takes float activations");
  if (!(kernel->threshold_ >= 0 && std::isfinite(kernel->threshold_)))
    return Error(api, kName, "the threshold is negative or not finite");
  Isa isa;
  std::string error;
  if (!SelectIsa(&isa, &error)) return Error(api, kName, error);
  kernel->halves_ = HadamardKernelsFor(isa);
  return nullptr;
}

template <ElementType type>
ort::OrtStatus* DynamicQuantMatMul<type>::InferShapes(const Api& api,
                                                      ort::OrtShapeInferContext* context) {
  return PackedLinear::InferShapes(api, context);
}

template <ElementType type>
ort::OrtStatus* DynamicQuantMatMul<type>::Compute(const Api& api,
                                                  ort::OrtKernelContext* context) const {
  InputTensor x;
  InputTensor outliers;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &x));
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, kOutliersInput, &outliers));
  const int64_t k = linear_.attributes().k;
  const int64_t n = linear_.attributes().n;
  if (x.shape.empty() || x.shape.back() != k)
    return Error(api, kName,
                 "x has shape " + Text(x.shape) + "; its last extent must be " + std::to_string(k));
  if (outliers.shape.size() != 1)
    return Error(api, kName, "outliers has shape " + Text(outliers.shape) + ", not [R]");
  const auto* named = static_cast<const int64_t*>(outliers.data);
  for (int64_t i = 0; i < outliers.shape[0]; ++i) {
    if (named[i] < 0 || named[i] >= k)
      return Error(api, kName,
                   "outlier column " + std::to_string(named[i]) + " is not in 0 to " +
                       std::to_string(k - 1));
  }
  QuantWeights weights;
  QuantBias bias;
  ONNXQ_RETURN_IF_ERROR(linear_.Bind(api, context, &weights, &bias));
  std::vector<int64_t> shape = x.shape;
  shape.back() = n;
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, shape, &y));
  const int64_t m = std::accumulate(x.shape.begin(), x.shape.end() - 1, int64_t{1},
                                    [](int64_t a, int64_t b) { return a * b; });
  if (m == 0) return nullptr;

  constexpr bool kHalf = type == ElementType::kFloat16;
  Scratch wide(api);
  const size_t x_at = wide.Reserve<float>(m * k);
  const size_t y_at = wide.Reserve<float>(kHalf ? m * n : 0);
  const size_t most_at = wide.Reserve<int32_t>(k);
  const size_t columns_at = wide.Reserve<int64_t>(k);
  ONNXQ_RETURN_IF_ERROR(wide.Allocate(linear_.allocator()));
  float* inner = wide.Get<float>(x_at);
  float* sums = kHalf ? wide.Get<float>(y_at) : static_cast<float*>(y);
  if constexpr (kHalf) {
    halves_->widen(static_cast<const uint16_t*>(x.data), m * k, inner);
  } else {
    std::memcpy(inner, x.data, static_cast<size_t>(m * k) * sizeof(float));
  }
  // Columns that are named count as larger than anything.
  auto* most = wide.Get<int32_t>(most_at);
  std::fill_n(most, k, 0);
  for (int64_t i = 0; i < outliers.shape[0]; ++i) most[named[i]] = kNamed;
  if (threshold_ > 0) RaiseToMagnitudes(inner, m, k, most);
  const int32_t limit = threshold_ > 0 ? static_cast<int32_t>(AbsBits(threshold_)) : kNamed;
  auto* columns = wide.Get<int64_t>(columns_at);
  int64_t count = 0;
  for (int64_t i = 0; i < k; ++i) {
    if (most[i] >= limit) columns[count++] = i;
  }
  Scratch moved(api);
  const size_t moved_at = moved.Reserve<float>(m * count);
  ONNXQ_RETURN_IF_ERROR(moved.Allocate(linear_.allocator()));
  MoveColumns(inner, m, k, columns, count, moved.Get<float>(moved_at));

  ONNXQ_RETURN_IF_ERROR(
      linear_.Multiply(api, context, weights, inner, nullptr, m, bias, sums, false));
  if (count > 0) {
    const ColumnProduct product = {&weights, columns, count, moved.Get<float>(moved_at), m, sums};
    const int64_t panels = (n + kPanel - 1) / kPanel;
    const int64_t tasks = (panels + kPanelsPerTask - 1) / kPanelsPerTask;
    ONNXQ_RETURN_IF_ERROR(ParallelFor(api, context, static_cast<size_t>(tasks), [&](size_t task) {
      const int64_t first = static_cast<int64_t>(task) * kPanelsPerTask;
      linear_.kernels().add_columns(product, first, std::min(panels, first + kPanelsPerTask));
    }));
  }
  if constexpr (kHalf) halves_->narrow(sums, m * n, static_cast<uint16_t*>(y));
  return nullptr;
}

template class DynamicQuantMatMul<ElementType::kFloat32>;
template class DynamicQuantMatMul<ElementType::kFloat16>;

}  // namespace onnxq
