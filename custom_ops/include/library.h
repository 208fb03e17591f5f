// What every library of operators is to ONNX Runtime, to Python and to its siblings.
//
// ONNX Runtime takes a domain once a session, so all kernels that a session may use lie in one
// domain object: a library that completes another one asks it for its operators (onnxq_custom_ops)
// instead of being registered beside it.
#pragma once

#include <string>
#include <vector>

#include "op_kernel.h"

#define ONNXQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace onnxq {

// In the order of ops.def. Made at the first call and kept for the life of the process: sessions
// hold plain pointers to them.
using Operators = std::vector<const ort::OrtCustomOp*>;

// Slot 0, CreateStatus, is in every version of the table.
inline ort::OrtStatus* TooOld(const ort::OrtApiBase* base) {
  const std::string message = std::string("onnxq operators need ONNX Runtime 1.") +
                              std::to_string(ort::kApiVersion) + " or newer, this is " +
                              base->GetVersionString();
  const ort::OrtApi* oldest = base->GetApi(1);
  return ort::Api::Load(oldest).CreateStatus(ort::ErrorCode::kFail, message.c_str());
}

// The domain of this library, never freed: made with what `operators` gives for ONNX Runtime's
// table, and added to the session's options.
inline ort::OrtStatus* RegisterDomain(ort::OrtSessionOptions* options, const ort::OrtApiBase* base,
                                      Operators (*operators)(const ort::OrtApi*)) {
  const ort::OrtApi* table = base->GetApi(ort::kApiVersion);
  if (table == nullptr) return TooOld(base);
  const Api api = Api::Load(table);
  return Guard(api, "library", [&]() -> ort::OrtStatus* {
    static ort::OrtCustomOpDomain* domain = nullptr;
    static ort::OrtStatus* const built = [&]() -> ort::OrtStatus* {
      ONNXQ_RETURN_IF_ERROR(api.CreateCustomOpDomain("com.onnxq", &domain));
      for (const ort::OrtCustomOp* op : operators(table)) {
        ONNXQ_RETURN_IF_ERROR(api.CustomOpDomain_Add(domain, op));
      }
      return nullptr;
    }();
    if (built != nullptr) return Error(api, "library", "the operators could not be registered");
    return api.AddCustomOpDomain(options, domain);
  });
}

}  // namespace onnxq
