// The row kernels of Hadamard, one set for each instruction set; defs/hadamard.py states the
// meaning.
#pragma once

#include <cstdint>

#include "isa.h"

namespace onnxq {

static constexpr int64_t kMaxCore = 256;

struct HadamardKernels {
  // Transforms `count` blocks that lie behind one another, in place: x: [count, block] f32,
  // core: [c, c], block = c * 2^m.
  void (*blocks)(float* x, int64_t count, int64_t block, const float* core, int64_t c, float scale);
  void (*widen)(const uint16_t* half, int64_t count, float* x);
  void (*narrow)(const float* x, int64_t count, uint16_t* half);
};

const HadamardKernels* HadamardKernelsFor(Isa isa);

extern const HadamardKernels kHadamardScalar;
#if defined(__x86_64__)
extern const HadamardKernels kHadamardAvx2;
extern const HadamardKernels kHadamardAvx512bw;
#endif

}  // namespace onnxq
