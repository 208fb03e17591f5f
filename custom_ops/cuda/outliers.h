// DynamicQuantMatMul's columns of outliers: found, put in order, and their product added in float.
//
// Nothing here tells the host how many there are, so that nothing waits: kernels read the count.
#pragma once

#include "quant_mat_mul_any.h"

namespace onnxq::cuda {

// Which columns may be outliers: named ones, and those that hold a magnitude from a threshold on.
struct Outliers {
  const int64_t* named = nullptr;  // [named_count] in device memory
  int named_count = 0;
  float threshold = 0;  // 0: none are looked for
};

// R named columns; `pieces` of M are looked through by different blocks.
struct OutlierArgs {
  const void* x;         // [M, K] T
  const int64_t* named;  // [R]; those that are not in 0 to K - 1 name nothing
  uint8_t* found;        // [pieces, K]
  uint8_t* outlier;      // [K] 1 where a column is one
  int* columns;          // [K] the outliers, ascending, and then the others
  int* count;            // [1] of the outliers
  int m;
  int k;
  int named_count;  // R
  int pieces;
  float threshold;  // magnitudes from it on are outliers, NaN too; 0 looks for none
};

inline constexpr int kFindRows = 8;
inline constexpr int kFindColumns = kWarp;
inline constexpr int kFindThreads = kFindRows * kFindColumns;
inline constexpr int kMaxOutlierPieces = 8;

// Pieces of at least 64 rows; one where no magnitude is looked at.
ONNXQ_HD int OutlierPieces(int m, float threshold) {
  const int pieces = m / 64;
  if (!(threshold > 0) || pieces < 1) return 1;
  return pieces > kMaxOutlierPieces ? kMaxOutlierPieces : pieces;
}

struct FindState {
  uint32_t found;
};

// Grid: x groups of 32 columns, y pieces. Shared memory: [rows][32] words.
inline constexpr int kFindSharedBytes = 4 * kFindThreads;

template <class T, class Block>
ONNXQ_DEVICE void FindOutliersBody(Block& block, const OutlierArgs& a) {
  typename Block::template PerThread<FindState> states(block);
  const typename Block::Shared shared(block, kFindSharedBytes);
  const int first = block.X() * kFindColumns;
  const int begin = static_cast<int>(int64_t{a.m} * block.Y() / a.pieces);
  const int end = static_cast<int>(int64_t{a.m} * (block.Y() + 1) / a.pieces);
  const auto* const x = static_cast<const typename T::Bits*>(a.x);
  block.EachThread([&](int thread) {
    const int column = first + thread % kFindColumns;
    uint32_t found = 0;
    if (a.threshold > 0 && column < a.k) {
      for (int row = begin + thread / kFindColumns; row < end; row += kFindRows) {
        const float value = T::To(block.Load(x + int64_t{row} * a.k + column));
        if (!(fabsf(value) < a.threshold)) found = 1;
      }
    }
    // The first piece looks at the names too, a share in each row of threads.
    if (block.Y() == 0) {
      for (int i = thread / kFindColumns; i < a.named_count; i += kFindRows) {
        if (block.Load(a.named + i) == column) found = 1;
      }
    }
    shared.template Set<uint32_t>(thread, 4 * thread, found);
  });
  block.Sync();
  block.EachThread([&](int thread) {
    if (thread >= kFindColumns || first + thread >= a.k) return;
    uint32_t found = 0;
    for (int row = 0; row < kFindRows; ++row) {
      found |= shared.template Get<uint32_t>(thread, 4 * (row * kFindColumns + thread));
    }
    block.Store(a.found + int64_t{block.Y()} * a.k + first + thread, static_cast<uint8_t>(found));
  });
}

inline constexpr int kOrderThreads = 256;
inline constexpr int kOrderSharedBytes = 4 * kOrderThreads;

struct OrderState {
  int here;    // outliers of this thread's columns
  int before;  // of the threads before it
  int all;
};

// One block: a thread takes neighbouring columns. Shared memory: a count a thread.
template <class Block>
ONNXQ_DEVICE void OrderColumnsBody(Block& block, const OutlierArgs& a) {
  typename Block::template PerThread<OrderState> states(block);
  const typename Block::Shared shared(block, kOrderSharedBytes);
  const auto begin = [&](int thread) {
    return static_cast<int>(int64_t{a.k} * thread / kOrderThreads);
  };
  const auto is_outlier = [&](int column) {
    uint32_t found = 0;
    for (int piece = 0; piece < a.pieces; ++piece) {
      found |= block.Load(a.found + int64_t{piece} * a.k + column);
    }
    return found != 0;
  };
  block.EachThread([&](int thread) {
    OrderState& s = states[thread];
    s.here = 0;
    for (int column = begin(thread); column < begin(thread + 1); ++column) {
      const bool outlier = is_outlier(column);
      s.here += outlier ? 1 : 0;
      block.Store(a.outlier + column, static_cast<uint8_t>(outlier ? 1 : 0));
    }
    shared.template Set<int>(thread, 4 * thread, s.here);
  });
  block.Sync();
  block.EachThread([&](int thread) {
    OrderState& s = states[thread];
    s.before = 0;
    s.all = 0;
    for (int other = 0; other < kOrderThreads; ++other) {
      const int count = shared.template Get<int>(thread, 4 * other);
      s.all += count;
      if (other < thread) s.before += count;
    }
    int outliers = s.before;
    int others = s.all + begin(thread) - s.before;
    for (int column = begin(thread); column < begin(thread + 1); ++column) {
      int& place = is_outlier(column) ? outliers : others;
      block.Store(a.columns + place++, column);
    }
    if (thread == 0) block.Store(a.count, s.all);
  });
}

inline constexpr int kAddWarps = 8;
inline constexpr int kAddThreads = kAddWarps * kWarp;
inline constexpr int kAddRows = 4;  // of a warp

struct AddState {
  float v[kAddRows];
};

// y = sums + the outliers' product, one fused multiply-add after another. A lane takes a column of
// the panel. Grid: x panels, y groups of kAddWarps · kAddRows rows. Shared memory: levels.
template <class T, class Block>
ONNXQ_DEVICE void AddOutliersBody(Block& block, const QuantMatMulArgs& a, const OutlierArgs& o) {
  const int bits = a.bits;
  typename Block::template PerThread<AddState> states(block);
  const typename Block::Shared shared(block, 4 << bits);
  const int panel = block.X();
  const uint8_t* const codes = PanelCodes(a, panel);
  const auto* const x = static_cast<const typename T::Bits*>(o.x);
  block.EachThread([&](int thread) {
    for (int i = thread; i < 1 << bits; i += kAddThreads) {
      shared.template Set<float>(thread, 4 * i, block.Load(a.levels + i));
    }
  });
  block.Sync();
  block.EachThread([&](int thread) {
    const int lane = thread % kWarp;
    const int column = panel * kPanel + lane;
    const int first = (block.Y() * kAddWarps + thread / kWarp) * kAddRows;
    if (column >= a.n || first >= a.m) return;
    AddState& s = states[thread];
    const auto place = [&](int r) { return int64_t{first + r} * a.n + column; };
    ONNXQ_UNROLL
    for (int r = 0; r < kAddRows; ++r) {
      s.v[r] = first + r < a.m ? block.Load(a.sums + place(r)) : 0.0F;
    }
    const int count = block.Load(o.count);
    for (int i = 0; i < count; ++i) {
      const int k = block.Load(o.columns + i);
      const int code = LoadCode(block, codes + int64_t{k / 4} * 16 * bits, bits, lane, k % 4);
      const int64_t at = PanelGroups(a, panel) + int64_t{k / a.group} * kPanel + lane;
      const float level = shared.template Get<float>(thread, 4 * code) - GroupZero(block, a, at);
      const float weight = level * GroupScale(block, a, at);
      ONNXQ_UNROLL
      for (int r = 0; r < kAddRows; ++r) {
        if (first + r >= a.m) break;
        s.v[r] = fmaf(T::To(block.Load(x + int64_t{first + r} * a.k + k)), weight, s.v[r]);
      }
    }
    ONNXQ_UNROLL
    for (int r = 0; r < kAddRows; ++r) {
      if (first + r >= a.m) break;
      block.Store(static_cast<typename T::Bits*>(a.y) + place(r), T::From(s.v[r]));
    }
  });
}

}  // namespace onnxq::cuda
