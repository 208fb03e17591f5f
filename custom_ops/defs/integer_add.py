"""The sum of two integer tensors of different scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import POWERS, rescale, wrap32
from onnxq.custom_ops.integer_schema import FACTOR_INPUTS, LIMITS
from onnxq.custom_ops.registry import DOMAIN, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
Adds two tensors of different scales: each is brought to the scale of the sum, then they are
added.

```
y = clip(round((a + bias) · multiplier / 2^shift) + round(b · b_multiplier / 2^b_shift), low, high)
```

`a: [..., N]` i32 or i16; `bias`, `multiplier`, `shift`: `[N]` or `[1]` i32; `b: [..., N]` i16,
`b_multiplier`, `b_shift`: `[1]` i32; `y` i16 of the shape of a. `b` may lack leading axes of `a`,
or have extent 1 there: its rows are repeated.

- Rounding is half up. `a + bias` is taken modulo 2^32; each addend is kept within ±2^30.
- Errors: as of Requantize; `b` has another last extent than a, or cannot be repeated over a.
"""

REACH = 1 << 30
"""Each addend is kept within: a sum of two has 32 bits."""

_INT16 = onnx.TensorProto.INT16
_INT32 = onnx.TensorProto.INT32
_INT64 = onnx.TensorProto.INT64


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    table = onnx.numpy_helper.from_array(POWERS, "powers")

    @script(domain, default_opset=op)
    def IntegerAdd(a, bias, multiplier, shift, b, b_multiplier, b_shift, low: int, high: int):
        powers = op.Constant(value=table)
        two = op.Constant(value_int=2)
        total = op.Cast(op.Add(op.Cast(a, to=_INT32), bias), to=_INT64)
        power = op.Gather(powers, shift)
        raised = op.Add(op.Mul(total, op.Cast(multiplier, to=_INT64)), op.Div(power, two))
        left = op.Div(op.Sub(raised, op.Mod(raised, power)), power)
        b_power = op.Gather(powers, b_shift)
        product = op.Mul(op.Cast(b, to=_INT64), op.Cast(b_multiplier, to=_INT64))
        b_raised = op.Add(product, op.Div(b_power, two))
        right = op.Div(op.Sub(b_raised, op.Mod(b_raised, b_power)), b_power)
        reach = op.Constant(value_int=1073741824)
        least_term = op.Neg(reach)
        left_capped = op.Where(op.Greater(left, reach), reach, left)
        left_kept = op.Where(op.Less(left_capped, least_term), least_term, left_capped)
        right_capped = op.Where(op.Greater(right, reach), reach, right)
        right_kept = op.Where(op.Less(right_capped, least_term), least_term, right_capped)
        total16 = op.Add(left_kept, right_kept)
        least = op.Constant(value_int=low)
        most = op.Constant(value_int=high)
        capped = op.Where(op.Greater(total16, most), most, total16)
        clipped = op.Where(op.Less(capped, least), least, capped)
        y = op.Cast(clipped, to=_INT16)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerAdd.to_function_proto()
    return proto


def reference(
    a: Array,
    bias: Array,
    multiplier: Array,
    shift: Array,
    b: Array,
    b_multiplier: Array,
    b_shift: Array,
    *,
    low: int,
    high: int,
) -> tuple[Array]:
    """See the operator's documentation."""
    left = rescale(wrap32(a.astype(np.int64) + bias), multiplier, shift)
    right = rescale(b, b_multiplier, b_shift)
    left, right = np.clip(left, -REACH, REACH), np.clip(right, -REACH, REACH)
    return (np.clip(left + right, low, high).astype(np.int16),)


OPERATOR = Operator(
    name="IntegerAdd",
    doc=_DOC,
    inputs={
        "a": "`[..., N]` i32 or i16",
        **FACTOR_INPUTS,
        "b": "`[..., N]` i16",
        "b_multiplier": "`[1]` i32",
        "b_shift": "`[1]` i32, 1 to 62",
    },
    outputs={"y": "`[..., N]` i16"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=LIMITS,
    typed_by="b",
)
