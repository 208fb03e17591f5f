// The row kernels of the integer-only operators, for avx512bw.
#include "integer_loops_generic.h"

namespace onnxq {

const IntegerKernels kIntegerAvx512bw = kGenericLoops;

}  // namespace onnxq
