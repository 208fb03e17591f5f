"""The integer square root, by Newton's method."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import POWERS, square_root
from onnxq.custom_ops.registry import DOMAIN, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
The largest integer whose square is at most x.

`x: [...]` i64, from 0 to 2^62 - 1 → `y: [...]` i64, `y² <= x < (y + 1)²`.

Newton's method from above, as in I-BERT: start at 2^⌈bits / 2⌉, then y ← ⌊(y + ⌊x / y⌋) / 2⌋
until it no longer falls; six steps are enough for 62 bits.

- Negative x gives 0.
"""

_INT64 = onnx.TensorProto.INT64


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    table = onnx.numpy_helper.from_array(POWERS, "powers")

    @script(domain, default_opset=op)
    def IntegerSqrt(x):
        zero = op.Constant(value_int=0)
        one = op.Constant(value_int=1)
        two = op.Constant(value_int=2)
        powers = op.Constant(value=table)
        n = op.Where(op.Less(x, zero), zero, x)
        # The position of the highest bit, by halving.
        bit = op.Mul(n, zero)
        bit_32 = op.Add(bit, op.Constant(value_int=32))
        bit = op.Where(op.Less(n, op.Gather(powers, bit_32)), bit, bit_32)
        bit_16 = op.Add(bit, op.Constant(value_int=16))
        bit = op.Where(op.Less(n, op.Gather(powers, bit_16)), bit, bit_16)
        bit_8 = op.Add(bit, op.Constant(value_int=8))
        bit = op.Where(op.Less(n, op.Gather(powers, bit_8)), bit, bit_8)
        bit_4 = op.Add(bit, op.Constant(value_int=4))
        bit = op.Where(op.Less(n, op.Gather(powers, bit_4)), bit, bit_4)
        bit_2 = op.Add(bit, op.Constant(value_int=2))
        bit = op.Where(op.Less(n, op.Gather(powers, bit_2)), bit, bit_2)
        bit_1 = op.Add(bit, op.Constant(value_int=1))
        bit = op.Where(op.Less(n, op.Gather(powers, bit_1)), bit, bit_1)
        root_0 = op.Gather(powers, op.Div(op.Add(bit, two), two))
        divisor_0 = op.Where(op.Equal(root_0, zero), one, root_0)
        next_0 = op.Div(op.Add(root_0, op.Div(n, divisor_0)), two)
        root_1 = op.Where(op.Less(next_0, root_0), next_0, root_0)
        divisor_1 = op.Where(op.Equal(root_1, zero), one, root_1)
        next_1 = op.Div(op.Add(root_1, op.Div(n, divisor_1)), two)
        root_2 = op.Where(op.Less(next_1, root_1), next_1, root_1)
        divisor_2 = op.Where(op.Equal(root_2, zero), one, root_2)
        next_2 = op.Div(op.Add(root_2, op.Div(n, divisor_2)), two)
        root_3 = op.Where(op.Less(next_2, root_2), next_2, root_2)
        divisor_3 = op.Where(op.Equal(root_3, zero), one, root_3)
        next_3 = op.Div(op.Add(root_3, op.Div(n, divisor_3)), two)
        root_4 = op.Where(op.Less(next_3, root_3), next_3, root_3)
        divisor_4 = op.Where(op.Equal(root_4, zero), one, root_4)
        next_4 = op.Div(op.Add(root_4, op.Div(n, divisor_4)), two)
        root_5 = op.Where(op.Less(next_4, root_4), next_4, root_4)
        divisor_5 = op.Where(op.Equal(root_5, zero), one, root_5)
        next_5 = op.Div(op.Add(root_5, op.Div(n, divisor_5)), two)
        y = op.Where(op.Less(next_5, root_5), next_5, root_5)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerSqrt.to_function_proto()
    return proto


def reference(x: Array) -> tuple[Array]:
    """See the operator's documentation."""
    return (square_root(np.maximum(x, 0)),)


OPERATOR = Operator(
    name="IntegerSqrt",
    doc=_DOC,
    inputs={"x": "`[...]` i64"},
    outputs={"y": "`[...]` i64"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
)
