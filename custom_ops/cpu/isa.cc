#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace onnxq {

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512bw:
      return "avx512bw";
    case Isa::kAvx512vnni:
      return "avx512vnni";
  }
  return "unknown";
}

bool IsaSupported(Isa isa) {
#if defined(__x86_64__)
  // The builtin also asks the operating system (XGETBV) whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512bw = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512bw:
      return avx512bw;
    case Isa::kAvx512vnni:
      return avx512bw && __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == Isa::kScalar;
#endif
}

bool SelectIsa(Isa* isa, std::string* error) {
  const char* forced = std::getenv("ONNXQ_ISA");
  const bool free_choice = forced == nullptr || *forced == '\0';
  std::string known;
  for (int level = kIsaCount - 1; level >= 0; --level) {
    const Isa candidate = static_cast<Isa>(level);
    const char* name = IsaName(candidate);
    if (free_choice ? IsaSupported(candidate) : std::strcmp(forced, name) == 0) {
      if (!IsaSupported(candidate)) {
        *error = std::string("ONNXQ_ISA=") + name + ": this CPU lacks these instructions";
        return false;
      }
      *isa = candidate;
      return true;
    }
    known = std::string(name) + (known.empty() ? "" : ", ") + known;
  }
  *error = std::string("ONNXQ_ISA=") + forced + ": no such level; known levels: " + known;
  return false;
}

}  // namespace onnxq
