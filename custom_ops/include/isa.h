// Which instruction set the kernels use: the best one of this CPU, or the one ONNXQ_ISA names.
#pragma once

#include <string>

namespace onnxq {

// In order of preference; each level's kernels may use everything the levels before it use.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512bw = 2, kAvx512vnni = 3 };
inline constexpr int kIsaCount = 4;

// "scalar", "avx2", "avx512bw", "avx512vnni".
const char* IsaName(Isa isa);

// Whether this CPU and its operating system can run the level's instructions.
bool IsaSupported(Isa isa);

// The level to use now. False, with a message in `error`, when ONNXQ_ISA names a level that does
// not exist or that this CPU lacks. Reads the environment at each call: kernels keep what they got
// when they were created, so sessions of different levels can live in one process.
bool SelectIsa(Isa* isa, std::string* error);

}  // namespace onnxq
