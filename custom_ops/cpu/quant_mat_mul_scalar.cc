// The reference: one element at a time, in the order of the definition, on any CPU.
#include <algorithm>

#include "quant_mat_mul.h"
#include "quant_mat_mul_numbers.h"

namespace onnxq {
namespace {

// The planes of a step lie one after another, the widest first; it holds the lowest bits.
uint8_t CodeAt(const QuantWeights& w, int64_t column, int64_t k) {
  const uint8_t* plane = w.codes + (column / kPanel * w.steps + k / 4) * w.code_bytes();
  const int64_t c = column % kPanel;
  const int64_t bits = CodeBits(w.kind);
  int code = 0;
  int low = 0;
  for (int width = 8; width > 0; width /= 2) {
    if ((bits & width) == 0) continue;
    const int64_t per_field = 4 * width;  // columns that one field of the bytes holds
    const int byte = plane[c % per_field * 4 + k % 4];
    const int field = byte >> (static_cast<int>(c / per_field) * width);
    code |= (field & ((1 << width) - 1)) << low;
    low += width;
    plane += 16 * width;
  }
  return static_cast<uint8_t>(code);
}

int64_t GroupIndex(const QuantWeights& w, int64_t column, int64_t group) {
  return (column / kPanel * w.groups + group) * kPanel + column % kPanel;
}

int32_t IntegerLevel(const QuantWeights& w, uint8_t code) {
  const bool affine = w.kind == LevelKind::kAffine4 || w.kind == LevelKind::kAffine8;
  return w.offset + (affine ? code : w.bytes[code]);
}

float FloatLevel(const QuantWeights& w, uint8_t code) {
  switch (w.kind) {
    case LevelKind::kAffine4:
    case LevelKind::kAffine8:
      return static_cast<float>(code + w.offset);
    case LevelKind::kE4M3:
      return FromE4M3(code);
    default:
      return w.levels[code];
  }
}

void GroupSums(const int8_t* q, const QuantWeights& w, int32_t multiplier, int32_t* out) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t end = 4 * std::min((g + 1) * w.group_steps, w.steps);
    int32_t sum = 0;
    for (int64_t k = 4 * g * w.group_steps; k < end; ++k) sum += q[k];
    out[g] = multiplier * sum;
  }
}

float Int8Dot(const QuantProduct& p, int64_t row, int64_t column) {
  const QuantWeights& w = *p.weights;
  const int8_t* q = p.q + row * p.q_stride;
  float sum = 0;
  int32_t total = 0;  // with integer scales, which were checked not to overflow it
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t end = std::min(4 * (g + 1) * w.group_steps, w.k);
    const int64_t at = GroupIndex(w, column, g);
    const int32_t zero = w.zero_points == nullptr ? 0 : w.zero_points[at];
    int32_t dot = 0;
    for (int64_t k = 4 * g * w.group_steps; k < end; ++k) {
      dot += q[k] * (IntegerLevel(w, CodeAt(w, column, k)) - zero);
    }
    if (w.integer_scales()) {
      total += dot * static_cast<const int16_t*>(w.scales)[at];
    } else {
      float whole = static_cast<float>(dot);
      if (p.group_scale != nullptr) whole *= p.group_scale[row * w.groups + g];
      sum = std::fma(whole, ScaleAt(w.scale_type, w.scales, at), sum);
    }
  }
  if (w.integer_scales()) sum = static_cast<float>(total);
  return sum * (p.group_scale == nullptr ? p.row_scale[row] : *p.row_scale);
}

float FloatWeight(const QuantWeights& w, int64_t column, int64_t k) {
  const int64_t at = GroupIndex(w, column, k / (4 * w.group_steps));
  float level = FloatLevel(w, CodeAt(w, column, k));
  if (w.zero_points != nullptr) level -= static_cast<float>(w.zero_points[at]);
  return level * (ScaleAt(w.scale_type, w.scales, at) * w.factor);
}

float FloatDot(const QuantProduct& p, int64_t row, int64_t column) {
  const QuantWeights& w = *p.weights;
  float sum = 0;
  for (int64_t k = 0; k < w.k; ++k) {
    sum = std::fma(p.x[row * w.k + k], FloatWeight(w, column, k), sum);
  }
  return sum;
}

void AddColumns(const ColumnProduct& p, int64_t first, int64_t last) {
  const QuantWeights& w = *p.weights;
  for (int64_t c = first * kPanel; c < std::min(last * kPanel, w.n); ++c) {
    for (int64_t i = 0; i < p.count; ++i) {
      const float weight = FloatWeight(w, c, p.columns[i]);
      for (int64_t m = 0; m < p.m; ++m) {
        float* y = p.y + m * w.n + c;
        *y = std::fma(p.x[m * p.count + i], weight, *y);
      }
    }
  }
}

template <float (*dot)(const QuantProduct&, int64_t, int64_t)>
void Block(const QuantProduct& p, int64_t first, int64_t last, int64_t row, int64_t rows) {
  const int64_t n = p.weights->n;
  for (int64_t m = row; m < row + rows; ++m) {
    for (int64_t c = first * kPanel; c < std::min(last * kPanel, n); ++c) {
      const float y = dot(p, m, c) + p.bias.values[c * p.bias.step];
      if (p.y_half) {
        static_cast<uint16_t*>(p.y)[m * n + c] = ToHalf(y);
      } else {
        static_cast<float*>(p.y)[m * n + c] = y;
      }
    }
  }
}

template <float (*dot)(const QuantProduct&, int64_t, int64_t)>
void Small(const QuantProduct& p, int64_t first, int64_t last) {
  Block<dot>(p, first, last, 0, p.m);
}

}  // namespace

const QuantMatMulKernels kQuantMatMulScalar = {GroupSums,      Small<Int8Dot>,  Small<FloatDot>,
                                               Block<Int8Dot>, Block<FloatDot>, AddColumns};

}  // namespace onnxq
