// The inner kernels of QuantMatMul, one set for each instruction set; defs/quant_mat_mul.py states
// the meaning and custom_ops/layout.py the layout of the weights.
//
// Symbols: M rows of activations, K reduction length, N columns; J = ceil(K / 4) steps of four k;
// G groups; P = ceil(N / 32) panels of 32 columns.
//
// All sets give the same bits: integers are summed exactly, floats in the order of the definition,
// one fused multiply-add after another, for each column alone. Vectors run across columns.
#pragma once

#include <cstdint>

namespace onnxq {

static constexpr int64_t kPanel = 32;       // columns of a panel
static constexpr int64_t kSmallRows = 8;    // up to here weights are unpacked in registers
static constexpr int64_t kBlockRows = 128;  // rows that share one unpacking of the weights

// kInt16 (Integer Scale) keeps the sum over groups in integers; only with kAffine4.
enum class ScaleType : int { kFloat32, kFloat16, kBfloat16, kE4M3, kE8M0, kInt16 };

// Activations as they are, or INT8 with a scale a row, or with one for each group of a row.
enum class Activations : int { kFloat, kInt8, kInt8Groups };

// How the integer sum over a group joins the sum of a column: times the scale in float, in integers
// (Integer Scale), or times the scales of the row's group and of the weight's.
enum class GroupSum : int { kFloat, kInteger, kScaled };

// How codes become levels.
enum class LevelKind : int {
  kTable2,    // 1-bit codes, 2 levels
  kTable4,    // 2-bit codes, 4 levels
  kTable8,    // 3-bit codes, 8 levels
  kTable16,   // 4-bit codes, 16 levels
  kTable64,   // 6-bit codes, 64 levels
  kAffine4,   // 4-bit codes, level = code + offset
  kAffine8,   // 8-bit codes, level = code + offset
  kE4M3,      // 8-bit codes that are the FP8 numbers themselves, none of them NaN
  kTable256,  // 8-bit codes, 256 levels
};

static constexpr int64_t kMaxByteLevels = 64;  // of tables that integer activations meet

static constexpr int64_t CodeBits(LevelKind kind) {
  switch (kind) {
    case LevelKind::kTable2:
      return 1;
    case LevelKind::kTable4:
      return 2;
    case LevelKind::kTable8:
      return 3;
    case LevelKind::kTable16:
    case LevelKind::kAffine4:
      return 4;
    case LevelKind::kTable64:
      return 6;
    default:
      return 8;
  }
}

// Bytes of one step of a panel: four k of 32 columns.
static constexpr int64_t StepBytes(LevelKind kind) { return 16 * CodeBits(kind); }

struct QuantMatMulAttributes {
  int64_t k = 0;
  int64_t n = 0;
  int64_t group = 0;
  int64_t bits = 0;
  int64_t layout = 0;
  Activations activations = Activations::kFloat;
  bool exponent_scales = false;  // u8 scales are powers of two
  float factor = 1;

  bool integers() const { return activations != Activations::kFloat; }
};

struct QuantBias {
  const float* values = nullptr;  // [N], or one number with step 0
  int64_t step = 0;
};

struct QuantWeights {
  const uint8_t* codes;       // [P, J, 16 * bits] packed
  int64_t code_count;         // of their bytes
  const void* scales;         // [P, G, 32] of scale_type
  const int8_t* zero_points;  // [P, G, 32], or null: none (one for all is in the levels)
  ScaleType scale_type;
  LevelKind kind;
  const float* levels;            // [2^bits]
  uint8_t bytes[kMaxByteLevels];  // tables with integer activations: level = bytes[code] + offset
  int32_t offset;                 // of kAffine4, kAffine8 and `bytes`
  uint8_t top;                    // the largest level less the offset
  float factor;                   // of all weights
  int64_t k, n;
  int64_t steps;        // J
  int64_t group_steps;  // J of a group
  int64_t groups;       // G

  bool integer_scales() const { return scale_type == ScaleType::kInt16; }
  int64_t code_bytes() const { return StepBytes(kind); }  // of one step of a panel
};

// One product: x [M, K] times the weights. Activations are either integers (q) or floats (x).
struct QuantProduct {
  const QuantWeights* weights;
  int64_t m;
  const int8_t* q;  // [M, q_stride], zeros from K to 4 J
  int64_t q_stride;
  const int32_t* starts;   // [M, G]: sum of q over the group, times offset where no zero points are
  const float* row_scale;  // [M]: scale of the row times factor; with group_scale [1]: factor
  const float* group_scale;  // [M, G]: scale of each group of a row, or null
  const float* x;            // [M, K]
  QuantBias bias;
  void* y;      // [M, N]
  bool y_half;  // y is float16
};

// Some columns of activations times their rows of the weights.
struct ColumnProduct {
  const QuantWeights* weights;
  const int64_t* columns;  // [count], each in [0, K)
  int64_t count;
  const float* x;  // [M, count]
  int64_t m;
  float* y;  // [M, N]
};

struct QuantMatMulKernels {
  // Group sums of one quantized row: out[g] = multiplier * sum of q over the group's steps.
  void (*group_sums)(const int8_t* q, const QuantWeights& weights, int32_t multiplier,
                     int32_t* out);
  // Columns of panels [first, last), all rows, of which there are at most kSmallRows.
  void (*int8_small)(const QuantProduct& product, int64_t first, int64_t last);
  void (*float_small)(const QuantProduct& product, int64_t first, int64_t last);
  // Rows [row, row + rows), at most kBlockRows, of panels [first, last), at most two.
  void (*int8_block)(const QuantProduct& product, int64_t first, int64_t last, int64_t row,
                     int64_t rows);
  void (*float_block)(const QuantProduct& product, int64_t first, int64_t last, int64_t row,
                      int64_t rows);
  // y += x * weights over the columns of panels [first, last), one multiply-add after another.
  void (*add_columns)(const ColumnProduct& product, int64_t first, int64_t last);
};

extern const QuantMatMulKernels kQuantMatMulScalar;
#if defined(__x86_64__)
extern const QuantMatMulKernels kQuantMatMulAvx2;
extern const QuantMatMulKernels kQuantMatMulAvx512vnni;
#endif

}  // namespace onnxq
