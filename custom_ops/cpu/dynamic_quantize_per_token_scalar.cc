// The reference: one element at a time, on any CPU.
#include <algorithm>

#include "dynamic_quantize_per_token.h"
#include "per_token_scalar.h"

namespace onnxq {
namespace {

template <class T>
void QuantizeRows(const T* x, int64_t rows, int64_t k, int8_t* q, float* scale) {
  for (int64_t row = 0; row < rows; ++row, x += k, q += k) {
    uint32_t max_bits = 0;
    for (int64_t i = 0; i < k; ++i) max_bits = std::max(max_bits, AbsBits(ToFloat(x[i])));
    const RowScale s = ScaleOfRow(max_bits);
    scale[row] = s.scale;
    for (int64_t i = 0; i < k; ++i) {
      q[i] = s.finite ? QuantizeOne(ToFloat(x[i]), s.factor) : int8_t{0};
    }
  }
}

}  // namespace

const PerTokenRows kPerTokenScalar = {QuantizeRows<float>, QuantizeRows<uint16_t>};

}  // namespace onnxq
