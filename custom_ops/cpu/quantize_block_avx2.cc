// AVX2.
#include "quantize_block_loops.h"

namespace onnxq {

void QuantizeRowAvx2(float* x, int64_t count, int64_t block, const BlockFormat& format) {
  QuantizeBlocksOfRow(x, count, block, format);
}

}  // namespace onnxq
