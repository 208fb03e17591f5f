// The products of QuantMatMul and its kin: activations are made ready, then tasks multiply.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "dynamic_quantize_per_token.h"
#include "packed_linear.h"
#include "per_token_scalar.h"

namespace onnxq {
namespace {

// A task costs more than it does below this: bytes of weights for few rows, elements to quantize.
constexpr int64_t kBytesPerTask = 131072;
constexpr int64_t kElementsPerTask = 16384;
constexpr int64_t kSerialWork = 65536;  // products in all

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs `task` for all indices: on the pool, or here when there is little to do.
template <class Task>
ort::OrtStatus* ForAll(const Api& api, const ort::OrtKernelContext* context, int64_t total,
                       bool serial, const Task& task) {
  if (serial) {
    for (int64_t i = 0; i < total; ++i) task(static_cast<size_t>(i));
    return nullptr;
  }
  return ParallelFor(api, context, static_cast<size_t>(total), task);
}

// How rows of activations are shared out while they are made ready.
struct RowTasks {
  RowTasks(int64_t rows, int64_t k)
      : m(rows),
        per_task(std::max<int64_t>(1, kElementsPerTask / k)),
        count(CeilDivide(rows, per_task)) {}

  // Calls work(task, row) for all rows.
  template <class Work>
  ort::OrtStatus* Run(const Api& api, const ort::OrtKernelContext* context,
                      const Work& work) const {
    return ForAll(api, context, count, count == 1, [&](size_t index) {
      const auto task = static_cast<int64_t>(index);
      const int64_t end = std::min(m, (task + 1) * per_task);
      for (int64_t row = task * per_task; row < end; ++row) work(task, row);
    });
  }

  int64_t m;
  int64_t per_task;
  int64_t count;
};

// Room for quantized rows, at places of `scratch`.
struct Int8Rows {
  Int8Rows(Scratch* scratch, int64_t m, int64_t k, int64_t groups)
      // Rows a multiple of 4096 bytes apart would fall into the same few sets of a cache.
      : stride(CeilDivide(k, 64) * 64 + 64),
        q(scratch->Reserve<int8_t>(m * stride)),
        starts(scratch->Reserve<int32_t>(m * groups)) {}

  int64_t stride;
  size_t q;
  size_t starts;
};

// x [k] in the given order, at `to`; x itself where there is none.
template <class T>
const T* InOrder(const T* x, const int32_t* order, int64_t k, T* to) {
  if (order == nullptr) return x;
  for (int64_t i = 0; i < k; ++i) to[i] = x[order[i]];
  return to;
}

ort::OrtStatus* Run(const Api& api, const ort::OrtKernelContext* context,
                    const QuantMatMulKernels& kernels, bool integers, const QuantProduct& product) {
  const QuantWeights& w = *product.weights;
  const int64_t panels = CeilDivide(w.n, kPanel);
  const bool serial = product.m * w.n * w.k <= kSerialWork;
  if (product.m <= kSmallRows) {
    const int64_t per_task = 2 * CeilDivide(kBytesPerTask, 2 * w.steps * w.code_bytes());
    const auto small = integers ? kernels.int8_small : kernels.float_small;
    return ForAll(api, context, CeilDivide(panels, per_task), serial, [&](size_t task) {
      const int64_t first = static_cast<int64_t>(task) * per_task;
      small(product, first, std::min(panels, first + per_task));
    });
  }
  const int64_t blocks = CeilDivide(product.m, kBlockRows);
  const int64_t rows = CeilDivide(product.m, blocks);
  const auto block = integers ? kernels.int8_block : kernels.float_block;
  return ForAll(api, context, CeilDivide(panels, 2) * blocks, serial, [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) / blocks * 2;
    const int64_t row = static_cast<int64_t>(task) % blocks * rows;
    block(product, first, std::min(panels, first + 2), row, std::min(rows, product.m - row));
  });
}

QuantProduct ProductOf(const QuantWeights& weights, int64_t m, QuantBias bias, void* y,
                       bool y_half) {
  QuantProduct product{};
  product.weights = &weights;
  product.m = m;
  product.bias = bias;
  product.y = y;
  product.y_half = y_half;
  return product;
}

}  // namespace

void PackedLinear::CompleteRow(const QuantWeights& weights, int8_t* q, int32_t* starts) const {
  std::fill(q + weights.k, q + 4 * weights.steps, int8_t{0});
  const int32_t multiplier = weights.zero_points == nullptr ? weights.offset : 1;
  kernels_->group_sums(q, weights, multiplier, starts);
}

template <class T>
ort::OrtStatus* PackedLinear::Multiply(const Api& api, const ort::OrtKernelContext* context,
                                       const QuantWeights& weights, const T* x,
                                       const int32_t* order, int64_t m, QuantBias bias, void* y,
                                       bool y_half) const {
  const int64_t k = attributes_.k;
  const int64_t groups = weights.groups;
  const bool integers = attributes_.integers();
  const bool by_group = attributes_.activations == Activations::kInt8Groups;
  const bool floats_given = std::is_same_v<T, float> && order == nullptr;
  QuantProduct product = ProductOf(weights, m, bias, y, y_half);
  const RowTasks tasks(m, k);
  Scratch scratch(api);
  const size_t ordered_at = scratch.Reserve<T>(order == nullptr ? 0 : tasks.count * k);
  const auto row_of = [&](int64_t task, int64_t row) {
    T* const ordered = order == nullptr ? nullptr : scratch.Get<T>(ordered_at) + task * k;
    return InOrder(x + row * k, order, k, ordered);
  };
  if (integers) {
    const Int8Rows at(&scratch, m, k, groups);
    const int64_t scales = by_group ? groups : 1;
    const size_t scale_at = scratch.Reserve<float>(m * scales);
    ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
    int8_t* q = scratch.Get<int8_t>(at.q);
    int32_t* starts = scratch.Get<int32_t>(at.starts);
    float* scale = scratch.Get<float>(scale_at);
    ONNXQ_RETURN_IF_ERROR(tasks.Run(api, context, [&](int64_t task, int64_t row) {
      int8_t* to = q + row * at.stride;
      QuantizeGroups(*rows_, row_of(task, row), k, by_group ? attributes_.group : k, to,
                     scale + row * scales);
      CompleteRow(weights, to, starts + row * groups);
      if (!by_group) scale[row] *= attributes_.factor;
    }));
    product.q = q;
    product.q_stride = at.stride;
    product.starts = starts;
    product.row_scale = by_group ? &attributes_.factor : scale;
    product.group_scale = by_group ? scale : nullptr;
  } else if (!floats_given) {
    const size_t x_at = scratch.Reserve<float>(m * k);
    ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
    float* floats = scratch.Get<float>(x_at);
    ONNXQ_RETURN_IF_ERROR(tasks.Run(api, context, [&](int64_t task, int64_t row) {
      const T* from = row_of(task, row);
      std::transform(from, from + k, floats + row * k, [](T value) { return ToFloat(value); });
    }));
    product.x = floats;
  } else if constexpr (std::is_same_v<T, float>) {
    product.x = x;
  }
  return Run(api, context, *kernels_, integers, product);
}

ort::OrtStatus* PackedLinear::MultiplyInt8(const Api& api, const ort::OrtKernelContext* context,
                                           const QuantWeights& weights, const int8_t* q,
                                           const float* q_scale, int64_t m, QuantBias bias,
                                           float* y) const {
  const int64_t k = attributes_.k;
  const bool by_group = attributes_.activations == Activations::kInt8Groups;
  QuantProduct product = ProductOf(weights, m, bias, y, false);
  Scratch scratch(api);
  const Int8Rows at(&scratch, m, k, weights.groups);
  const size_t scale_at = scratch.Reserve<float>(by_group ? 0 : m);
  ONNXQ_RETURN_IF_ERROR(scratch.Allocate(allocator_.get()));
  int8_t* rows = scratch.Get<int8_t>(at.q);
  int32_t* starts = scratch.Get<int32_t>(at.starts);
  float* scale = scratch.Get<float>(scale_at);
  ONNXQ_RETURN_IF_ERROR(RowTasks(m, k).Run(api, context, [&](int64_t, int64_t row) {
    int8_t* to = rows + row * at.stride;
    std::memcpy(to, q + row * k, static_cast<size_t>(k));
    CompleteRow(weights, to, starts + row * weights.groups);
    if (!by_group) scale[row] = q_scale[row] * attributes_.factor;
  }));
  product.q = rows;
  product.q_stride = at.stride;
  product.starts = starts;
  product.row_scale = by_group ? &attributes_.factor : scale;
  product.group_scale = by_group ? q_scale : nullptr;
  return Run(api, context, *kernels_, true, product);
}

template ort::OrtStatus* PackedLinear::Multiply(const Api&, const ort::OrtKernelContext*,
                                                const QuantWeights&, const float*, const int32_t*,
                                                int64_t, QuantBias, void*, bool) const;
template ort::OrtStatus* PackedLinear::Multiply(const Api&, const ort::OrtKernelContext*,
                                                const QuantWeights&, const uint16_t*,
                                                const int32_t*, int64_t, QuantBias, void*,
                                                bool) const;

}  // namespace onnxq
