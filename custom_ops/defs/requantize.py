"""From one integer scale to another: a sum with a bias, times a dyadic factor a column."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import POWERS, rescale, wrap32
from onnxq.custom_ops.integer_schema import LIMITS, LINEAR_INPUTS
from onnxq.custom_ops.registry import DOMAIN, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
Brings integers from one scale to another: `q ~ x / S` to `q' ~ x / S'` with `S / S'` as a dyadic
number, 31-bit mantissa over a power of two, for each column or for all.

```
y = clip(zero_point + round((x + bias) · multiplier / 2^shift), low, high)
```

`x: [..., N]` i32 or i16; `bias`, `multiplier`, `shift`: `[N]` or `[1]` i32; `zero_point: []` i8,
u8 or i16, whose type is that of `y: [..., N]`.

- Rounding is half up, to the larger neighbour: round(2.5) = 3, round(-2.5) = -2. I-BERT's code
  rounds ties to even; all else is equal.
- `x + bias` is taken modulo 2^32; a graph that passes `onnxq inspect --integer-only` never wraps.
- Errors: `bias`, `multiplier` or `shift` has neither 1 nor N elements; a shift is not from 1 to
  62; `low` or `high` does not fit into y.
"""

_INT32 = onnx.TensorProto.INT32
_INT64 = onnx.TensorProto.INT64


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    table = onnx.numpy_helper.from_array(POWERS, "powers")

    @script(domain, default_opset=op)
    def Requantize(x, bias, multiplier, shift, zero_point, low: int, high: int):
        total = op.Cast(op.Add(op.Cast(x, to=_INT32), bias), to=_INT64)
        power = op.Gather(op.Constant(value=table), shift)
        half = op.Div(power, op.Constant(value_int=2))
        raised = op.Add(op.Mul(total, op.Cast(multiplier, to=_INT64)), half)
        # Exact division: Div truncates in one runtime and rounds down in another.
        rounded = op.Div(op.Sub(raised, op.Mod(raised, power)), power)
        moved = op.Add(rounded, op.Cast(zero_point, to=_INT64))
        least = op.Constant(value_int=low)
        most = op.Constant(value_int=high)
        capped = op.Where(op.Greater(moved, most), most, moved)
        clipped = op.Where(op.Less(capped, least), least, capped)
        y = op.CastLike(clipped, zero_point)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = Requantize.to_function_proto()
    return proto


def reference(
    x: Array,
    bias: Array,
    multiplier: Array,
    shift: Array,
    zero_point: Array,
    *,
    low: int,
    high: int,
) -> tuple[Array]:
    """See the operator's documentation."""
    total = wrap32(x.astype(np.int64) + bias)
    moved = rescale(total, multiplier, shift) + int(zero_point)
    return (np.clip(moved, low, high).astype(zero_point.dtype),)


OPERATOR = Operator(
    name="Requantize",
    doc=_DOC,
    inputs=LINEAR_INPUTS,
    outputs={"y": "`[..., N]`, the type of zero_point"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=LIMITS,
    typed_by="zero_point",
)
