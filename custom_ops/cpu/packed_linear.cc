// Attributes and constants of QuantMatMul and its kin: checks, choice of kernel, threads.
#include "packed_linear.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "dynamic_quantize_per_token.h"
#include "quant_mat_mul_numbers.h"

namespace onnxq {
namespace {

constexpr int64_t kLayout = 1;
constexpr int64_t kMinGroup = 16;
constexpr int64_t kMaxExtent = int64_t{1} << 30;  // no product of extents overflows
constexpr int64_t kMaxIntegerGroup = 65536;       // 127 * 255 * 65536 < 2^31

constexpr std::array<const char*, 5> kConstantNames = {"codes", "scales", "zero_points", "levels",
                                                       "bias"};

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

const QuantMatMulKernels* KernelsFor(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512vnni:
      return &kQuantMatMulAvx512vnni;
    case Isa::kAvx512bw:  // without VNNI the wider registers gain nothing that is worth a file
    case Isa::kAvx2:
      return &kQuantMatMulAvx2;
#endif
    default:
      return &kQuantMatMulScalar;
  }
}

// The kind of codes of so many bits, levels from a table.
bool KindOf(int64_t bits, LevelKind* kind) {
  for (const LevelKind table : {LevelKind::kTable2, LevelKind::kTable4, LevelKind::kTable8,
                                LevelKind::kTable16, LevelKind::kTable64, LevelKind::kTable256}) {
    *kind = table;
    if (CodeBits(table) == bits) return true;
  }
  return false;
}

ort::OrtStatus* ReadAttributes(const Api& api, const ort::OrtKernelInfo* info, const char* name,
                               QuantMatMulAttributes* a) {
  int64_t int8_activations = 0;
  int64_t exponent_scales = 0;
  const std::pair<const char*, int64_t*> integers[] = {{"K", &a->k},
                                                       {"N", &a->n},
                                                       {"group", &a->group},
                                                       {"bits", &a->bits},
                                                       {"layout", &a->layout},
                                                       {"int8_activations", &int8_activations},
                                                       {"exponent_scales", &exponent_scales}};
  for (const auto& [key, value] : integers) {
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, key, value));
  }
  ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "factor", &a->factor));
  if (int8_activations < 0 || int8_activations > 2)
    return Error(api, name,
                 "int8_activations = " + std::to_string(int8_activations) + " is not 0 to 2");
  a->activations = static_cast<Activations>(int8_activations);
  a->exponent_scales = exponent_scales != 0;
  LevelKind kind;
  const auto refuse = [&](const std::string& cause) { return Error(api, name, cause); };
  if (a->layout != kLayout)
    return refuse("weights in layout " + std::to_string(a->layout) +
                  "; this library reads layout " + std::to_string(kLayout));
  if (!KindOf(a->bits, &kind))
    return refuse("codes of " + std::to_string(a->bits) +
                  " bits; there are kernels for 1, 2, 3, 4, 6 and 8");
  if (a->k < 1 || a->n < 1 || a->k > kMaxExtent || a->n > kMaxExtent)
    return refuse("K and N must be from 1 to 2^30");
  if (a->group < kMinGroup && a->group < a->k)
    return refuse("groups of " + std::to_string(a->group) + "; the least is 16, or all of K");
  if (a->group % 4 != 0 && a->group < a->k) return refuse("the group is not a multiple of 4");
  if (a->integers() && std::min(a->group, a->k) > kMaxIntegerGroup)
    return refuse("groups above 65536 overflow integer sums");
  if (!std::isfinite(a->factor)) return refuse("the factor is not finite");
  a->group = std::min(a->group, a->k);
  return nullptr;
}

bool ScaleTypeOf(ElementType type, bool exponents, ScaleType* out) {
  switch (type) {
    case ElementType::kFloat32:
      *out = ScaleType::kFloat32;
      return !exponents;
    case ElementType::kFloat16:
      *out = ScaleType::kFloat16;
      return !exponents;
    case ElementType::kBfloat16:
      *out = ScaleType::kBfloat16;
      return !exponents;
    case ElementType::kFloat8e4m3fn:
      *out = ScaleType::kE4M3;
      return !exponents;
    case ElementType::kUint8:
      *out = ScaleType::kE8M0;
      return exponents;
    case ElementType::kInt16:
      *out = ScaleType::kInt16;
      return !exponents;
    default:
      return false;
  }
}

bool IsE4M3(const float* levels) {
  for (int i = 0; i < 256; ++i) {
    const float number = FromE4M3(static_cast<uint8_t>(i));
    if (levels[i] != number && !(std::isnan(levels[i]) && std::isnan(number))) return false;
  }
  return true;
}

// Sets kind, offset, bytes and top from the levels. False when activations are integers and the
// levels are not, or do not fit in a byte.
bool ClassifyLevels(const QuantMatMulAttributes& a, const float* levels, QuantWeights* w) {
  const int count = 1 << a.bits;
  w->levels = levels;
  KindOf(a.bits, &w->kind);
  const float first = levels[0];
  bool affine = a.bits == 4 || a.bits == 8;
  affine = affine && std::nearbyint(first) == first && std::fabs(first) <= 512.0F;
  for (int i = 1; i < count && affine; ++i) affine = levels[i] == first + static_cast<float>(i);
  if (affine) {
    w->kind = a.bits == 4 ? LevelKind::kAffine4 : LevelKind::kAffine8;
    w->offset = static_cast<int32_t>(first);
    w->top = static_cast<uint8_t>(count - 1);
    return true;
  }
  if (!a.integers()) return true;
  if (count > kMaxByteLevels) return false;
  const auto [least, most] = std::minmax_element(levels, levels + count);
  if (!(std::fabs(*least) <= 512.0F && *most - *least <= 255.0F)) return false;
  w->offset = static_cast<int32_t>(*least);
  w->top = static_cast<uint8_t>(*most - *least);
  for (int i = 0; i < count; ++i) {
    if (std::nearbyint(levels[i]) != levels[i]) return false;
    w->bytes[i] = static_cast<uint8_t>(levels[i] - *least);
  }
  return true;
}

// Whether sums over the groups with integer scales stay within 32 bits, whatever codes and
// activations are: sum over g of |scale| * 127 * K of the group * max |level - zero|.
ort::OrtStatus* CheckIntegerSums(const Api& api, const char* name, const QuantWeights& w) {
  const auto* scales = static_cast<const int16_t*>(w.scales);
  for (int64_t c = 0; c < w.n; ++c) {
    int64_t sum = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t at = (c / kPanel * w.groups + g) * kPanel + c % kPanel;
      const int64_t least = w.offset - (w.zero_points == nullptr ? 0 : w.zero_points[at]);
      const int64_t reach = std::max(std::abs(least), std::abs(least + w.top));
      const int64_t first = 4 * g * w.group_steps;
      const int64_t count = std::min(w.k - first, 4 * w.group_steps);
      sum += std::abs(int64_t{scales[at]}) * INT8_MAX * count * reach;
      if (sum > INT32_MAX)
        return Error(
            api, name,
            "integer scales of column " + std::to_string(c) + " may overflow the sums of 32 bits");
    }
  }
  return nullptr;
}

// Checks the constant inputs (codes to bias) and sets what the kernels need to know of them.
ort::OrtStatus* Prepare(const Api& api, const char* name, const QuantMatMulAttributes& a,
                        const std::array<InputTensor, 5>& inputs, QuantWeights* w,
                        QuantBias* bias) {
  const int64_t panels = CeilDivide(a.n, kPanel);
  w->k = a.k;
  w->n = a.n;
  w->factor = a.factor;
  w->steps = CeilDivide(a.k, 4);
  w->groups = CeilDivide(a.k, a.group);
  w->group_steps = w->groups == 1 ? w->steps : a.group / 4;

  const std::vector<int64_t> groups = {panels, w->groups, kPanel};
  const std::vector<int64_t> expected[] = {
      {panels, w->steps, 16 * a.bits}, groups, groups, {int64_t{1} << a.bits}, {a.n}};
  const std::vector<int64_t> none[] = {{}, {}, {1, 1, 1}, {}, {1}};
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool optional = !none[i].empty();
    if (inputs[i].shape == expected[i] || (optional && inputs[i].shape == none[i])) continue;
    return Error(api, name,
                 std::string(kConstantNames[i]) + " has shape " + Text(inputs[i].shape) + ", not " +
                     Text(expected[i]) + (optional ? " or " + Text(none[i]) : ""));
  }
  const auto& [codes, scales, zeros, levels, biases] = inputs;
  if (!ScaleTypeOf(scales.type, a.exponent_scales, &w->scale_type))
    return Error(api, name,
                 "scales of element type " + std::to_string(static_cast<int>(scales.type)) +
                     (a.exponent_scales ? " as exponents" : ""));
  w->codes = static_cast<const uint8_t*>(codes.data);
  w->code_count = panels * w->steps * 16 * a.bits;
  w->scales = scales.data;
  w->zero_points = static_cast<const int8_t*>(zeros.data);
  if (zeros.shape != expected[2]) {
    if (*w->zero_points != 0) return Error(api, name, "a zero point for all must be 0");
    w->zero_points = nullptr;
  }
  if (!ClassifyLevels(a, static_cast<const float*>(levels.data), w))
    return Error(api, name, "with integer activations levels must be integers 255 apart at most");
  if (w->integer_scales()) {
    if (!a.integers() || w->kind != LevelKind::kAffine4)
      return Error(api, name, "integer scales need integer activations and 4-bit levels one apart");
    if (a.activations == Activations::kInt8Groups)
      return Error(api, name, "integer scales need one scale a row of activations");
    ONNXQ_RETURN_IF_ERROR(CheckIntegerSums(api, name, *w));
  }
  *bias = {static_cast<const float*>(biases.data), biases.shape == expected[4] ? 1 : 0};
  return nullptr;
}

bool HasNanCodes(const QuantWeights& w) {
  int found = 0;
  for (int64_t i = 0; i < w.code_count; ++i) found |= (w.codes[i] & 0x7f) == 0x7f;
  return found != 0;
}

// Only where scales are constants of the model; later it would cost as much as the product.
ort::OrtStatus* CheckScales(const Api& api, const char* name, const QuantWeights& w) {
  const int64_t count = CeilDivide(w.n, kPanel) * w.groups * kPanel;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(ScaleAt(w.scale_type, w.scales, i)))
      return Error(api, name, "scale " + std::to_string(i) + " is NaN or infinite");
  }
  return nullptr;
}

}  // namespace

ort::OrtStatus* PackedLinear::Create(const Api& api, const ort::OrtKernelInfo* info,
                                     const char* name, size_t first_input) {
  name_ = name;
  first_input_ = first_input;
  Isa isa;
  std::string error;
  if (!SelectIsa(&isa, &error)) return Error(api, name, error);
  kernels_ = KernelsFor(isa);
  rows_ = PerTokenRowsFor(isa);
  ONNXQ_RETURN_IF_ERROR(ReadAttributes(api, info, name, &attributes_));
  ONNXQ_RETURN_IF_ERROR(GetAllocator(api, info, &allocator_));
  std::array<InputTensor, 5> constants;
  for (size_t i = 0; i < constants.size(); ++i) {
    bool found = false;
    ONNXQ_RETURN_IF_ERROR(GetConstantInput(api, info, first_input + i, &found, &constants[i]));
    if (!found) return nullptr;
  }
  ONNXQ_RETURN_IF_ERROR(Prepare(api, name, attributes_, constants, &weights_, &bias_));
  ONNXQ_RETURN_IF_ERROR(CheckScales(api, name, weights_));
  // The quick conversion of E4M3 knows no NaN, so it is for weights that were looked through.
  if (weights_.kind == LevelKind::kTable256 && IsE4M3(weights_.levels) && !HasNanCodes(weights_)) {
    weights_.kind = LevelKind::kE4M3;
  }
  prepared_ = true;
  return nullptr;
}

ort::OrtStatus* PackedLinear::InferShapes(const Api& api, ort::OrtShapeInferContext* context,
                                          ElementType type) {
  SymbolicShape shape;
  ONNXQ_RETURN_IF_ERROR(GetInputShape(api, context, 0, &shape));
  // Rank 0 also stands for "not known yet"; Compute refuses a true scalar.
  if (shape.dims.empty()) return nullptr;
  const ort::OrtOpAttr* attribute = nullptr;
  ONNXQ_RETURN_IF_ERROR(api.ShapeInferContext_GetAttribute(context, "N", &attribute));
  int64_t n = 0;
  size_t bytes = 0;
  ONNXQ_RETURN_IF_ERROR(api.ReadOpAttr(attribute, ort::AttributeType::kInt, &n, sizeof n, &bytes));
  shape.dims.back() = n;
  shape.names.back().clear();
  // Not the kernel's own type: ONNX Runtime asks one kernel of the operator for all of them.
  return SetOutputShape(api, context, 0, type == ElementType::kUndefined ? shape.type : type,
                        shape);
}

ort::OrtStatus* PackedLinear::Bind(const Api& api, const ort::OrtKernelContext* context,
                                   QuantWeights* weights, QuantBias* bias) const {
  *weights = weights_;
  *bias = bias_;
  if (prepared_) return nullptr;
  std::array<InputTensor, 5> inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    ONNXQ_RETURN_IF_ERROR(GetInput(api, context, first_input_ + i, &inputs[i]));
  }
  return Prepare(api, name_, attributes_, inputs, weights, bias);
}

}  // namespace onnxq
