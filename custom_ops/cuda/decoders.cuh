// f(T(), Decoder()) for what the tensor cores' kernels take.
#pragma once

#include "launch_support.cuh"

namespace onnxq::cuda {

template <class T, class F>
int ForDecoderOf(WeightKind kind, const F& f) {
  switch (kind) {
    case WeightKind::kAffine4:
      return f(T(), Affine4<T>());
    case WeightKind::kAffine8:
      return f(T(), Affine8<T>());
    case WeightKind::kE2M1:
      return f(T(), FloatE2M1<T>());
    case WeightKind::kE4M3:
      return f(T(), FloatE4M3<T>());
    case WeightKind::kAny:
      break;
  }
  return kErrorArguments;
}

template <class F>
int ForDecoder(int element, WeightKind kind, const F& f) {
  if (element == static_cast<int>(Element::kFloat16)) return ForDecoderOf<Half>(kind, f);
  if (element == static_cast<int>(Element::kBfloat16)) return ForDecoderOf<Bfloat>(kind, f);
  return kErrorArguments;
}

// f for all of them, until one does not return 0.
template <class F>
int ForEveryDecoder(const F& f) {
  for (const Element element : {Element::kFloat16, Element::kBfloat16}) {
    for (const WeightKind kind :
         {WeightKind::kAffine4, WeightKind::kAffine8, WeightKind::kE2M1, WeightKind::kE4M3}) {
      const int status = ForDecoder(static_cast<int>(element), kind, f);
      if (status != 0) return status;
    }
  }
  return 0;
}

}  // namespace onnxq::cuda
