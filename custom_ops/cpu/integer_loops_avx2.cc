// The row kernels of the integer-only operators, for avx2.
#include "integer_loops_generic.h"

namespace onnxq {

const IntegerKernels kIntegerAvx2 = kGenericLoops;

}  // namespace onnxq
