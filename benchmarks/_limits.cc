// What this processor can do at most, for shares: reading memory, and INT8 or float arithmetic in
// registers. Compiled by _limits.py with -march=native; a C interface for ctypes.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kSums = 12;  // independent, more than the latency of an instruction

#if defined(__AVX512F__)
using Vector = __m512i;
using Floats = __m512;
inline Vector Load(const char* at) { return _mm512_loadu_si512(at); }
inline Vector Or(Vector a, Vector b) { return _mm512_or_si512(a, b); }
#else
using Vector = __m256i;
using Floats = __m256;
inline Vector Load(const char* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
inline Vector Or(Vector a, Vector b) { return _mm256_or_si256(a, b); }
#endif

// One dot-product instruction; without VNNI the multiplication that stands for it.
inline void Dot(Vector* sum, Vector a, Vector b) {
#if defined(__AVX512VNNI__)
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
#else
  asm volatile("vpmaddubsw %2, %1, %0" : "=x"(*sum) : "x"(a), "x"(b));
#endif
}

// In assembly, since a compiler finds that all sums are equal.
inline void Fma(Floats* sum, Floats a) {
#if defined(__AVX512F__)
  asm volatile("vfmadd231ps %1, %1, %0" : "+v"(*sum) : "v"(a));
#else
  asm volatile("vfmadd231ps %1, %1, %0" : "+x"(*sum) : "x"(a));
#endif
}

}  // namespace

// Reads `bytes`, a multiple of 512, and returns something of them all.
extern "C" int64_t ReadBytes(const char* from, int64_t bytes) {
  constexpr int64_t kBlock = 512;
  constexpr int64_t kWidth = sizeof(Vector);
  Vector any[kBlock / kWidth] = {};
  for (int64_t i = 0; i + kBlock <= bytes; i += kBlock) {
#pragma GCC unroll 16
    for (int64_t v = 0; v < kBlock / kWidth; ++v) {
      any[v] = Or(any[v], Load(from + i + v * kWidth));
    }
  }
  for (int64_t v = 1; v < kBlock / kWidth; ++v) any[0] = Or(any[0], any[v]);
  return reinterpret_cast<const int64_t*>(any)[0];
}

// Runs kSums dot-product instructions `rounds` times; returns their multiplications and additions.
extern "C" int64_t Int8Operations(int64_t rounds) {
  Vector sums[kSums] = {};
  const Vector zeros = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (Vector& sum : sums) {
      Vector local = sum;
      Dot(&local, zeros, zeros);
      sum = local;
    }
  }
  volatile int64_t keep = reinterpret_cast<const int64_t*>(sums)[0];
  static_cast<void>(keep);
  return rounds * kSums * 2 * static_cast<int64_t>(sizeof(Vector));
}

// The same with fused multiply-adds of floats.
extern "C" int64_t FloatOperations(int64_t rounds) {
  Floats sums[kSums] = {};
  const Floats zeros = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (Floats& sum : sums) {
      Floats local = sum;
      Fma(&local, zeros);
      sum = local;
    }
  }
  volatile float keep = reinterpret_cast<const float*>(sums)[0];
  static_cast<void>(keep);
  return rounds * kSums * 2 * static_cast<int64_t>(sizeof(Floats) / sizeof(float));
}
