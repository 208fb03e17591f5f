// The reference: the definition, one element at a time.
#include "hadamard_loops.h"

namespace onnxq {
namespace {

void Blocks(float* x, int64_t count, int64_t block, const float* core, int64_t c, float scale) {
  for (int64_t n = 0; n < count; ++n, x += block) {
    MultiplyCore(x, block, core, c);
    for (int64_t stride = c; stride < block; stride *= 2) Butterflies(x, block, stride);
    Scale(x, block, scale);
  }
}

void Widen(const uint16_t* half, int64_t count, float* x) {
  for (int64_t i = 0; i < count; ++i) x[i] = ToFloat(half[i]);
}

void Narrow(const float* x, int64_t count, uint16_t* half) {
  for (int64_t i = 0; i < count; ++i) half[i] = ToHalf(x[i]);
}

}  // namespace

const HadamardKernels kHadamardScalar = {Blocks, Widen, Narrow};

}  // namespace onnxq
