// What the files of emulated kernels share.
#pragma once

#include <exception>
#include <string>

#include "emulator.h"
#include "launch.h"

#define ONNXQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace onnxq::cuda {

// Null, or what broke.
template <class F>
const char* Guard(const F& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// f(T()) for the type of activations that has a number.
template <class F>
void ForType(int type, const F& f) {
  if (type == 0) return f(Float());
  if (type == 1) return f(Half());
  return f(Bfloat());
}

}  // namespace onnxq::cuda
