// AVX2: strides below a vector within registers, the rest as plain loops.
#include <immintrin.h>

#include "hadamard_loops.h"

namespace onnxq {
namespace {

constexpr int64_t kLanes = 8;

// Lanes whose bit of the stride is clear get own + other, the others get other - own.
__m256 Pairs(__m256 own, __m256 other, __m256 upper) {
  return _mm256_blendv_ps(_mm256_add_ps(own, other), _mm256_sub_ps(other, own), upper);
}

// Strides 1, 2 and 4 of blocks of at least 8.
void WithinVectors(float* x, int64_t block) {
  const __m256 upper1 = _mm256_castsi256_ps(_mm256_setr_epi32(0, -1, 0, -1, 0, -1, 0, -1));
  const __m256 upper2 = _mm256_castsi256_ps(_mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1));
  const __m256 upper4 = _mm256_castsi256_ps(_mm256_setr_epi32(0, 0, 0, 0, -1, -1, -1, -1));
  for (int64_t i = 0; i < block; i += kLanes) {
    __m256 v = _mm256_loadu_ps(x + i);
    v = Pairs(v, _mm256_permute_ps(v, 0xb1), upper1);
    v = Pairs(v, _mm256_permute_ps(v, 0x4e), upper2);
    v = Pairs(v, _mm256_permute2f128_ps(v, v, 1), upper4);
    _mm256_storeu_ps(x + i, v);
  }
}

struct Vectors {
  using Vector = __m256;
  static constexpr int64_t lanes = kLanes;
  static __m256i First(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
  static Vector Fill(float x) { return _mm256_set1_ps(x); }
  static Vector Load(const float* from, int64_t count) {
    return _mm256_maskload_ps(from, First(count));
  }
  static void Store(float* to, int64_t count, Vector v) {
    _mm256_maskstore_ps(to, First(count), v);
  }
  static Vector MultiplyAdd(float x, Vector row, Vector sum) {
    return _mm256_fmadd_ps(_mm256_set1_ps(x), row, sum);
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
    _mm256_storeu_ps(x + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
  }
  for (; i < count; ++i) x[i] = ToFloat(half[i]);
}

void Narrow(const float* x, int64_t count, uint16_t* half) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) half[i] = ToHalf(x[i]);
}

}  // namespace

const HadamardKernels kHadamardAvx2 = {Blocks, Widen, Narrow};

}  // namespace onnxq
