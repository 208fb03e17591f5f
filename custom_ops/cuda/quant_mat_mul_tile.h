// QuantMatMul for more rows than a GEMV takes: blocks of rows stay in shared memory.
//
// A block takes four panels (128 columns), 8 · kRowTiles rows, and its split of K, in stages of 64
// k. Asynchronous copies bring kStages - 1 stages ahead. Warp w multiplies panel w % 4 with the
// tiles 2 (w / 4) and 2 (w / 4) + 1 of each stage; at the end the two halves are added.
//
// Rows of x must begin at multiples of 16 bytes, and a group must hold 1, 2 or a multiple of 4
// tiles (TileTakes).
//
// Grid: x blocks of columns, y blocks of rows, z splits.
#pragma once

#include "quant_mat_mul.h"

namespace onnxq::cuda {

inline constexpr int kTileWarps = 8;
inline constexpr int kTileThreads = kTileWarps * kWarp;
inline constexpr int kTilePanels = 4;
inline constexpr int kTileColumns = kTilePanels * kPanel;
inline constexpr int kStages = 4;
inline constexpr int kStageTiles = 4;
inline constexpr int kStageK = kStageTiles * kTileK;
// Rows of x 160 bytes apart: the eight bytes that lanes read at once lie in different banks.
inline constexpr int kRowBytes = 2 * kStageK + 32;

// Where a stage's parts lie in it. Scales and zero points: [panel][group of the stage][32].
template <int bits, int row_tiles>
struct StageLayout {
  static constexpr int kCodes = 8 * row_tiles * kRowBytes;
  static constexpr int kPanelBytes = kStageTiles * TileLayout<bits>::kBytes;
  static constexpr int kScales = kCodes + kTilePanels * kPanelBytes;
  static constexpr int kZeros = kScales + kTilePanels * kStageTiles * kPanel * 4;
  static constexpr int kBytes = kZeros + kTilePanels * kStageTiles * kPanel;
  static constexpr int kSums = 8 * row_tiles * (kTileColumns + 4) * 4;
  static constexpr int kSharedBytes = kStages * kBytes > kSums ? kStages* kBytes : kSums;
};

ONNXQ_HD bool TileTakes(const QuantMatMulArgs& a) {
  const int tiles = a.group / kTileK;
  return a.k % 8 == 0 &&
         (a.groups == 1 || (a.group % kTileK == 0 && (tiles <= 2 || tiles % kStageTiles == 0)));
}
ONNXQ_HD int Stages(const QuantMatMulArgs& a) { return (a.k + kStageK - 1) / kStageK; }

template <int row_tiles>
struct TileState {
  uint32_t columns[2][2];
  uint32_t a[2][4];
  uint32_t b[2];
  float sum[2][row_tiles][4];
  float total[2][row_tiles][4];
};

template <class T, class Decoder, int row_tiles, class Block>
ONNXQ_DEVICE void TileBody(Block& block, const QuantMatMulArgs& a) {
  using Layout = TileLayout<Decoder::kBits>;
  using Stage = StageLayout<Decoder::kBits, row_tiles>;
  constexpr int kRows = 8 * row_tiles;

  typename Block::template PerThread<TileState<row_tiles>> states(block);
  const typename Block::Shared shared(block, Stage::kSharedBytes);
  const int first_panel = block.X() * kTilePanels;
  const int panels = static_cast<int>(CeilDivide(a.n, kPanel));
  const int first_row = block.Y() * kRows;
  const int begin = static_cast<int>(int64_t{Stages(a)} * block.Z() / a.splits);
  const int end = static_cast<int>(int64_t{Stages(a)} * (block.Z() + 1) / a.splits);
  const int panel_bytes = Steps(a) * 16 * Decoder::kBits;
  // Tiles of a group: 1, 2, or so many stages.
  const int group_tiles = a.groups == 1 ? kStageTiles * Stages(a) : a.group / kTileK;
  const int group_stages = group_tiles < kStageTiles ? 1 : group_tiles / kStageTiles;
  const int stage_group_bits = group_tiles == 1 ? 2 : group_tiles == 2 ? 1 : 0;
  const int scale_bytes = ScaleBytes(a.scale_type);
  const int scale_byte_bits = scale_bytes == 4 ? 2 : scale_bytes - 1;
  const auto first_group = [&](int stage) { return (stage / group_stages) << stage_group_bits; };

  const auto copy_stage = [&](int stage) {
    block.EachThread([&](int thread) {
      const int to = stage % kStages * Stage::kBytes;
      ONNXQ_UNROLL
      for (int piece = thread; piece < kRows * 8; piece += kTileThreads) {
        const int row = first_row + piece / 8;
        const int k = stage * kStageK + piece % 8 * 8;
        const bool valid = row < a.m && k < a.k;
        const int64_t at = valid ? int64_t{row} * a.k + k : 0;
        shared.CopyAsync(thread, to + piece / 8 * kRowBytes + piece % 8 * 16,
                         static_cast<const uint16_t*>(a.x) + at, valid);
      }
      ONNXQ_UNROLL
      for (int i = thread; i < kTilePanels * Stage::kPanelBytes / 16; i += kTileThreads) {
        const int panel = first_panel + i / (Stage::kPanelBytes / 16);
        const int at = stage * Stage::kPanelBytes + i % (Stage::kPanelBytes / 16) * 16;
        const bool valid = panel < panels && at < panel_bytes;
        const uint8_t* const from = valid ? PanelCodes(a, panel) + at : a.codes;
        shared.CopyAsync(thread, to + Stage::kCodes + 16 * i, from, valid);
      }
      // Scales and zero points of the stage's groups: of a panel they follow each other, in powers
      // of two of 16 bytes, at most one a thread.
      const auto copy_groups = [&](const void* values, int byte_bits, int part) {
        const int group_bits = byte_bits + 1;  // pieces of a group
        const int panel_bits = group_bits + stage_group_bits;
        if (thread >> panel_bits >= kTilePanels) return;
        const int panel = first_panel + (thread >> panel_bits);
        const int piece = thread & ((1 << panel_bits) - 1);
        const int group = first_group(stage);
        const bool valid = panel < panels && group + (piece >> group_bits) < a.groups;
        const int64_t at =
            valid ? ((PanelGroups(a, panel) + int64_t{group} * kPanel) << byte_bits) + piece * 16
                  : 0;
        const int panel_at = (thread >> panel_bits) * (kStageTiles * kPanel << byte_bits);
        shared.CopyAsync(thread, to + part + panel_at + piece * 16,
                         static_cast<const char*>(values) + at, valid);
      };
      copy_groups(a.scales, scale_byte_bits, Stage::kScales);
      if (a.zero_points != nullptr) copy_groups(a.zero_points, 0, Stage::kZeros);
    });
  };

  block.EachThread([&](int thread) {
    TileState<row_tiles>& s = states[thread];
    ONNXQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      s.columns[i][0] = Decoder::Column(static_cast<float>(-a.offset), 0);
      s.columns[i][1] = Decoder::Column(static_cast<float>(-a.offset), 1);
      ONNXQ_UNROLL
      for (int r = 0; r < row_tiles; ++r) {
        ONNXQ_UNROLL
        for (int j = 0; j < 4; ++j) s.sum[i][r][j] = s.total[i][r][j] = 0;
      }
    }
  });
  for (int stage = begin; stage < begin + kStages - 1; ++stage) {
    if (stage < end) copy_stage(stage);
    block.Commit();
  }

  for (int stage = begin; stage < end; ++stage) {
    block.template Wait<kStages - 2>();
    block.Sync();  // the stage has come, and all are done with the one before, where the next goes
    if (stage + kStages - 1 < end) copy_stage(stage + kStages - 1);
    block.Commit();
    block.EachWarp([&](const auto& warp) {
      const int from = stage % kStages * Stage::kBytes;
      const int panel = warp.Index() % kTilePanels;
      ONNXQ_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int tile = warp.Index() / kTilePanels * 2 + j;
        // Of the stage's groups.
        const int group = group_tiles < kStageTiles ? tile / group_tiles : 0;
        const auto place = [&](int lane, int i, int half) {
          return (panel * kStageTiles + group) * kPanel + Layout::Column(lane, i, half);
        };
        warp.Each([&](int lane, int thread) {
          TileState<row_tiles>& s = states[thread];
          if (a.zero_points != nullptr) {
            ONNXQ_UNROLL
            for (int i = 0; i < 4; ++i) {
              const int at = from + Stage::kZeros + place(lane, i / 2, i % 2);
              const int zero = shared.template Get<int8_t>(thread, at);
              s.columns[i / 2][i % 2] = Decoder::Column(static_cast<float>(zero - a.offset), i % 2);
            }
          }
          const auto words = shared.template Get<Words<Layout::kWords>>(
              thread, from + Stage::kCodes + panel * Stage::kPanelBytes + tile * Layout::kBytes +
                          Layout::LaneByte(lane));
          DecodeTile<Decoder>(words.w, s.columns, s.a);
        });
        ONNXQ_UNROLL
        for (int r = 0; r < row_tiles; ++r) {
          warp.Each([&](int lane, int thread) {
            const auto four = shared.template Get<Words<2>>(
                thread, from + (8 * r + lane / 4) * kRowBytes + tile * 2 * kTileK + lane % 4 * 8);
            states[thread].b[0] = four.w[0];
            states[thread].b[1] = four.w[1];
          });
          ONNXQ_UNROLL
          for (int i = 0; i < 2; ++i) {
            warp.template Mma<T>([&](int thread) {
              TileState<row_tiles>& s = states[thread];
              return MmaOperands{s.a[i], s.b, s.sum[i][r]};
            });
          }
        }
        const bool ends =
            group_tiles == 1 ||
            (j == 1 && (group_tiles == 2 || stage + 1 == end || (stage + 1) % group_stages == 0));
        if (!ends) continue;
        warp.Each([&](int lane, int thread) {
          TileState<row_tiles>& s = states[thread];
          ONNXQ_UNROLL
          for (int i = 0; i < 4; ++i) {
            // Panels of scales lie kStageTiles groups of their own type apart.
            const float scale = SharedScale(shared, a.scale_type, thread, from + Stage::kScales,
                                            place(lane, i / 2, i % 2));
            ONNXQ_UNROLL
            for (int r = 0; r < row_tiles; ++r) {
              ONNXQ_UNROLL
              for (int v = 0; v < 2; ++v) {
                float& sum = s.sum[i / 2][r][i % 2 * 2 + v];
                float& total = s.total[i / 2][r][i % 2 * 2 + v];
                total = fmaf(sum, scale, total);
                sum = 0;
              }
            }
          }
        });
      }
    });
  }
  block.template Wait<0>();
  block.Sync();

  // The halves of K meet in shared memory, [rows][columns]; the first half's warps add theirs.
  const auto sum_at = [](int row, int column) { return 4 * (row * (kTileColumns + 4) + column); };
  for (int half = 1; half >= 0; --half) {
    block.EachWarp([&](const auto& warp) {
      if (warp.Index() / kTilePanels != half) return;
      warp.Each([&](int lane, int thread) {
        ONNXQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int column =
              warp.Index() % kTilePanels * kPanel + Layout::Column(lane, i / 2, i % 2);
          ONNXQ_UNROLL
          for (int r = 0; r < row_tiles; ++r) {
            ONNXQ_UNROLL
            for (int v = 0; v < 2; ++v) {
              const int at = sum_at(8 * r + lane % 4 * 2 + v, column);
              float total = states[thread].total[i / 2][r][i % 2 * 2 + v];
              if (half == 0) total += shared.template Get<float>(thread, at);
              shared.template Set<float>(thread, at, total);
            }
          }
        }
      });
    });
    block.Sync();
  }
  block.EachThread([&](int thread) {
    for (int i = thread; i < kRows * kTileColumns; i += kTileThreads) {
      const int row = first_row + i / kTileColumns;
      const int column = first_panel * kPanel + i % kTileColumns;
      if (row >= a.m || column >= a.n) continue;
      const float total =
          shared.template Get<float>(thread, sum_at(i / kTileColumns, i % kTileColumns));
      if (a.splits == 1) {
        Finish<T>(block, a, a.factor * Decoder::kUnit, row, column, total);
      } else {
        block.Store(a.partial + (int64_t{block.Z()} * a.m + row) * a.n + column, total);
      }
    }
  });
}

inline constexpr int kSumThreads = 256;

// Adds the splits, in their order, and ends each element. Grid: x pieces of 256 of [M, N].
template <class T, class Block>
ONNXQ_DEVICE void SumSplitsBody(Block& block, const QuantMatMulArgs& a, float unit) {
  block.EachThread([&](int thread) {
    const int64_t count = int64_t{a.m} * a.n;
    const int64_t i = int64_t{block.X()} * kSumThreads + thread;
    if (i >= count) return;
    float total = 0;
    for (int split = 0; split < a.splits; ++split)
      total += block.Load(a.partial + split * count + i);
    Finish<T>(block, a, a.factor * unit, static_cast<int>(i / a.n), static_cast<int>(i % a.n),
              total);
  });
}

}  // namespace onnxq::cuda
