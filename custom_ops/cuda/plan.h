// Which kernel of QuantMatMul to run, and how. Plain arithmetic, tested on the CPU.
//
// The thresholds are estimates from byte and operation counts; docs/cuda.md says what is measured.
#pragma once

#include <cmath>

#include "cublas_lt.h"
#include "float8.h"
#include "outliers.h"
#include "quant_mat_mul_any.h"
#include "quant_mat_mul_gemv.h"
#include "quant_mat_mul_integer.h"
#include "quant_mat_mul_tile.h"

namespace onnxq::cuda {

// What the tensor cores' kernels can decode; kAny is left to the plain kernel.
enum class WeightKind : int { kAny = 0, kAffine4 = 1, kAffine8 = 2, kE2M1 = 3, kE4M3 = 4 };

struct WeightFormat {
  WeightKind kind = WeightKind::kAny;
  int offset = 0;     // lowest level of integers
  float unit = 1.0F;  // of a level, in numbers of the kind
};

inline float FromE2M1(int code) {
  const int magnitude = code & 7;
  const float value = magnitude < 2 ? 0.5F * static_cast<float>(magnitude)
                                    : std::ldexp(1.0F + 0.5F * static_cast<float>(magnitude & 1),
                                                 magnitude / 2 - 1);
  return (code & 8) != 0 ? -value : value;
}

// What the levels are. `nan_codes` says that a code of E4M3's NaN may occur.
inline WeightFormat ClassifyLevels(const float* levels, int bits, bool zero_points,
                                   bool nan_codes) {
  if (bits != 4 && bits != 8) return {};
  const int count = 1 << bits;
  // Integers up to 256 are exact in bfloat16.
  const float least = levels[0] - (zero_points ? 127.0F : 0.0F);
  const float most = levels[0] + static_cast<float>(count - 1) + (zero_points ? 128.0F : 0.0F);
  bool affine = std::nearbyint(levels[0]) == levels[0] && least >= -256.0F && most <= 256.0F;
  for (int i = 1; i < count && affine; ++i) {
    affine = levels[i] == levels[0] + static_cast<float>(i);
  }
  if (affine) {
    return {bits == 4 ? WeightKind::kAffine4 : WeightKind::kAffine8, static_cast<int>(levels[0]),
            1.0F};
  }
  const WeightFormat any;
  if (zero_points) return any;
  const int one = bits == 4 ? 2 : 0x38;  // the code of 1
  const float unit = levels[one];
  if (!(unit > 0.0F) || !std::isfinite(unit)) return any;
  for (int i = 0; i < count; ++i) {
    const float number = bits == 4 ? FromE2M1(i) : FromE4M3(static_cast<uint8_t>(i));
    if (std::isnan(number)) {
      if (nan_codes) return any;
    } else if (levels[i] != number * unit) {
      return any;
    }
  }
  return {bits == 4 ? WeightKind::kE2M1 : WeightKind::kE4M3, 0, unit};
}

// Whether weights can be multiplied as int8: one scale a column and levels that are such integers.
inline bool HasInt8Levels(const float* levels, int bits) {
  for (int i = 0; i < 1 << bits; ++i) {
    if (!(levels[i] >= -128.0F && levels[i] <= 127.0F)) return false;
    if (std::nearbyint(levels[i]) != levels[i]) return false;
  }
  return true;
}

enum class Route : int {
  kAny = 0,
  kGemv = 1,
  kTile = 2,
  kExpand = 3,   // to a plain matrix, then cuBLASLt
  kInteger = 4,  // to a plain matrix of int8, then cuBLASLt; x holds int8 then
};

// What both operands of a product with quantized rows can be stored as, beside 16-bit floats.
enum class Operands : int { kNone = 0, kInt8 = 1 };

struct Plan {
  Route route = Route::kAny;
  int row_tiles = 0;          // of kTile: 2, 4 or 8
  int splits = 1;             // of kTile
  int64_t shared_bytes = 0;   // dynamic shared memory of a block
  int64_t scratch_bytes = 0;  // that the launch needs
};

inline constexpr int64_t kMaxGemvSharedBytes = 98304;  // two blocks on a multiprocessor of sm_90
inline constexpr int kMaxTileRows = 128;
inline constexpr int kMaxSplits = 16;

template <int bits>
int64_t TileSharedBytes(int row_tiles) {
  return row_tiles == 2   ? StageLayout<bits, 2>::kSharedBytes
         : row_tiles == 4 ? StageLayout<bits, 4>::kSharedBytes
                          : StageLayout<bits, 8>::kSharedBytes;
}

// The parts of kExpand's scratch memory: the plain weights from 0 on, cuBLASLt's, and sums in
// float32 where there is something left to do with them.
struct ExpandScratch {
  explicit ExpandScratch(const QuantMatMulArgs& a)
      : finish(a.bias != nullptr || a.row_scale != nullptr || a.sums != nullptr),
        workspace(CeilDivide(int64_t{a.n} * a.k * 2, 256) * 256),
        sums(workspace + static_cast<int64_t>(kMatrixWorkspace)),
        bytes(sums + (finish ? int64_t{a.m} * a.n * 4 : 0)) {}
  bool finish;
  int64_t workspace;
  int64_t sums;
  int64_t bytes;
};

// The parts of kInteger's: plain weights from 0 on, cuBLASLt's, sums.
struct ByteScratch {
  explicit ByteScratch(const QuantMatMulArgs& a)
      : workspace(CeilDivide(int64_t{a.n} * a.k, 256) * 256),
        products(workspace + static_cast<int64_t>(kMatrixWorkspace)),
        bytes(products + int64_t{a.m} * a.n * 4) {}
  int64_t workspace;
  int64_t products;
  int64_t bytes;
};

// The parts of a product with rows that are quantized first; the plan's own comes last.
struct DynamicScratch {
  DynamicScratch(const QuantMatMulArgs& a, Route route, int element_bytes, const Outliers& o)
      : adds(o.named_count > 0 || o.threshold > 0),
        pieces(OutlierPieces(a.m, o.threshold)),
        row_scale(Round(int64_t{a.m} * a.k * (route == Route::kInteger ? 1 : element_bytes))),
        found(row_scale + Round(int64_t{a.m} * 4)),
        outlier(found + (adds ? Round(int64_t{pieces} * a.k) : 0)),
        columns(outlier + (adds ? Round(a.k) : 0)),
        count(columns + (adds ? Round(int64_t{a.k} * 4) : 0)),
        sums(count + (adds ? Round(4) : 0)),
        product(sums + (adds ? Round(int64_t{a.m} * a.n * 4) : 0)) {}
  static int64_t Round(int64_t bytes) { return CeilDivide(bytes, 256) * 256; }
  bool adds;
  int pieces;
  int64_t row_scale;  // the quantized rows begin at 0
  int64_t found;
  int64_t outlier;
  int64_t columns;
  int64_t count;
  int64_t sums;
  int64_t product;
};

// Args: m, n, k, group, groups, scale_type, and which pointers are null, of `a` count.
//   element_bytes: of the activations.
//   multiprocessors: of the device.
//   matrix_library: whether cuBLASLt is there.
//   operands: what x and the levels can be stored as, where rows have scales.
inline Plan PlanQuantMatMul(const QuantMatMulArgs& a, WeightKind kind, int element_bytes,
                            int multiprocessors, bool matrix_library, Operands operands) {
  Plan plan;
  const bool bytes = operands != Operands::kNone && a.row_scale != nullptr && a.groups == 1 &&
                     a.zero_points == nullptr && a.k % 16 == 0 && a.n % 16 == 0;
  if (bytes && a.m > kMaxTileRows && matrix_library) {
    plan.route = Route::kInteger;
    plan.scratch_bytes = ByteScratch(a).bytes;
    return plan;
  }
  const bool tensor_cores =
      kind != WeightKind::kAny && element_bytes == 2 && (a.groups == 1 || a.group % kTileK == 0);
  const bool wide =
      element_bytes == 2 && a.m > kMaxTileRows && matrix_library && a.k % 8 == 0 && a.n % 8 == 0;
  if (wide) {
    plan.route = Route::kExpand;
    plan.scratch_bytes = ExpandScratch(a).bytes;
    return plan;
  }
  if (!tensor_cores) return plan;
  const bool many_scales = GemvSharedBytes(a) > kMaxGemvSharedBytes;
  if ((a.m > kGemvRows || many_scales) && TileTakes(a)) {
    plan.route = Route::kTile;
    plan.row_tiles = a.m <= 16 ? 2 : a.m <= 32 ? 4 : 8;
    plan.shared_bytes =
        a.bits == 4 ? TileSharedBytes<4>(plan.row_tiles) : TileSharedBytes<8>(plan.row_tiles);
    const int64_t blocks = CeilDivide(a.n, kTileColumns) * CeilDivide(a.m, 8 * plan.row_tiles);
    // As many splits as give each multiprocessor a block, of at least two rounds of stages.
    const int64_t most = CeilDivide(Stages(a), 2 * kStages);
    int64_t splits = multiprocessors / blocks;
    splits = splits > most ? most : splits;
    splits = splits > kMaxSplits ? kMaxSplits : splits;
    plan.splits = splits < 1 ? 1 : static_cast<int>(splits);
    if (plan.splits > 1) plan.scratch_bytes = int64_t{plan.splits} * a.m * a.n * 4;
    return plan;
  }
  if (a.k % 4 == 0 && GemvSharedBytes(a) <= kMaxGemvSharedBytes) {
    plan.route = Route::kGemv;
    plan.shared_bytes = GemvSharedBytes(a);
  }
  return plan;
}

}  // namespace onnxq::cuda
