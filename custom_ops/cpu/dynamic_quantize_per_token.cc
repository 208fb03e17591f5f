// DynamicQuantizePerToken as ONNX Runtime sees it: checks, shapes, threads, choice of row kernel.
#include "dynamic_quantize_per_token.h"

#include <algorithm>
#include <numeric>

#include "cpu_kernels.h"
#include "isa.h"

namespace onnxq {
namespace {

// Rows are cut into tasks of at least this many elements: below it, a task costs more than it does.
constexpr int64_t kElementsPerTask = 16384;

void Quantize(const PerTokenRows& rows, const float* x, int64_t n, int64_t k, int8_t* q, float* s) {
  rows.float32(x, n, k, q, s);
}
void Quantize(const PerTokenRows& rows, const uint16_t* x, int64_t n, int64_t k, int8_t* q,
              float* s) {
  rows.float16(x, n, k, q, s);
}

template <class T>
void QuantizeGroupsOf(const PerTokenRows& rows, const T* x, int64_t k, int64_t group, int8_t* q,
                      float* scale) {
  const int64_t whole = k / group;
  const int64_t done = whole * group;
  Quantize(rows, x, whole, group, q, scale);
  if (done < k) Quantize(rows, x + done, 1, k - done, q + done, scale + whole);
}

}  // namespace

const PerTokenRows* PerTokenRowsFor(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512vnni:
    case Isa::kAvx512bw:
      return &kPerTokenAvx512bw;
    case Isa::kAvx2:
      return &kPerTokenAvx2;
#endif
    default:
      return &kPerTokenScalar;
  }
}

void QuantizeGroups(const PerTokenRows& rows, const float* x, int64_t k, int64_t group, int8_t* q,
                    float* scale) {
  QuantizeGroupsOf(rows, x, k, group, q, scale);
}
void QuantizeGroups(const PerTokenRows& rows, const uint16_t* x, int64_t k, int64_t group,
                    int8_t* q, float* scale) {
  QuantizeGroupsOf(rows, x, k, group, q, scale);
}

template <ElementType type>
ort::OrtStatus* DynamicQuantizePerToken<type>::Create(const Api& api, const ort::OrtKernelInfo*,
                                                      DynamicQuantizePerToken* kernel) {
  Isa isa;
  std::string error;
  if (!SelectIsa(&isa, &error)) return Error(api, kName, error);
  kernel->rows_ = PerTokenRowsFor(isa);
  return nullptr;
}

template <ElementType type>
ort::OrtStatus* DynamicQuantizePerToken<type>::InferShapes(const Api& api,
                                                           ort::OrtShapeInferContext* context) {
  SymbolicShape shape;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
  // Rank 0 also stands for "not known yet"; Compute refuses a true scalar.
  if (shape.dims.empty()) return nullptr;
  ONNXQ_RETURN_IF_ERROR(SetOutputShape(api, context, 0, ElementType::kInt8, shape));
  shape.dims.back() = 1;
  shape.names.back().clear();
  return SetOutputShape(api, context, 1, ElementType::kFloat32, shape);
}

template <ElementType type>
ort::OrtStatus* DynamicQuantizePerToken<type>::Compute(const Api& api,
                                                       ort::OrtKernelContext* context) const {
  InputTensor input;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, &input));
  if (input.shape.empty())
    return Error(api, kName, "x is a scalar; it needs a token axis [..., K]");

  std::vector<int64_t> scale_shape = input.shape;
  scale_shape.back() = 1;
  void* q_data = nullptr;
  void* scale_data = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, input.shape, &q_data));
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 1, scale_shape, &scale_data));

  const int64_t k = input.shape.back();
  const int64_t rows = std::accumulate(input.shape.begin(), input.shape.end() - 1, int64_t{1},
                                       [](int64_t a, int64_t b) { return a * b; });
  const T* x = static_cast<const T*>(input.data);
  int8_t* q = static_cast<int8_t*>(q_data);
  float* scale = static_cast<float*>(scale_data);

  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, k));
  const int64_t tasks = (rows + rows_per_task - 1) / rows_per_task;
  return ParallelFor(api, context, static_cast<size_t>(tasks), [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) * rows_per_task;
    const int64_t count = std::min(rows_per_task, rows - first);
    Quantize(*rows_, x + first * k, count, k, q + first * k, scale + first);
  });
}

template class DynamicQuantizePerToken<ElementType::kFloat32>;
template class DynamicQuantizePerToken<ElementType::kFloat16>;

}  // namespace onnxq
