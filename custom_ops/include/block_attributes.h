// The attributes of QuantizeBlock, read and checked.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "block_format.h"
#include "op_kernel.h"

namespace onnxq {

inline ort::OrtStatus* ReadBlockFormat(const Api& api, const ort::OrtKernelInfo* info,
                                       int64_t* block, BlockFormat* format) {
  int64_t mantissa = 0;
  int64_t min_exponent = 0;
  int64_t scale = 0;
  const std::pair<const char*, int64_t*> integers[] = {{"block", block},
                                                       {"mantissa", &mantissa},
                                                       {"min_exponent", &min_exponent},
                                                       {"scale", &scale}};
  for (const auto& [name, value] : integers) {
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_int64(info, name, value));
  }
  const std::pair<const char*, float*> floats[] = {{"lowest", &format->lowest},
                                                   {"largest", &format->largest},
                                                   {"factor", &format->factor},
                                                   {"clip", &format->clip}};
  for (const auto& [name, value] : floats) {
    ONNXQ_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, name, value));
  }
  const auto refuse = [&](const std::string& cause) { return Error(api, "QuantizeBlock", cause); };
  if (*block < 0) return refuse("block = " + std::to_string(*block) + " is below 0");
  if (mantissa < 0 || mantissa > 15)
    return refuse("mantissa = " + std::to_string(mantissa) + " is not in 0 to 15");
  if (min_exponent < -30 || min_exponent > 15)
    return refuse("min_exponent = " + std::to_string(min_exponent) + " is not in -30 to 15");
  if (scale < 0 || scale > 3) return refuse("scale = " + std::to_string(scale) + " is not 0 to 3");
  if (!(format->largest > 0 && format->largest <= 65536))
    return refuse("largest is not in (0, 65536]");
  if (!(-format->lowest > 0 && -format->lowest <= 65536))
    return refuse("lowest is not in [-65536, 0)");
  if (!(format->factor >= 0 && std::isfinite(format->factor)))
    return refuse("factor is negative or not finite");
  if (!(format->clip > 0 && format->clip <= 1)) return refuse("clip is not in (0, 1]");
  format->mantissa = static_cast<int32_t>(mantissa);
  format->min_exponent = static_cast<int32_t>(min_exponent);
  format->scale = static_cast<BlockScale>(scale);
  return nullptr;
}

}  // namespace onnxq
