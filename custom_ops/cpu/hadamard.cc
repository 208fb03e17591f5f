// Hadamard and HadamardQuantize as ONNX Runtime sees them: checks, shapes, threads, choice of
// kernel.
#include "hadamard.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cpu_kernels.h"
#include "dynamic_quantize_per_token.h"
#include "isa.h"

namespace onnxq {
namespace {

// Blocks are cut into tasks of at least this many elements: below it, a task costs more than it
// does.
constexpr int64_t kElementsPerTask = 32768;

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool IsPowerOfTwo(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

int64_t Product(const std::vector<int64_t>& shape, size_t count) {
  return std::accumulate(shape.begin(), shape.begin() + static_cast<int64_t>(count), int64_t{1},
                         [](int64_t a, int64_t b) { return a * b; });
}

void ToFloats(const HadamardKernels&, const float* from, int64_t count, float* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}
void ToFloats(const HadamardKernels& kernels, const uint16_t* from, int64_t count, float* to) {
  kernels.widen(from, count, to);
}

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

ort::OrtStatus* Rotation::Create(const Api& api, const ort::OrtKernelInfo* info, const char* op) {
  name = op;
  Isa isa;
  std::string error;
  if (!SelectIsa(&isa, &error)) return Error(api, name, error);
  kernels = HadamardKernelsFor(isa);
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, "block", &block));
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "scale", &scale));
  if (block < 1) return Error(api, name, "block must be at least 1");
  if (!std::isfinite(scale)) return Error(api, name, "the scale is not finite");
  return GetAllocator(api, info, &allocator);
}

ort::OrtStatus* Rotation::Bind(const Api& api, const ort::OrtKernelContext* context, InputTensor* x,
                               const float** core, int64_t* c) const {
  InputTensor matrix;
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 0, x));
  ONNXQ_RETURN_IF_ERROR(GetInput(api, context, 1, &matrix));
  if (x->shape.empty() || x->shape.back() % block != 0)
    return Error(api, name,
                 "the last extent of x is no multiple of block = " + std::to_string(block));
  const int64_t order = matrix.shape.size() == 2 ? matrix.shape[0] : 0;
  if (order < 1 || order > kMaxCore || matrix.shape[1] != order)
    return Error(api, name, "the core is not [c, c] with c from 1 to 256");
  if (block % order != 0 || !IsPowerOfTwo(block / order))
    return Error(api, name,
                 "block = " + std::to_string(block) + " is not the core's order " +
                     std::to_string(order) + " times a power of two");
  *core = static_cast<const float*>(matrix.data);
  *c = order;
  return nullptr;
}

template <ElementType type>
ort::OrtStatus* Hadamard<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                       Hadamard* kernel) {
  return kernel->rotation_.Create(api, info, kName);
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
  const float* core = nullptr;
  int64_t c = 0;
  ONNXQ_RETURN_IF_ERROR(rotation_.Bind(api, context, &x, &core, &c));
  void* y = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &y));
  const int64_t size = Product(x.shape, x.shape.size());
  if (size == 0) return nullptr;
  const T* from = static_cast<const T*>(x.data);
  T* to = static_cast<T*>(y);

  Scratch scratch(api);
  const size_t at = scratch.Reserve<float>(type == ElementType::kFloat16 ? size : 0);
  ONNXQ_RETURN_IF_ERROR(scratch.Allocate(rotation_.allocator.get()));
  const int64_t block = rotation_.block;
  const int64_t blocks = size / block;
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / block);
  return ParallelFor(api, context, static_cast<size_t>(CeilDivide(blocks, per_task)),
                     [&](size_t task) {
                       const HadamardKernels& kernels = *rotation_.kernels;
                       const int64_t first = static_cast<int64_t>(task) * per_task;
                       const int64_t count = std::min(per_task, blocks - first);
                       const int64_t begin = first * block;
                       float* floats = nullptr;
                       if constexpr (type == ElementType::kFloat16) {
                         floats = scratch.Get<float>(at) + begin;
                       } else {
                         floats = to + begin;
                       }
                       ToFloats(kernels, from + begin, count * block, floats);
                       kernels.blocks(floats, count, block, core, c, rotation_.scale);
                       if constexpr (type == ElementType::kFloat16)
                         kernels.narrow(floats, count * block, to + begin);
                     });
}

template <ElementType type>
ort::OrtStatus* HadamardQuantize<type>::Create(const Api& api, const ort::OrtKernelInfo* info,
                                               HadamardQuantize* kernel) {
  ONNXQ_RETURN_IF_ERROR(kernel->rotation_.Create(api, info, kName));
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, "group", &kernel->group_));
  if (kernel->group_ < 1) return Error(api, kName, "group must be at least 1");
  Isa isa;
  std::string error;
  if (!SelectIsa(&isa, &error)) return Error(api, kName, error);
  kernel->rows_ = PerTokenRowsFor(isa);
  return nullptr;
}

template <ElementType type>
ort::OrtStatus* HadamardQuantize<type>::InferShapes(const Api& api,
                                                    ort::OrtShapeInferContext* context) {
  SymbolicShape shape;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
  if (shape.dims.empty()) return nullptr;  // not known yet
  ONNXQ_RETURN_IF_ERROR(SetOutputShape(api, context, 0, ElementType::kInt8, shape));
  const ort::OrtOpAttr* attribute = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.ShapeInferContext_GetAttribute(context, "group", &attribute));
  int64_t group = 0;
  size_t bytes = 0;
  ONNXQ_RETURN_IF_ERROR(
      api.ReadOpAttr(attribute, ort::AttributeType::kInt, &group, sizeof group, &bytes));
  int64_t& k = shape.dims.back();
  if (k >= 0 && group >= 1) k = k == 0 ? 0 : CeilDivide(k, std::min(group, k));
  shape.names.back().clear();
  return SetOutputShape(api, context, 1, ElementType::kFloat32, shape);
}

template <ElementType type>
ort::OrtStatus* HadamardQuantize<type>::Compute(const Api& api,
                                                ort::OrtKernelContext* context) const {
  InputTensor x;
  const float* core = nullptr;
  int64_t c = 0;
  ONNXQ_RETURN_IF_ERROR(rotation_.Bind(api, context, &x, &core, &c));
  const int64_t k = x.shape.back();
  const int64_t group = std::max<int64_t>(1, std::min(group_, k));
  const int64_t groups = CeilDivide(k, group);
  std::vector<int64_t> scale_shape = x.shape;
  scale_shape.back() = groups;
  void* q_data = nullptr;
  void* scale_data = nullptr;
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 0, x.shape, &q_data));
  ONNXQ_RETURN_IF_ERROR(MakeOutput(api, context, 1, scale_shape, &scale_data));
  const int64_t rows = Product(x.shape, x.shape.size() - 1);
  if (rows == 0 || k == 0) return nullptr;
  const T* from = static_cast<const T*>(x.data);
  int8_t* q = static_cast<int8_t*>(q_data);
  float* scale = static_cast<float*>(scale_data);

  // One row a task is at work, and stays in the nearest cache.
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / k);
  const int64_t tasks = CeilDivide(rows, per_task);
  Scratch scratch(api);
  const size_t at = scratch.Reserve<float>(tasks * k);
  ONNXQ_RETURN_IF_ERROR(scratch.Allocate(rotation_.allocator.get()));
  return ParallelFor(api, context, static_cast<size_t>(tasks), [&](size_t task) {
    const HadamardKernels& kernels = *rotation_.kernels;
    const int64_t first = static_cast<int64_t>(task) * per_task;
    float* row = scratch.Get<float>(at) + static_cast<int64_t>(task) * k;
    for (int64_t m = first; m < std::min(rows, first + per_task); ++m) {
      ToFloats(kernels, from + m * k, k, row);
      kernels.blocks(row, k / rotation_.block, rotation_.block, core, c, rotation_.scale);
      QuantizeGroups(*rows_, row, k, group, q + m * k, scale + m * groups);
    }
  });
}

template class Hadamard<ElementType::kFloat32>;
template class Hadamard<ElementType::kFloat16>;
template class HadamardQuantize<ElementType::kFloat32>;
template class HadamardQuantize<ElementType::kFloat16>;

}  // namespace onnxq
