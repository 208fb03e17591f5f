// The kernels' bodies on the CPU, for ctypes. Every function returns null, or what broke.
#include "emulate.h"

#include "launch.h"
#include "outliers.h"
#include "plan.h"
#include "quantize_block.h"

namespace onnxq::cuda {
namespace {

void Declare(Memory* memory, const QuantMatMulArgs& a, int element_bytes) {
  const int64_t panels = CeilDivide(a.n, kPanel);
  memory->Input(a.x, int64_t{a.m} * a.k * element_bytes);
  memory->Input(a.codes, panels * Steps(a) * 16 * a.bits);
  memory->Input(a.scales, panels * a.groups * kPanel * ScaleBytes(a.scale_type));
  if (a.zero_points != nullptr) memory->Input(a.zero_points, panels * a.groups * kPanel);
  memory->Input(a.levels, 4 << a.bits);
  memory->Input(a.bias, a.bias_stride == 0 ? 4 : 4 * a.n);
  if (a.row_scale != nullptr) memory->Input(a.row_scale, 4 * a.m);
}

void DeclareResult(Memory* memory, const QuantMatMulArgs& a, int element_bytes) {
  const int64_t count = int64_t{a.m} * a.n;
  if (a.sums != nullptr) {
    memory->Output(a.sums, 4 * count);
  } else {
    memory->Output(a.y, element_bytes * count);
  }
}

template <class T, class Decoder>
void RunDecoded(const QuantMatMulArgs& a, Route route, int row_tiles) {
  Memory memory;
  Declare(&memory, a, 2);
  if (route == Route::kTile && a.splits > 1) {
    memory.Output(a.partial, int64_t{a.splits} * a.m * a.n * 4);
  } else {
    DeclareResult(&memory, a, 2);
  }
  if (route == Route::kGemv) {
    RunGrid(&memory, static_cast<int>(CeilDivide(a.n, kPanel)),
            static_cast<int>(CeilDivide(a.m, kGemvRows)), 1, kGemvThreads,
            [&](HostBlock& block) { GemvBody<T, Decoder>(block, a); });
  } else {
    const int x = static_cast<int>(CeilDivide(a.n, kTileColumns));
    const int y = static_cast<int>(CeilDivide(a.m, 8 * row_tiles));
    RunGrid(&memory, x, y, a.splits, kTileThreads, [&](HostBlock& block) {
      if (row_tiles == 2) TileBody<T, Decoder, 2>(block, a);
      if (row_tiles == 4) TileBody<T, Decoder, 4>(block, a);
      if (row_tiles == 8) TileBody<T, Decoder, 8>(block, a);
    });
    if (a.splits > 1) {
      memory.CheckComplete();
      Memory sums;
      Declare(&sums, a, 2);
      sums.Input(a.partial, int64_t{a.splits} * a.m * a.n * 4);
      DeclareResult(&sums, a, 2);
      RunGrid(&sums, static_cast<int>(CeilDivide(int64_t{a.m} * a.n, kSumThreads)), 1, 1,
              kSumThreads, [&](HostBlock& block) { SumSplitsBody<T>(block, a, Decoder::kUnit); });
      sums.CheckComplete();
    }
  }
  memory.CheckComplete();
}

template <class T>
void RunKind(const QuantMatMulArgs& a, WeightKind kind, Route route, int row_tiles) {
  switch (kind) {
    case WeightKind::kAffine4:
      return RunDecoded<T, Affine4<T>>(a, route, row_tiles);
    case WeightKind::kAffine8:
      return RunDecoded<T, Affine8<T>>(a, route, row_tiles);
    case WeightKind::kE2M1:
      return RunDecoded<T, FloatE2M1<T>>(a, route, row_tiles);
    case WeightKind::kE4M3:
      return RunDecoded<T, FloatE4M3<T>>(a, route, row_tiles);
    case WeightKind::kAny:
      break;
  }
  throw std::runtime_error("no decoder");
}

template <class T>
void RunAny(const QuantMatMulArgs& a) {
  Memory memory;
  Declare(&memory, a, static_cast<int>(sizeof(typename T::Bits)));
  DeclareResult(&memory, a, static_cast<int>(sizeof(typename T::Bits)));
  RunGrid(&memory, static_cast<int>(CeilDivide(a.n, kPanel)),
          static_cast<int>(CeilDivide(a.m, kAnyRows)), 1, kAnyThreads,
          [&](HostBlock& block) { AnyBody<T>(block, a); });
  memory.CheckComplete();
}

template <class T>
void RunExpand(const QuantMatMulArgs& a, uint16_t* out) {
  Memory memory;
  Declare(&memory, a, 2);
  memory.Output(out, int64_t{a.n} * a.k * 2);
  RunGrid(&memory, static_cast<int>(CeilDivide(a.n, kPanel)), ExpandPieces(a), 1, kExpandThreads,
          [&](HostBlock& block) { ExpandBody<T>(block, a, out); });
  memory.CheckComplete();
}

template <class T, class Out>
void RunPerToken(const PerTokenArgs& a, int rows) {
  Memory memory;
  memory.Input(a.x, int64_t{rows} * a.k * static_cast<int>(sizeof(typename T::Bits)));
  memory.Output(a.q, int64_t{rows} * a.k * static_cast<int>(sizeof(typename Out::Bits)));
  memory.Output(a.scale, 4 * rows);
  if (a.outlier != nullptr) memory.Input(a.outlier, a.k);
  RunGrid(&memory, rows, 1, 1, kRowThreads,
          [&](HostBlock& block) { PerTokenBody<T, Out>(block, a); });
  memory.CheckComplete();
}

template <class T>
void RunHadamard(const HadamardArgs& a) {
  const int bytes = static_cast<int>(sizeof(typename T::Bits));
  const int pieces = static_cast<int>(CeilDivide(a.count, a.piece));
  Memory memory;
  memory.Input(a.x, a.count * bytes);
  memory.Input(a.core, 4 * a.core_order * a.core_order);
  memory.Output(a.y, a.scales == nullptr ? a.count * bytes : a.count);
  if (a.scales != nullptr) memory.Output(a.scales, 4 * pieces * CeilDivide(a.piece, a.group));
  RunGrid(&memory, pieces, 1, 1, HadamardThreads(a.piece),
          [&](HostBlock& block) { HadamardBody<T>(block, a); });
  memory.CheckComplete();
}

void RunExpandBytes(const QuantMatMulArgs& a, uint8_t* out) {
  Memory memory;
  Declare(&memory, a, 1);
  memory.Output(out, int64_t{a.n} * a.k);
  RunGrid(&memory, static_cast<int>(CeilDivide(a.n, kPanel)), ExpandPieces(a), 1, kExpandThreads,
          [&](HostBlock& block) { ExpandBytesBody(block, a, out); });
  memory.CheckComplete();
}

template <class T>
void RunScaleIntegers(const QuantMatMulArgs& a, const int32_t* products) {
  Memory memory;
  Declare(&memory, a, 1);
  memory.Input(products, int64_t{a.m} * a.n * 4);
  DeclareResult(&memory, a, static_cast<int>(sizeof(typename T::Bits)));
  RunGrid(&memory, static_cast<int>(CeilDivide(int64_t{a.m} * a.n, kScaleThreads)), 1, 1,
          kScaleThreads, [&](HostBlock& block) { ScaleIntegersBody<T>(block, a, products); });
  memory.CheckComplete();
}

template <class T>
void RunFindOutliers(const OutlierArgs& a) {
  Memory found;
  found.Input(a.x, int64_t{a.m} * a.k * static_cast<int>(sizeof(typename T::Bits)));
  found.Input(a.named, 8 * a.named_count);
  found.Output(a.found, int64_t{a.pieces} * a.k);
  RunGrid(&found, static_cast<int>(CeilDivide(a.k, kFindColumns)), a.pieces, 1, kFindThreads,
          [&](HostBlock& block) { FindOutliersBody<T>(block, a); });
  found.CheckComplete();
  Memory order;
  order.Input(a.found, int64_t{a.pieces} * a.k);
  order.Output(a.outlier, a.k);
  order.Output(a.columns, 4 * a.k);
  order.Output(a.count, 4);
  RunGrid(&order, 1, 1, 1, kOrderThreads, [&](HostBlock& block) { OrderColumnsBody(block, a); });
  order.CheckComplete();
}

template <class T>
void RunAddOutliers(const QuantMatMulArgs& a, const OutlierArgs& o) {
  const int bytes = static_cast<int>(sizeof(typename T::Bits));
  Memory memory;
  Declare(&memory, a, 1);
  memory.Input(o.x, int64_t{a.m} * a.k * bytes);
  memory.Input(a.sums, int64_t{a.m} * a.n * 4);
  memory.Input(o.columns, 4 * a.k);
  memory.Input(o.count, 4);
  memory.Output(a.y, int64_t{a.m} * a.n * bytes);
  RunGrid(&memory, static_cast<int>(CeilDivide(a.n, kPanel)),
          static_cast<int>(CeilDivide(a.m, kAddWarps * kAddRows)), 1, kAddThreads,
          [&](HostBlock& block) { AddOutliersBody<T>(block, a, o); });
  memory.CheckComplete();
}

// As LaunchQuantizeBlock of blocks.cu.
template <class T>
void RunQuantizeBlock(QuantizeBlockArgs a, float* factors) {
  const int64_t bytes = a.rows * a.k * static_cast<int64_t>(sizeof(typename T::Bits));
  const int rows = static_cast<int>(a.rows);
  if (a.format.scale == BlockScale::kE4M3 && a.format.factor == 0) {
    Memory memory;
    memory.Input(a.x, bytes);
    memory.Output(factors, 4 * a.rows);
    RunGrid(&memory, rows, 1, 1, kRowThreads,
            [&](HostBlock& block) { RowFactorBody<T>(block, a, factors); });
    memory.CheckComplete();
    a.factors = factors;
  }
  Memory memory;
  memory.Input(a.x, bytes);
  memory.Input(a.factors, 4 * a.rows);
  memory.Output(a.y, bytes);
  if (BlockLanes<T>(a) > 0) {
    const int pieces = static_cast<int>(CeilDivide(a.rows * a.k / kVector<T>, kBlockThreads));
    RunGrid(&memory, pieces, 1, 1, kBlockThreads,
            [&](HostBlock& block) { BlockVectorsBody<T>(block, a); });
  } else {
    const int groups = static_cast<int>(CeilDivide(a.rows * BlocksOfRow(a), kBlockWarps));
    RunGrid(&memory, groups, 1, 1, kBlockThreads,
            [&](HostBlock& block) { BlockWarpsBody<T>(block, a); });
  }
  memory.CheckComplete();
}

}  // namespace
}  // namespace onnxq::cuda

using namespace onnxq::cuda;

// type: 0 float32, 1 float16, 2 bfloat16. route and kind: of plan.h.
ONNXQ_EXPORT const char* emulate_quant_mat_mul(const QuantMatMulArgs* a, int type, int kind,
                                               int route, int row_tiles) {
  return Guard([&] {
    const auto path = static_cast<Route>(route);
    if (path == Route::kAny) {
      if (type == 0) return RunAny<Float>(*a);
      if (type == 1) return RunAny<Half>(*a);
      return RunAny<Bfloat>(*a);
    }
    const auto weights = static_cast<WeightKind>(kind);
    if (type == 1) return RunKind<Half>(*a, weights, path, row_tiles);
    return RunKind<Bfloat>(*a, weights, path, row_tiles);
  });
}

ONNXQ_EXPORT const char* emulate_expand(const QuantMatMulArgs* a, int type, uint16_t* out) {
  return Guard([&] {
    if (type == 1) return RunExpand<Half>(*a, out);
    return RunExpand<Bfloat>(*a, out);
  });
}

// out: 0 int8, 1 the same in the type of x; 2 codes of FP8.
ONNXQ_EXPORT const char* emulate_per_token(const PerTokenArgs* a, int rows, int type, int out) {
  return Guard([&] {
    ForType(type, [&](auto t) {
      using T = decltype(t);
      if (out == 0) return RunPerToken<T, Int8Out>(*a, rows);
      if (out == 1) return RunPerToken<T, IntegersOut<T>>(*a, rows);
      return RunPerToken<T, Float8Out>(*a, rows);
    });
  });
}

ONNXQ_EXPORT const char* emulate_hadamard(const HadamardArgs* a, int type) {
  return Guard([&] {
    if (type == 0) return RunHadamard<Float>(*a);
    if (type == 1) return RunHadamard<Half>(*a);
    return RunHadamard<Bfloat>(*a);
  });
}

ONNXQ_EXPORT const char* emulate_quantize_block(const QuantizeBlockArgs* a, int type,
                                                float* factors) {
  return Guard([&] { ForType(type, [&](auto t) { RunQuantizeBlock<decltype(t)>(*a, factors); }); });
}

ONNXQ_EXPORT const char* emulate_find_outliers(const OutlierArgs* a, int type) {
  return Guard([&] { ForType(type, [&](auto t) { RunFindOutliers<decltype(t)>(*a); }); });
}

ONNXQ_EXPORT const char* emulate_add_outliers(const QuantMatMulArgs* a, const OutlierArgs* o,
                                              int type) {
  return Guard([&] { ForType(type, [&](auto t) { RunAddOutliers<decltype(t)>(*a, *o); }); });
}

ONNXQ_EXPORT const char* emulate_expand_bytes(const QuantMatMulArgs* a, uint8_t* out) {
  return Guard([&] { RunExpandBytes(*a, out); });
}

ONNXQ_EXPORT const char* emulate_scale_integers(const QuantMatMulArgs* a, int type,
                                                const int32_t* products) {
  return Guard(
      [&] { ForType(type, [&](auto t) { RunScaleIntegers<decltype(t)>(*a, products); }); });
}

ONNXQ_EXPORT const char* emulate_gather(const GatherArgs* a, int type) {
  return Guard([&] {
    ForType(type, [&](auto t) {
      using Bits = typename decltype(t)::Bits;
      Memory memory;
      memory.Input(a->x, a->count * static_cast<int>(sizeof(Bits)));
      memory.Input(a->order, 4 * a->k);
      memory.Output(a->y, a->count * static_cast<int>(sizeof(Bits)));
      RunGrid(&memory, static_cast<int>(CeilDivide(a->count, kRearrangeThreads)), 1, 1,
              kRearrangeThreads, [&](HostBlock& block) { GatherBody<Bits>(block, *a); });
      memory.CheckComplete();
    });
  });
}

ONNXQ_EXPORT const char* emulate_widen(const WidenArgs* a) {
  return Guard([&] {
    Memory memory;
    memory.Input(a->q, a->count);
    memory.Output(a->y, 2 * a->count);
    RunGrid(&memory, static_cast<int>(CeilDivide(a->count, 4 * kRearrangeThreads)), 1, 1,
            kRearrangeThreads, [&](HostBlock& block) { WidenBody(block, *a); });
    memory.CheckComplete();
  });
}

// Begin and end of every part, in their order.
ONNXQ_EXPORT void dynamic_scratch(const QuantMatMulArgs* a, int route, int element_bytes,
                                  const Outliers* o, int64_t* at) {
  const DynamicScratch parts(*a, static_cast<Route>(route), element_bytes, *o);
  const int64_t all[] = {0,           parts.row_scale, parts.found,  parts.outlier, parts.columns,
                         parts.count, parts.sums,      parts.product};
  std::copy(std::begin(all), std::end(all), at);
}

ONNXQ_EXPORT int outlier_pieces(int m, float threshold) { return OutlierPieces(m, threshold); }

ONNXQ_EXPORT int has_int8_levels(const float* levels, int bits) {
  return HasInt8Levels(levels, bits) ? 1 : 0;
}

ONNXQ_EXPORT int hadamard_piece(int block) { return HadamardPiece(block); }

struct PlanResult {
  int route, row_tiles, splits;
  int64_t shared_bytes, scratch_bytes;
};

ONNXQ_EXPORT void plan_quant_mat_mul(const QuantMatMulArgs* a, int kind, int element_bytes,
                                     int multiprocessors, int matrix_library, int operands,
                                     PlanResult* out) {
  const Plan plan =
      PlanQuantMatMul(*a, static_cast<WeightKind>(kind), element_bytes, multiprocessors,
                      matrix_library != 0, static_cast<Operands>(operands));
  *out = {static_cast<int>(plan.route), plan.row_tiles, plan.splits, plan.shared_bytes,
          plan.scratch_bytes};
}

ONNXQ_EXPORT int classify_levels(const float* levels, int bits, int zero_points, int nan_codes,
                                 int* offset, float* unit) {
  const WeightFormat format = ClassifyLevels(levels, bits, zero_points != 0, nan_codes != 0);
  *offset = format.offset;
  *unit = format.unit;
  return static_cast<int>(format.kind);
}

// A word of codes through a decoder: pairs[4] (4 bits) or pairs[2] as raw 16-bit floats.
template <class T>
static void DecodeWord(WeightKind kind, uint32_t word, float z, uint32_t* pairs) {
  const auto run = [&](auto decoder) {
    using Decoder = decltype(decoder);
    const uint32_t columns[2] = {Decoder::Column(z, 0), Decoder::Column(z, 1)};
    Decoder::Decode(word, columns, pairs);
  };
  if (kind == WeightKind::kAffine4) run(Affine4<T>());
  if (kind == WeightKind::kAffine8) run(Affine8<T>());
  if (kind == WeightKind::kE2M1) run(FloatE2M1<T>());
  if (kind == WeightKind::kE4M3) run(FloatE4M3<T>());
}

ONNXQ_EXPORT void decode_word(int type, int kind, uint32_t word, float z, uint32_t* pairs) {
  if (type == 1) DecodeWord<Half>(static_cast<WeightKind>(kind), word, z, pairs);
  if (type == 2) DecodeWord<Bfloat>(static_cast<WeightKind>(kind), word, z, pairs);
}

// The launches that dynamic.cc makes, on memory of the CPU: the order of its kernels and the places
// in its scratch memory are tested with these.
extern "C" {

// One multiprocessor and cuBLASLt, so that every route is reached by M.
int onnxq_cuda_plan(const QuantMatMulArgs* args, int kind, int element, int operands, Plan* plan) {
  *plan = PlanQuantMatMul(*args, static_cast<WeightKind>(kind), element == 0 ? 4 : 2, 1, true,
                          static_cast<Operands>(operands));
  return 0;
}

int onnxq_cuda_find_outliers(const OutlierArgs* args, int element, OnnxqStream) {
  ForType(element, [&](auto t) { RunFindOutliers<decltype(t)>(*args); });
  return 0;
}

int onnxq_cuda_add_outliers(const QuantMatMulArgs* args, const OutlierArgs* outliers, int element,
                            OnnxqStream) {
  ForType(element, [&](auto t) { RunAddOutliers<decltype(t)>(*args, *outliers); });
  return 0;
}

int onnxq_cuda_per_token(const PerTokenArgs* args, int rows, int element, int activations,
                         int floats, OnnxqStream) {
  if (emulate_per_token(args, rows, element, 2 * activations + floats) != nullptr) return 1;
  return 0;
}

// cuBLASLt's part is a plain loop.
int onnxq_cuda_quant_mat_mul(const QuantMatMulArgs* args, int kind, int element, float unit,
                             const Plan* plan, void* scratch, OnnxqStream) {
  QuantMatMulArgs a = *args;
  a.splits = plan->splits;
  a.partial = plan->splits > 1 ? static_cast<float*>(scratch) : nullptr;
  if (plan->route != Route::kInteger) {
    if (plan->route != Route::kAny) a.factor *= unit;
    const char* const broken =
        emulate_quant_mat_mul(&a, element, kind, static_cast<int>(plan->route), plan->row_tiles);
    return broken == nullptr ? 0 : 1;
  }
  const ByteScratch parts(a);
  auto* const base = static_cast<char*>(scratch);
  const auto* const x = static_cast<const uint8_t*>(a.x);
  const auto* const w = reinterpret_cast<const uint8_t*>(base);
  RunExpandBytes(a, reinterpret_cast<uint8_t*>(base));
  auto* const products = reinterpret_cast<int32_t*>(base + parts.products);
  for (int64_t i = 0; i < int64_t{a.m} * a.n; ++i) {
    const uint8_t* const row = x + i / a.n * a.k;
    const uint8_t* const column = w + i % a.n * a.k;
    int32_t sum = 0;
    for (int k = 0; k < a.k; ++k) {
      sum += static_cast<int8_t>(row[k]) * static_cast<int8_t>(column[k]);
    }
    products[i] = sum;
  }
  ForType(element, [&](auto t) { RunScaleIntegers<decltype(t)>(a, products); });
  return 0;
}
}

// Of the structs that Python mirrors, in the order of the test.
ONNXQ_EXPORT int struct_bytes(int which) {
  const size_t sizes[] = {
      sizeof(QuantMatMulArgs),  sizeof(PerTokenArgs),      sizeof(HadamardArgs), sizeof(Plan),
      sizeof(MatrixProduct),    sizeof(QuantizeBlockArgs), sizeof(OutlierArgs),  sizeof(Outliers),
      sizeof(Float8GroupsArgs), sizeof(Float8ProductArgs), sizeof(GatherArgs),   sizeof(WidenArgs)};
  return static_cast<int>(sizes[which]);
}
