// Packed codes (layout 1, custom_ops/layout.py) as the A operand of mma.m16n8k16.
//
// Columns of the weight are rows of A, so that a few rows of activations fill the narrow side. One
// tile is a panel of 32 columns by four steps, 16 k: two fragments of 16 columns. In lane 4g + t
// lie the four k of step t, as slots 2t, 2t+1, 2t+8, 2t+9 of the mma, for four columns:
//
//   4 bits  8 bytes at 64 t + 8 g:    word i, field h:  column 2 g + i + 16 h  is row g + 8 h of
//   8 bits  16 bytes at 128 t + 16 g: word 2 i + h:     column 4 g + 2 i + h      fragment i
//
// So a warp reads a tile as 256 or 512 consecutive bytes, needs no shuffle, and finds the matching
// activations as four consecutive k of a row. Decoded numbers are exact in both 16-bit types:
// levels less zero points for integers, levels times a power of two (1 / kUnit) for floats; scales
// multiply float32 sums.
#pragma once

#include "numbers.h"

namespace onnxq::cuda {

inline constexpr int kPanel = 32;
inline constexpr int kTileK = 16;  // four steps

template <int bits>
struct TileLayout {
  static constexpr int kBytes = 64 * bits;  // of a tile
  static constexpr int kWords = bits / 2;   // of a lane
  ONNXQ_HD static int LaneByte(int lane) { return lane % 4 * 16 * bits + lane / 4 * 4 * kWords; }
  // The column in its panel of row g + 8 half of fragment i, for the lanes 4 g to 4 g + 3.
  ONNXQ_HD static int Column(int lane, int i, int half) {
    const int g = lane / 4;
    return bits == 4 ? 2 * g + i + 16 * half : 4 * g + 2 * i + half;
  }
};

// Bytes 0, 1, 2, 3 in the order 0, 2, 1, 3: then equal bit places of the two halves of a word
// belong to neighbouring k.
ONNXQ_HD uint32_t NeighboursInHalves(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, 0x3120);
#else
  return (word & 0xff0000ffU) | (word & 0xff00U) << 8 | (word >> 8 & 0xff00U);
#endif
}

// (v & mask) | set, which nvcc would not join into one instruction when both are constants.
template <uint32_t mask, uint32_t set>
ONNXQ_HD uint32_t MaskAndSet(uint32_t v) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(v), "n"(mask), "n"(set));
  return result;
#else
  return (v & mask) | set;
#endif
}

template <int left>
ONNXQ_HD uint32_t ShiftLeft(uint32_t v) {
  if constexpr (left >= 0) {
    return v << left;
  } else {
    return v >> -left;
  }
}

// Decoders: Column(z, field) makes what Decode needs to know of the column in a field of the
// words, where z is its zero point less the lowest level; Decode(word, columns, pairs) writes
// pairs[2 * field + j], the k 2j and 2j + 1 of the column.

// Integers of consecutive levels: code - z. A code among the low bits of 1024 (or, for bfloat16,
// 128) adds to it.
template <class T>
struct Affine4;

template <>
struct Affine4<Half> {
  static constexpr int kBits = 4;
  static constexpr float kUnit = 1.0F;
  ONNXQ_HD static uint32_t Column(float z, int field) {
    return field == 0 ? Both<Half>(1024.0F + z) : Both<Half>(-64.0F - z);
  }
  ONNXQ_HD static void Decode(uint32_t word, const uint32_t* columns, uint32_t* pairs) {
    constexpr uint32_t kMagic = 0x64006400U;      // 1024
    constexpr uint32_t kSixteenth = 0x2c002c00U;  // 1/16: the upper field counts 16 by 16
    uint32_t s = NeighboursInHalves(word);
    ONNXQ_UNROLL
    for (int j = 0; j < 2; ++j, s >>= 8) {
      pairs[j] = PairSub<Half>(MaskAndSet<0x000f000fU, kMagic>(s), columns[0]);
      pairs[2 + j] = PairFma<Half>(MaskAndSet<0x00f000f0U, kMagic>(s), kSixteenth, columns[1]);
    }
  }
};

template <>
struct Affine4<Bfloat> {
  static constexpr int kBits = 4;
  static constexpr float kUnit = 1.0F;
  ONNXQ_HD static uint32_t Column(float z, int) { return Both<Bfloat>(z); }
  ONNXQ_HD static void Decode(uint32_t word, const uint32_t* columns, uint32_t* pairs) {
    constexpr uint32_t kMagic = 0x43004300U;  // 128
    uint32_t s = NeighboursInHalves(word);
    ONNXQ_UNROLL
    for (int j = 0; j < 4; ++j, s >>= 4) {
      // Two steps: 128 + z need not be a bfloat16.
      const uint32_t code = PairSub<Bfloat>(MaskAndSet<0x000f000fU, kMagic>(s), kMagic);
      pairs[j / 2 + j % 2 * 2] = PairSub<Bfloat>(code, columns[j % 2]);
    }
  }
};

template <class T>
struct Affine8;

template <>
struct Affine8<Half> {
  static constexpr int kBits = 8;
  static constexpr float kUnit = 1.0F;
  ONNXQ_HD static uint32_t Column(float z, int) { return Both<Half>(1024.0F + z); }
  ONNXQ_HD static void Decode(uint32_t word, const uint32_t* columns, uint32_t* pairs) {
    constexpr uint32_t kMagic = 0x64006400U;
    const uint32_t s = NeighboursInHalves(word);
    pairs[0] = PairSub<Half>(MaskAndSet<0x00ff00ffU, kMagic>(s), columns[0]);
    pairs[1] = PairSub<Half>(MaskAndSet<0x00ff00ffU, kMagic>(s >> 8), columns[0]);
  }
};

template <>
struct Affine8<Bfloat> {
  static constexpr int kBits = 8;
  static constexpr float kUnit = 1.0F;
  ONNXQ_HD static uint32_t Column(float z, int) { return Both<Bfloat>(z); }
  ONNXQ_HD static void Decode(uint32_t word, const uint32_t* columns, uint32_t* pairs) {
    constexpr uint32_t kMagic = 0x43004300U;  // 128, with room for seven bits
    uint32_t s = NeighboursInHalves(word);
    ONNXQ_UNROLL
    for (int j = 0; j < 2; ++j, s >>= 8) {
      const uint32_t low = PairSub<Bfloat>(MaskAndSet<0x007f007fU, kMagic>(s), kMagic);
      const uint32_t top = s << 7 & 0x40004000U;                     // 2 where bit 7 is set
      const uint32_t code = PairFma<Bfloat>(top, 0x42804280U, low);  // 64
      pairs[j] = PairSub<Bfloat>(code, columns[0]);
    }
  }
};

// E2M1: sign, two bits of exponent and one of mantissa go to the lowest places of theirs in T.
template <class T>
struct FloatE2M1;

template <>
struct FloatE2M1<Half> {
  static constexpr int kBits = 4;
  static constexpr float kUnit = 0x1p14F;
  ONNXQ_HD static uint32_t Column(float, int) { return 0; }
  template <int place>  // of the code's lowest bit in each half
  ONNXQ_HD static uint32_t At(uint32_t s) {
    return (ShiftLeft<12 - place>(s) & 0x80008000U) | (ShiftLeft<9 - place>(s) & 0x0e000e00U);
  }
  ONNXQ_HD static void Decode(uint32_t word, const uint32_t*, uint32_t* pairs) {
    const uint32_t s = NeighboursInHalves(word);
    pairs[0] = At<0>(s);
    pairs[2] = At<4>(s);
    pairs[1] = At<8>(s);
    pairs[3] = At<12>(s);
  }
};

template <>
struct FloatE2M1<Bfloat> {
  static constexpr int kBits = 4;
  static constexpr float kUnit = 1.0F;
  ONNXQ_HD static uint32_t Column(float, int) { return 0; }
  template <int place>
  ONNXQ_HD static uint32_t At(uint32_t s) {
    constexpr uint32_t kUp = 0x7e807e80U;  // 2^126: sums of numbers near 2^-126 would underflow
    return PairMul<Bfloat>(
        (ShiftLeft<12 - place>(s) & 0x80008000U) | (ShiftLeft<6 - place>(s) & 0x01c001c0U), kUp);
  }
  ONNXQ_HD static void Decode(uint32_t word, const uint32_t*, uint32_t* pairs) {
    const uint32_t s = NeighboursInHalves(word);
    pairs[0] = At<0>(s);
    pairs[2] = At<4>(s);
    pairs[1] = At<8>(s);
    pairs[3] = At<12>(s);
  }
};

// E4M3, without its NaN.
template <class T>
struct FloatE4M3;

template <>
struct FloatE4M3<Half> {
  static constexpr int kBits = 8;
  static constexpr float kUnit = 0x1p8F;
  ONNXQ_HD static uint32_t Column(float, int) { return 0; }
  ONNXQ_HD static void Decode(uint32_t word, const uint32_t*, uint32_t* pairs) {
    const uint32_t s = NeighboursInHalves(word);
    pairs[0] = (s << 8 & 0x80008000U) | (s << 7 & 0x3f803f80U);
    pairs[1] = (s & 0x80008000U) | (s >> 1 & 0x3f803f80U);
  }
};

template <>
struct FloatE4M3<Bfloat> {
  static constexpr int kBits = 8;
  static constexpr float kUnit = 1.0F;
  ONNXQ_HD static uint32_t Column(float, int) { return 0; }
  ONNXQ_HD static void Decode(uint32_t word, const uint32_t*, uint32_t* pairs) {
    constexpr uint32_t kUp = 0x7b807b80U;  // 2^120
    const uint32_t s = NeighboursInHalves(word);
    pairs[0] = PairMul<Bfloat>((s << 8 & 0x80008000U) | (s << 4 & 0x07f007f0U), kUp);
    pairs[1] = PairMul<Bfloat>((s & 0x80008000U) | (s >> 4 & 0x07f007f0U), kUp);
  }
};

// A lane's words of a tile to its two fragments. columns[i][half] are Decoder::Column's.
template <class Decoder>
ONNXQ_HD void DecodeTile(const uint32_t* words, const uint32_t (*columns)[2], uint32_t (*a)[4]) {
  ONNXQ_UNROLL
  for (int i = 0; i < 2; ++i) {
    if constexpr (Decoder::kBits == 4) {
      uint32_t pairs[4];
      Decoder::Decode(words[i], columns[i], pairs);
      a[i][0] = pairs[0];
      a[i][1] = pairs[2];
      a[i][2] = pairs[1];
      a[i][3] = pairs[3];
    } else {
      ONNXQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t pairs[2];
        Decoder::Decode(words[2 * i + half], &columns[i][half], pairs);
        a[i][half] = pairs[0];
        a[i][2 + half] = pairs[1];
      }
    }
  }
}

}  // namespace onnxq::cuda
