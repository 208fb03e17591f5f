// The row kernels of the integer-only operators, for scalar.
#include "integer_loops_generic.h"

namespace onnxq {

const IntegerKernels kIntegerScalar = kGenericLoops;

}  // namespace onnxq
