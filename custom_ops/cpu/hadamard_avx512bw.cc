// AVX-512: strides below a vector within registers, the rest as plain loops.
#include <immintrin.h>

#include "hadamard_loops.h"

namespace onnxq {
namespace {

constexpr int64_t kLanes = 16;

// Lanes of `upper` get other - own, the rest own + other.
__m512 Pairs(__m512 own, __m512 other, __mmask16 upper) {
  return _mm512_mask_sub_ps(_mm512_add_ps(own, other), upper, other, own);
}

// Strides 1, 2, 4 and 8 of blocks of at least 16.
void WithinVectors(float* x, int64_t block) {
  for (int64_t i = 0; i < block; i += kLanes) {
    __m512 v = _mm512_loadu_ps(x + i);
    v = Pairs(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
    v = Pairs(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
    v = Pairs(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
    v = Pairs(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
    _mm512_storeu_ps(x + i, v);
  }
}

struct Vectors {
  using Vector = __m512;
  static constexpr int64_t lanes = kLanes;
  static __mmask16 First(int64_t count) {
    return count == kLanes ? __mmask16{0xffff} : static_cast<__mmask16>((1U << count) - 1U);
  }
  static Vector Fill(float x) { return _mm512_set1_ps(x); }
  static Vector Load(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(First(count), from);
  }
  static void Store(float* to, int64_t count, Vector v) {
    _mm512_mask_storeu_ps(to, First(count), v);
  }
  static Vector MultiplyAdd(float x, Vector row, Vector sum) {
    return _mm512_fmadd_ps(_mm512_set1_ps(x), row, sum);
  }
};

void Blocks(float* x, int64_t count, int64_t block, const float* core, int64_t c, float scale) {
  for (int64_t n = 0; n < count; ++n, x += block) {
    MultiplyCoreBy<Vectors>(x, block, core, c);
    int64_t stride = c;
    if (c == 1 && block >= kLanes) {
      WithinVectors(x, block);
      stride = kLanes;
    }
    for (; stride < block; stride *= 2) Butterflies(x, block, stride);
    Scale(x, block, scale);
  }
}

void Widen(const uint16_t* half, int64_t count, float* x) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    _mm512_storeu_ps(
        x + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i))));
  }
  for (; i < count; ++i) x[i] = ToFloat(half[i]);
}

void Narrow(const float* x, int64_t count, uint16_t* half) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) half[i] = ToHalf(x[i]);
}

}  // namespace

const HadamardKernels kHadamardAvx512bw = {Blocks, Widen, Narrow};

}  // namespace onnxq
