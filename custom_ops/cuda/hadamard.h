// Hadamard: a block transforms a piece of x in shared memory, in float32, in the CPU's order: each
// group of c neighbours times the core, then butterflies of strides c, 2 c, 4 c, ..., then the
// scale. The same bits as on the CPU.
//
// A pass takes up to five strides at once: a thread keeps the 32 elements that they connect in
// registers. Without a core the first pass reads global memory; the last one writes there. So 8192
// columns cross shared memory twice.
#pragma once

#include "per_token.h"

namespace onnxq::cuda {

inline constexpr int kRadixBits = 5;
inline constexpr int kMaxHadamardPiece = 32768;   // 144 KB of shared memory
inline constexpr int kUsualHadamardPiece = 4096;  // keeps 128 threads busy

struct HadamardArgs {
  const void* x;      // [count] T
  const float* core;  // [c, c]
  void* y;            // [count] T; int8 when `scales` is given
  float* scales;      // [rows, ceil(piece / group)]; rows then are the pieces; or null
  int64_t count;      // a multiple of block
  int block;          // columns that are transformed together: c · 2^m
  int core_order;     // c
  int piece;          // elements that a thread block takes, a multiple of block
  int group;          // columns that share a scale, at most a piece; where there are scales
  float scale;
};

// Four words of padding after every 32 keep the accesses of a warp in different banks.
ONNXQ_HD int HadamardPlace(int i) { return 4 * (i + (i >> 5) * 4); }
ONNXQ_HD int HadamardSharedBytes(int piece) { return HadamardPlace(piece) + 128; }
ONNXQ_HD int HadamardPiece(int block) {
  return block >= kUsualHadamardPiece ? block : kUsualHadamardPiece / block * block;
}
ONNXQ_HD int HadamardThreads(int piece) {
  const int threads = (piece / 32 + kWarp - 1) / kWarp * kWarp;
  return threads < 64 ? 64 : threads > 512 ? 512 : threads;
}

struct HadamardState {
  uint32_t max_bits;
  float v[1 << kRadixBits];
};

// The butterflies (a + b, a - b) of `bits` strides on elements in registers.
template <int bits>
ONNXQ_HD void Butterflies(float* v) {
  ONNXQ_UNROLL
  for (int stride = 1; stride < 1 << bits; stride *= 2) {
    ONNXQ_UNROLL
    for (int i = 0; i < 1 << bits; ++i) {
      if ((i & stride) != 0) continue;
      const float sum = v[i] + v[i + stride];
      v[i + stride] = v[i] - v[i + stride];
      v[i] = sum;
    }
  }
}

// Elements of x that lie side by side, from a multiple of `count` on.
template <class T, int count, class Block>
ONNXQ_DEVICE void LoadNeighbours(const Block& block, const typename T::Bits* from, float* v) {
  constexpr int kWords = count * static_cast<int>(sizeof(typename T::Bits)) / 4;
  if constexpr (kWords >= 4) {
    ONNXQ_UNROLL
    for (int i = 0; i < count / kVector<T>; ++i) {
      const auto words = block.Load(reinterpret_cast<const Words<4>*>(from) + i);
      ONNXQ_UNROLL
      for (int j = 0; j < kVector<T>; ++j) v[i * kVector<T> + j] = ElementOf<T>(words, j);
    }
  } else {
    ONNXQ_UNROLL
    for (int i = 0; i < count; ++i) v[i] = T::To(block.Load(from + i));
  }
}

// One pass over the piece: `bits` strides from `stride` on. Elements come from x where `from` is
// given (then stride is 1), and go to y where `to` is.
template <class T, int bits, class Block, class States, class Shared>
ONNXQ_DEVICE void HadamardPass(Block& block, States& states, const Shared& shared,
                               const HadamardArgs& a, int count, int stride,
                               const typename T::Bits* from, typename T::Bits* to) {
  block.EachThread([&](int thread) {
    float* const v = states[thread].v;
    for (int set = thread; set < count >> bits; set += block.Threads()) {
      const int base = set / stride * (stride << bits) + set % stride;
      const auto at = [&](int i) { return HadamardPlace(base + i * stride); };
      if (from != nullptr) {
        LoadNeighbours<T, 1 << bits>(block, from + base, v);
        const float core = block.Load(a.core);
        ONNXQ_UNROLL
        for (int i = 0; i < 1 << bits; ++i) v[i] *= core;
      } else {
        ONNXQ_UNROLL
        for (int i = 0; i < 1 << bits; ++i) v[i] = shared.template Get<float>(thread, at(i));
      }
      Butterflies<bits>(v);
      if (to != nullptr) {
        ONNXQ_UNROLL
        for (int i = 0; i < 1 << bits; ++i) {
          block.Store(to + base + i * stride, T::From(v[i] * a.scale));
        }
      } else {
        ONNXQ_UNROLL
        for (int i = 0; i < 1 << bits; ++i) shared.template Set<float>(thread, at(i), v[i]);
      }
    }
  });
  block.Sync();
}

// What a transformed element is before it is rounded.
template <class Shared>
ONNXQ_DEVICE float Transformed(const Shared& shared, const HadamardArgs& a, int thread, int i) {
  return shared.template Get<float>(thread, HadamardPlace(i)) * a.scale;
}

// The piece is a row of one scale. Four elements a thread at once where the row has such.
template <class Block, class States, class Shared>
ONNXQ_DEVICE void QuantizePiece(Block& block, States& states, const Shared& shared,
                                const HadamardArgs& a, int count) {
  block.EachThread([&](int thread) {
    uint32_t most = 0;
    for (int i = thread; i < count; i += block.Threads()) {
      SeeMagnitude(Transformed(shared, a, thread, i), &most);
    }
    states[thread].max_bits = most;
  });
  MaxOfBlock(block, states, shared, HadamardPlace(a.piece));
  int8_t* const q = static_cast<int8_t*>(a.y) + int64_t{block.X()} * a.piece;
  block.EachThread([&](int thread) {
    const RowScale r = ScaleOfRow(states[thread].max_bits);
    if (thread == 0) block.Store(a.scales + block.X(), r.scale);
    if (count % 4 != 0) {
      for (int i = thread; i < count; i += block.Threads()) {
        block.Store(q + i, Int8Out::Quantize(Transformed(shared, a, thread, i), r));
      }
      return;
    }
    for (int i = 4 * thread; i < count; i += 4 * block.Threads()) {
      const auto words = shared.template Get<Words<4>>(thread, HadamardPlace(i));
      uint32_t four = 0;
      ONNXQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float value = FloatFromBits(words.w[j]) * a.scale;
        const int8_t code = Int8Out::Quantize(value, r);
        four |= static_cast<uint32_t>(static_cast<uint8_t>(code)) << (8 * j);
      }
      block.Store(reinterpret_cast<uint32_t*>(q + i), four);
    }
  });
}

// The piece is a row of several scales: a warp takes a group of columns after another.
template <class Block, class States, class Shared>
ONNXQ_DEVICE void QuantizeGroups(Block& block, States& states, const Shared& shared,
                                 const HadamardArgs& a, int count) {
  const int groups = (count + a.group - 1) / a.group;
  int8_t* const q = static_cast<int8_t*>(a.y) + int64_t{block.X()} * a.piece;
  block.EachWarp([&](const auto& warp) {
    for (int g = warp.Index(); g < groups; g += block.Threads() / kWarp) {
      const int begin = g * a.group;
      const int end = begin + a.group < count ? begin + a.group : count;
      warp.Each([&](int lane, int thread) {
        uint32_t most = 0;
        for (int i = begin + lane; i < end; i += kWarp) {
          SeeMagnitude(Transformed(shared, a, thread, i), &most);
        }
        states[thread].max_bits = most;
      });
      warp.Max([&](int thread) { return &states[thread].max_bits; });
      warp.Each([&](int lane, int thread) {
        const RowScale r = ScaleOfRow(states[thread].max_bits);
        if (lane == 0) block.Store(a.scales + int64_t{block.X()} * groups + g, r.scale);
        for (int i = begin + lane; i < end; i += kWarp) {
          block.Store(q + i, Int8Out::Quantize(Transformed(shared, a, thread, i), r));
        }
      });
    }
  });
}

// Grid: x pieces.
template <class T, class Block>
ONNXQ_DEVICE void HadamardBody(Block& block, const HadamardArgs& a) {
  using Bits = typename T::Bits;
  typename Block::template PerThread<HadamardState> states(block);
  const typename Block::Shared shared(block, HadamardSharedBytes(a.piece));
  const int64_t first = int64_t{block.X()} * a.piece;
  const int count = static_cast<int>(a.count - first < a.piece ? a.count - first : a.piece);
  const Bits* const x = static_cast<const Bits*>(a.x) + first;
  Bits* const y = a.scales == nullptr ? static_cast<Bits*>(a.y) + first : nullptr;

  int left = 0;  // strides to go
  while (a.core_order << (left + 1) <= a.block) ++left;
  const bool direct = a.core_order == 1 && left > 0;
  if (!direct) {
    const int c = a.core_order;
    block.EachThread([&](int thread) {
      for (int i = thread; i < count; i += block.Threads()) {
        const Bits* const group = x + i / c * c;
        const float* const column = a.core + i % c;
        float sum = T::To(block.Load(group)) * block.Load(column);
        for (int j = 1; j < c; ++j) {
          sum += T::To(block.Load(group + j)) * block.Load(column + j * c);
        }
        if (left == 0 && y != nullptr) {
          block.Store(y + i, T::From(sum * a.scale));
        } else {
          shared.template Set<float>(thread, HadamardPlace(i), sum);
        }
      }
    });
    block.Sync();
  }
  int stride = a.core_order;
  for (const Bits* from = direct ? x : nullptr; left > 0; from = nullptr) {
    const int bits = left < kRadixBits ? left : kRadixBits;
    left -= bits;
    Bits* const to = left == 0 ? y : nullptr;
    switch (bits) {
      case 1:
        HadamardPass<T, 1>(block, states, shared, a, count, stride, from, to);
        break;
      case 2:
        HadamardPass<T, 2>(block, states, shared, a, count, stride, from, to);
        break;
      case 3:
        HadamardPass<T, 3>(block, states, shared, a, count, stride, from, to);
        break;
      case 4:
        HadamardPass<T, 4>(block, states, shared, a, count, stride, from, to);
        break;
      default:
        HadamardPass<T, 5>(block, states, shared, a, count, stride, from, to);
        break;
    }
    stride <<= bits;
  }
  if (a.scales == nullptr) return;

  if (a.group >= count) {
    QuantizePiece(block, states, shared, a, count);
  } else {
    QuantizeGroups(block, states, shared, a, count);
  }
}

}  // namespace onnxq::cuda
