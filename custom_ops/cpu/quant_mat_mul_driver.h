// The loops of QuantMatMul around the vector code of one instruction set.
//
// `V` gives the vector code. Everything here is in an unnamed namespace: each instruction set has
// its own copy (see per_token_scalar.h).
//
// A block of rows goes through K in chunks. For each chunk the weights of one or two panels are
// unpacked once, to bytes or floats that stay in the nearest cache, and then used by all rows, a
// tile of V::kTileRows rows at a time. Sums that are not complete at the end of a chunk wait in
// `sums` (the groups done so far, float) and `group` (the group begun, integer).
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "quant_mat_mul.h"
#include "quant_mat_mul_numbers.h"

namespace onnxq {
namespace {

// Calls f(0), ..., f(n - 1) with constants. Vectors in an array stay in registers only if each
// index is a constant before the compiler's loop passes; gcc 12 unrolls loops too late for that.
#define ONNXQ_INLINE __attribute__((always_inline))
#define ONNXQ_NOINLINE __attribute__((noinline))
template <class F, int... i>
ONNXQ_INLINE inline void Each(std::integer_sequence<int, i...>, const F& f) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int n, class F>
ONNXQ_INLINE inline void Each(const F& f) {
  Each(std::make_integer_sequence<int, n>{}, f);
}

constexpr int64_t kChunkSteps = 128;      // 512 k: 32 KiB of bytes for two panels
constexpr int64_t kFloatChunkSteps = 32;  // 128 k: 32 KiB of floats
constexpr int64_t kMinGroupSteps = 4;
constexpr int64_t kMaxPieces = kChunkSteps / kMinGroupSteps;

// A part of a group within a chunk.
struct Piece {
  int64_t steps;
  int64_t group;
  bool first;  // the group begins here
  bool last;   // and ends here
};

struct Block {
  alignas(64) float sums[kBlockRows * 2 * kPanel];
  alignas(64) int32_t group[kBlockRows * 2 * kPanel];
  alignas(64) float scales[kMaxPieces * 2 * kPanel];
  alignas(64) int32_t zeros[kMaxPieces * 2 * kPanel];  // offset - zero point
  alignas(64) uint8_t weights[2][kChunkSteps * 4 * kPanel];
};

// What a tile of rows needs to go through one chunk. Row r of the tile has its 64 (or 32) sums at
// sums + r * width.
struct Int8Tile {
  const int8_t* q;
  int64_t q_stride;
  const int32_t* starts;
  int64_t groups;
  const uint8_t* panels[2];
  const Piece* pieces;
  int64_t piece_count;
  const float* scales;
  const int32_t* zeros;      // null without zero points
  const float* group_scale;  // [rows, G], or null
  uint8_t top;               // the largest of the bytes
  GroupSum kind;             // with kInteger scales and sums are the bits of integers
  float* sums;
  int32_t* group;
};

struct FloatTile {
  const float* x;
  int64_t x_stride;
  const float* weights;  // [k, width]
  int64_t k;
  float* sums;
};

int64_t CutChunk(const QuantWeights& w, int64_t step, int64_t limit, Piece* pieces,
                 int64_t* chunk_steps) {
  const int64_t end = std::min(w.steps, step + limit);
  int64_t count = 0;
  int64_t at = step;
  while (at < end) {
    const int64_t group = at / w.group_steps;
    const int64_t group_end = std::min(w.steps, (group + 1) * w.group_steps);
    // A group that begins here but does not fit waits for the next chunk, unless it fits in none.
    if (group_end > end && at > step && w.group_steps <= limit) break;
    const int64_t stop = std::min(group_end, end);
    pieces[count++] = {stop - at, group, at == group * w.group_steps, stop == group_end};
    at = stop;
  }
  *chunk_steps = at - step;
  return count;
}

// Calls `body` with the kind as a constant, for weights that integer activations can meet.
template <class Body>
ONNXQ_INLINE inline void WithByteKind(const QuantWeights& w, const Body& body) {
  switch (w.kind) {
    case LevelKind::kTable2:
      return body(std::integral_constant<LevelKind, LevelKind::kTable2>{});
    case LevelKind::kTable4:
      return body(std::integral_constant<LevelKind, LevelKind::kTable4>{});
    case LevelKind::kTable8:
      return body(std::integral_constant<LevelKind, LevelKind::kTable8>{});
    case LevelKind::kTable16:
      return body(std::integral_constant<LevelKind, LevelKind::kTable16>{});
    case LevelKind::kTable64:
      return body(std::integral_constant<LevelKind, LevelKind::kTable64>{});
    case LevelKind::kAffine4:
      return body(std::integral_constant<LevelKind, LevelKind::kAffine4>{});
    default:
      return body(std::integral_constant<LevelKind, LevelKind::kAffine8>{});
  }
}

// The same for float activations; 4-bit levels all go through the table.
template <class Body>
void WithKind(const QuantWeights& w, const Body& body) {
  switch (w.kind) {
    case LevelKind::kTable2:
      return body(std::integral_constant<LevelKind, LevelKind::kTable2>{});
    case LevelKind::kTable4:
      return body(std::integral_constant<LevelKind, LevelKind::kTable4>{});
    case LevelKind::kTable8:
      return body(std::integral_constant<LevelKind, LevelKind::kTable8>{});
    case LevelKind::kTable16:
    case LevelKind::kAffine4:
      return body(std::integral_constant<LevelKind, LevelKind::kTable16>{});
    case LevelKind::kTable64:
      return body(std::integral_constant<LevelKind, LevelKind::kTable64>{});
    case LevelKind::kAffine8:
      return body(std::integral_constant<LevelKind, LevelKind::kAffine8>{});
    case LevelKind::kE4M3:
      return body(std::integral_constant<LevelKind, LevelKind::kE4M3>{});
    case LevelKind::kTable256:
      return body(std::integral_constant<LevelKind, LevelKind::kTable256>{});
  }
}

template <class V>
void WriteRows(const QuantProduct& p, const float* sums, int64_t width, int64_t first, int64_t row,
               int64_t rows) {
  const int64_t n = p.weights->n;
  const int64_t column = first * kPanel;
  const int64_t count = std::min(width, n - column);
  for (int64_t r = 0; r < rows; ++r) {
    const float* scale = p.row_scale == nullptr     ? nullptr
                         : p.group_scale == nullptr ? p.row_scale + row + r
                                                    : p.row_scale;
    const float* bias = p.bias.values + column * p.bias.step;
    const int64_t at = (row + r) * n + column;
    if (p.y_half) {
      V::WriteRow(sums + r * width, scale, bias, p.bias.step, count,
                  static_cast<uint16_t*>(p.y) + at);
    } else {
      V::WriteRow(sums + r * width, scale, bias, p.bias.step, count, static_cast<float*>(p.y) + at);
    }
  }
}

GroupSum GroupSumOf(const QuantProduct& p) {
  if (p.weights->integer_scales()) return GroupSum::kInteger;
  return p.group_scale == nullptr ? GroupSum::kFloat : GroupSum::kScaled;
}

// Calls `body` with the kind of sum as a constant.
template <class Body>
ONNXQ_INLINE inline void WithGroupSum(GroupSum kind, const Body& body) {
  switch (kind) {
    case GroupSum::kInteger:
      return body(std::integral_constant<GroupSum, GroupSum::kInteger>{});
    case GroupSum::kScaled:
      return body(std::integral_constant<GroupSum, GroupSum::kScaled>{});
    default:
      return body(std::integral_constant<GroupSum, GroupSum::kFloat>{});
  }
}

// Where the scale of a row's group lies, for sums that need it.
template <GroupSum kind>
ONNXQ_INLINE inline const float* RowScaleAt(const float* scales, int64_t at) {
  if constexpr (kind == GroupSum::kScaled) return scales + at;
  return nullptr;
}

// Sums of integer scales: the bits of integers become floats.
void SumsToFloat(float* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    int32_t whole;
    std::memcpy(&whole, sums + i, sizeof whole);
    sums[i] = static_cast<float>(whole);
  }
}

// The rest of the rows in one tile of exactly that many.
template <class V, int panels, int rows>
void RestOfRows(const Int8Tile& tile, int64_t rest) {
  if constexpr (rows > 0) {
    if (rest == rows) {
      WithGroupSum(tile.kind, [&](auto kind) { V::template Int8Rows<rows, panels, kind>(tile); });
    } else {
      RestOfRows<V, panels, rows - 1>(tile, rest);
    }
  }
}
template <class V, int panels, int rows>
void RestOfRows(const FloatTile& tile, int64_t rest) {
  if constexpr (rows > 0) {
    if (rest == rows) {
      V::template FloatRows<rows, panels>(tile);
    } else {
      RestOfRows<V, panels, rows - 1>(tile, rest);
    }
  }
}

void FetchRows(const QuantProduct& p, int64_t column, int64_t width, int64_t row, int64_t rows) {
  const int64_t n = p.weights->n;
  const int64_t size = p.y_half ? 2 : 4;
  for (int64_t r = row; r < row + rows; ++r) {
    const char* y = static_cast<const char*>(p.y) + (r * n + column) * size;
    const int64_t bytes = std::min(width, n - column) * size;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(y + at, 1, 2);
  }
}

// Fetches what the next chunk unpacks, and where the block's results go, while the tiles of this
// chunk are multiplied: neither is in a cache when it is first touched.
template <int panels>
struct Fetch {
  Fetch(const QuantProduct& p, int64_t first, int64_t step, int64_t limit, int64_t tiles) {
    const QuantWeights& w = *p.weights;
    const bool more = step < w.steps;
    const int64_t all = (w.n + kPanel - 1) / kPanel;
    const int64_t from = more ? first : first + panels;
    const int64_t steps = std::min(more ? w.steps - step : w.steps, limit);
    if (from + panels > all) return;
    for (int i = 0; i < panels; ++i) {
      codes[i] = w.codes + ((from + i) * w.steps + (more ? step : 0)) * w.code_bytes();
    }
    bytes = steps * w.code_bytes();
    share = (bytes / tiles / kLine + 1) * kLine;
  }

  void Next() {
    for (int64_t end = std::min(done + share, bytes); done < end; done += kLine) {
      for (int i = 0; i < panels; ++i) __builtin_prefetch(codes[i] + done, 0, 2);
    }
  }

  static constexpr int64_t kLine = 64;
  const uint8_t* codes[panels] = {};
  int64_t bytes = 0;
  int64_t share = 0;
  int64_t done = 0;
};

template <class V, int panels>
void Int8BlockOf(const QuantProduct& p, int64_t first, int64_t row, int64_t rows) {
  const QuantWeights& w = *p.weights;
  constexpr int64_t kWidth = panels * kPanel;
  Block block;
  std::memset(block.sums, 0, static_cast<size_t>(rows * kWidth) * sizeof(float));
  const bool unpacked = w.kind == LevelKind::kAffine8;
  const int64_t scale_bytes = ScaleBytes(w.scale_type);
  int64_t steps = 0;
  for (int64_t step = 0; step < w.steps; step += steps) {
    Piece pieces[kMaxPieces + 1];
    const int64_t count = CutChunk(w, step, kChunkSteps, pieces, &steps);
    Int8Tile tile{};
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t panel = first + i;
      const uint8_t* codes = w.codes + (panel * w.steps + step) * w.code_bytes();
      tile.panels[i] = unpacked ? codes : block.weights[i];
      if (!unpacked) V::UnpackBytes(w, codes, steps, block.weights[i]);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = (panel * w.groups + pieces[j].group) * kPanel;
        const char* scales = static_cast<const char*>(w.scales) + at * scale_bytes;
        V::LoadScales(w.scale_type, scales, block.scales + j * kWidth + i * kPanel);
        if (w.zero_points == nullptr) continue;
        int32_t* zeros = block.zeros + j * kWidth + i * kPanel;
        for (int64_t c = 0; c < kPanel; ++c) zeros[c] = w.offset - w.zero_points[at + c];
      }
    }
    tile.q_stride = p.q_stride;
    tile.groups = w.groups;
    tile.pieces = pieces;
    tile.piece_count = count;
    tile.scales = block.scales;
    tile.top = w.top;
    tile.kind = GroupSumOf(p);
    tile.zeros = w.zero_points == nullptr ? nullptr : block.zeros;
    Fetch<panels> fetch(p, first, step + steps, kChunkSteps,
                        (rows + V::kInt8TileRows - 1) / V::kInt8TileRows);
    const bool ends = step + steps == w.steps;
    for (int64_t r = 0; r < rows; r += V::kInt8TileRows) {
      fetch.Next();
      if (ends)
        FetchRows(p, first * kPanel, kWidth, row + r,
                  std::min<int64_t>(V::kInt8TileRows, rows - r));
      tile.q = p.q + (row + r) * p.q_stride + 4 * step;
      tile.starts = p.starts + (row + r) * w.groups;
      if (p.group_scale != nullptr) tile.group_scale = p.group_scale + (row + r) * w.groups;
      tile.sums = block.sums + r * kWidth;
      tile.group = block.group + r * kWidth;
      RestOfRows<V, panels, V::kInt8TileRows>(tile, std::min<int64_t>(V::kInt8TileRows, rows - r));
    }
  }
  if (w.integer_scales()) SumsToFloat(block.sums, rows * kWidth);
  WriteRows<V>(p, block.sums, kWidth, first, row, rows);
}

template <class V, int panels>
void FloatBlockOf(const QuantProduct& p, int64_t first, int64_t row, int64_t rows) {
  const QuantWeights& w = *p.weights;
  constexpr int64_t kWidth = panels * kPanel;
  alignas(64) float sums[kBlockRows * kWidth];
  alignas(64) float weights[kFloatChunkSteps * 4 * kWidth];
  const int64_t tiles = (rows + V::kTileRows - 1) / V::kTileRows;
  const int64_t tile_rows = (rows + tiles - 1) / tiles;  // 8 rows as 4 and 4, not as 6 and 2
  std::memset(sums, 0, static_cast<size_t>(rows * kWidth) * sizeof(float));
  int64_t steps = 0;
  for (int64_t step = 0; step < w.steps; step += steps) {
    Piece pieces[kFloatChunkSteps + 1];
    const int64_t count = CutChunk(w, step, kFloatChunkSteps, pieces, &steps);
    for (int64_t i = 0; i < panels; ++i) {
      int64_t at = step;
      for (int64_t j = 0; j < count; at += pieces[j++].steps) {
        V::UnpackFloats(w, first + i, at, pieces[j],
                        weights + (at - step) * 4 * kWidth + i * kPanel, kWidth);
      }
    }
    FloatTile tile{};
    tile.x_stride = w.k;
    tile.weights = weights;
    tile.k = std::min(4 * (step + steps), w.k) - 4 * step;
    Fetch<panels> fetch(p, first, step + steps, kFloatChunkSteps, tiles);
    for (int64_t r = 0; r < rows; r += tile_rows) {
      fetch.Next();
      tile.x = p.x + (row + r) * w.k + 4 * step;
      tile.sums = sums + r * kWidth;
      RestOfRows<V, panels, V::kTileRows>(tile, std::min(tile_rows, rows - r));
    }
  }
  WriteRows<V>(p, sums, kWidth, first, row, rows);
}

template <class V>
void Int8Block(const QuantProduct& p, int64_t first, int64_t last, int64_t row, int64_t rows) {
  if (last - first == 2) {
    Int8BlockOf<V, 2>(p, first, row, rows);
  } else {
    Int8BlockOf<V, 1>(p, first, row, rows);
  }
}

template <class V>
void FloatBlock(const QuantProduct& p, int64_t first, int64_t last, int64_t row, int64_t rows) {
  if (last - first == 2) {
    FloatBlockOf<V, 2>(p, first, row, rows);
  } else {
    FloatBlockOf<V, 1>(p, first, row, rows);
  }
}

// Few rows: the weights of a panel are read once and unpacked in registers.
template <class V, int rows>
void Int8SmallOf(const QuantProduct& p, int64_t first, int64_t last) {
  if constexpr (rows > 0) {
    if (p.m != rows) return Int8SmallOf<V, rows - 1>(p, first, last);
    alignas(64) float sums[rows * kPanel];
    for (int64_t panel = first; panel < last; ++panel) {
      WithByteKind(*p.weights, [&](auto kind) {
        constexpr LevelKind kKind = decltype(kind)::value;
        if constexpr (kKind == LevelKind::kAffine4) {
          if (p.weights->integer_scales()) {
            V::template Int8Panel<rows, kKind, GroupSum::kInteger>(p, panel, sums);
            return SumsToFloat(sums, rows * kPanel);
          }
        }
        if (p.group_scale != nullptr) {
          V::template Int8Panel<rows, kKind, GroupSum::kScaled>(p, panel, sums);
        } else {
          V::template Int8Panel<rows, kKind, GroupSum::kFloat>(p, panel, sums);
        }
      });
      WriteRows<V>(p, sums, kPanel, panel, 0, rows);
    }
  }
}

template <class V>
void Int8Small(const QuantProduct& p, int64_t first, int64_t last) {
  if (p.m <= V::kPanelRows) return Int8SmallOf<V, V::kPanelRows>(p, first, last);
  for (int64_t panel = first; panel < last; panel += 2) {
    Int8Block<V>(p, panel, std::min(panel + 2, last), 0, p.m);
  }
}

// One row runs through registers; more are worth unpacking for.
template <class V>
void FloatSmall(const QuantProduct& p, int64_t first, int64_t last) {
  if (p.m > 1) {
    for (int64_t panel = first; panel < last; panel += 2) {
      FloatBlock<V>(p, panel, std::min(panel + 2, last), 0, p.m);
    }
    return;
  }
  alignas(64) float sums[2 * kPanel];
  for (int64_t panel = first; panel < last; panel += 2) {
    const int64_t count = std::min<int64_t>(2, last - panel);
    V::FloatPanels(p, panel, count, sums);
    WriteRows<V>(p, sums, count * kPanel, panel, 0, 1);
  }
}

void GroupSums(const int8_t* q, const QuantWeights& w, int32_t multiplier, int32_t* out) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t end = 4 * std::min((g + 1) * w.group_steps, w.steps);
    int32_t sum = 0;
    for (int64_t k = 4 * g * w.group_steps; k < end; ++k) sum += q[k];
    out[g] = multiplier * sum;
  }
}

// In quant_mat_mul_columns.h.
template <class V>
void AddColumns(const ColumnProduct& p, int64_t first, int64_t last);

template <class V>
constexpr QuantMatMulKernels KernelsOf() {
  return {GroupSums, Int8Small<V>, FloatSmall<V>, Int8Block<V>, FloatBlock<V>, AddColumns<V>};
}

}  // namespace
}  // namespace onnxq
