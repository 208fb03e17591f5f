// QuantMatMul for up to eight rows of x in a block: bound by the bytes of the weights.
//
// A block takes one panel of 32 columns and all of K. Its warps share K and add up in shared
// memory, in their order. Each warp keeps the next chunk of tiles on its way while it multiplies
// one. Scales and zero points of the panel come to shared memory once. K must be a multiple of 4.
//
// Grid: x panels, y groups of eight rows.
#pragma once

#include "quant_mat_mul.h"

namespace onnxq::cuda {

inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvRows = 8;
inline constexpr int kGemvThreads = kGemvWarps * kWarp;

template <int bits>
inline constexpr int kGemvChunk = bits == 4 ? 8 : 4;  // tiles: 2 KB a warp

// Shared memory: scales in float32, then zero points; later the warps' sums [warps][rows][33].
ONNXQ_HD int64_t GemvScaleBytes(const QuantMatMulArgs& a) { return int64_t{a.groups} * kPanel * 4; }
ONNXQ_HD int64_t GemvSharedBytes(const QuantMatMulArgs& a) {
  const int64_t zeros = a.zero_points == nullptr ? 0 : int64_t{a.groups} * kPanel;
  const int64_t sums = kGemvWarps * kGemvRows * (kPanel + 1) * sizeof(float);
  const int64_t bytes = GemvScaleBytes(a) + zeros;
  return bytes > sums ? bytes : sums;
}

template <int bits>
struct GemvState {
  Words<TileLayout<bits>::kWords> words[kGemvChunk<bits>], next_words[kGemvChunk<bits>];
  Words<2> x[kGemvChunk<bits>], next_x[kGemvChunk<bits>];
  uint32_t columns[2][2];
  uint32_t a[2][4];
  float sum[2][4];
  float total[2][4];
};

template <class T, class Decoder, class Block>
ONNXQ_DEVICE void GemvBody(Block& block, const QuantMatMulArgs& a) {
  constexpr int kBits = Decoder::kBits;
  constexpr int kChunk = kGemvChunk<kBits>;
  using Layout = TileLayout<kBits>;
  using State = GemvState<kBits>;

  typename Block::template PerThread<State> states(block);
  const typename Block::Shared shared(block, static_cast<int>(GemvSharedBytes(a)));
  const int panel = block.X();
  const int first_row = block.Y() * kGemvRows;
  const int tiles = Tiles(a);
  const int steps = Steps(a);
  const int group_tiles = a.groups == 1 ? tiles : a.group / kTileK;
  const int zeros_at = static_cast<int>(GemvScaleBytes(a));
  const uint8_t* const codes = PanelCodes(a, panel);

  // Tiles that all lanes read without looking: those before `end`, all of whose steps are there.
  const int whole_tiles = a.k / kTileK;
  const auto load = [&](State& s, int lane, int tile, int end) {
    const int row = first_row + lane / 4;
    const uint8_t* const from = codes + int64_t{tile} * Layout::kBytes + Layout::LaneByte(lane);
    const auto* const x = static_cast<const typename T::Bits*>(a.x) + int64_t{row} * a.k +
                          int64_t{tile} * kTileK + lane % 4 * 4;
    const auto load_one = [&](int u) {
      s.next_words[u] =
          block.Stream(reinterpret_cast<const Words<Layout::kWords>*>(from + u * Layout::kBytes));
      if (row < a.m) s.next_x[u] = block.Load(reinterpret_cast<const Words<2>*>(x + u * kTileK));
    };
    ONNXQ_UNROLL
    for (int u = 0; u < kChunk; ++u) s.next_x[u] = {};
    if (tile + kChunk <= end && tile + kChunk <= whole_tiles) {
      ONNXQ_UNROLL
      for (int u = 0; u < kChunk; ++u) load_one(u);
      return;
    }
    ONNXQ_UNROLL
    for (int u = 0; u < kChunk; ++u) {
      s.next_words[u] = {};
      if (tile + u < end && 4 * (tile + u) + lane % 4 < steps) load_one(u);
    }
  };
  const auto first_tile = [&](int warp) {
    return static_cast<int>(int64_t{tiles} * warp / kGemvWarps);
  };

  block.EachWarp([&](const auto& warp) {
    warp.Each([&](int lane, int thread) {
      load(states[thread], lane, first_tile(warp.Index()), first_tile(warp.Index() + 1));
    });
  });
  block.EachThread([&](int thread) {
    const int64_t first = PanelGroups(a, panel);
    for (int i = thread; i < a.groups * kPanel; i += kGemvThreads) {
      const float scale = LoadScale(block, a.scale_type, a.scales, first + i);
      shared.template Set<float>(thread, 4 * i, scale);
      if (a.zero_points == nullptr) continue;
      shared.template Set<int8_t>(thread, zeros_at + i, block.Load(a.zero_points + first + i));
    }
  });
  block.Sync();

  block.EachWarp([&](const auto& warp) {
    const int begin = first_tile(warp.Index());
    const int end = first_tile(warp.Index() + 1);
    int group = begin / group_tiles;
    int left = group_tiles - begin % group_tiles;  // tiles of the group
    const auto begin_group = [&](State& s, int lane, int thread) {
      ONNXQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        ONNXQ_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int at = zeros_at + group * kPanel + Layout::Column(lane, i, half);
          const int zero = a.zero_points == nullptr ? 0 : shared.template Get<int8_t>(thread, at);
          s.columns[i][half] = Decoder::Column(static_cast<float>(zero - a.offset), half);
        }
      }
    };
    warp.Each([&](int lane, int thread) {
      State& s = states[thread];
      ONNXQ_UNROLL
      for (int i = 0; i < 8; ++i) s.sum[i / 4][i % 4] = s.total[i / 4][i % 4] = 0;
      if (begin < end) begin_group(s, lane, thread);
    });
    for (int tile = begin; tile < end; tile += kChunk) {
      warp.Each([&](int lane, int thread) {
        State& s = states[thread];
        ONNXQ_UNROLL
        for (int u = 0; u < kChunk; ++u) {
          s.words[u] = s.next_words[u];
          s.x[u] = s.next_x[u];
        }
        load(s, lane, tile + kChunk, end);
      });
      ONNXQ_UNROLL
      for (int u = 0; u < kChunk; ++u) {
        if (tile + u >= end) break;
        warp.Each([&](int, int thread) {
          State& s = states[thread];
          DecodeTile<Decoder>(s.words[u].w, s.columns, s.a);
        });
        ONNXQ_UNROLL
        for (int i = 0; i < 2; ++i) {
          warp.template Mma<T>([&](int thread) {
            State& s = states[thread];
            return MmaOperands{s.a[i], s.x[u].w, s.sum[i]};
          });
        }
        if (--left != 0 && tile + u + 1 < end) continue;
        warp.Each([&](int lane, int thread) {
          State& s = states[thread];
          ONNXQ_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int at = group * kPanel + Layout::Column(lane, i / 2, i % 2);
            const auto scale = shared.template Get<float>(thread, 4 * at);
            ONNXQ_UNROLL
            for (int j = 0; j < 2; ++j) {
              float& sum = s.sum[i / 2][i % 2 * 2 + j];
              float& total = s.total[i / 2][i % 2 * 2 + j];
              total = fmaf(sum, scale, total);
              sum = 0;
            }
          }
        });
        left = group_tiles;
        ++group;
        if (a.zero_points == nullptr || tile + u + 1 >= end) continue;
        warp.Each([&](int lane, int thread) { begin_group(states[thread], lane, thread); });
      }
    }
  });
  block.Sync();

  const auto place = [](int warp, int row, int column) {
    return static_cast<int>(sizeof(float)) * ((warp * kGemvRows + row) * (kPanel + 1) + column);
  };
  block.EachWarp([&](const auto& warp) {
    warp.Each([&](int lane, int thread) {
      State& s = states[thread];
      ONNXQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int column = Layout::Column(lane, i / 4, i % 4 / 2);
        const int row = lane % 4 * 2 + i % 2;
        shared.template Set<float>(thread, place(warp.Index(), row, column), s.total[i / 4][i % 4]);
      }
    });
  });
  block.Sync();
  block.EachThread([&](int thread) {
    static_assert(kGemvThreads == kGemvRows * kPanel);
    const int row = thread / kPanel;
    const int column = panel * kPanel + thread % kPanel;
    if (first_row + row >= a.m || column >= a.n) return;
    float total = 0;
    ONNXQ_UNROLL
    for (int warp = 0; warp < kGemvWarps; ++warp) {
      total += shared.template Get<float>(thread, place(warp, row, thread % kPanel));
    }
    Finish<T>(block, a, a.factor * Decoder::kUnit, first_row + row, column, total);
  });
}

}  // namespace onnxq::cuda
