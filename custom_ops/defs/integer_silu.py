"""SiLU on the accumulator of a linear layer, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import columns16, exponential, requantized
from onnxq.custom_ops.integer_schema import LINEAR_INPUTS, OUTPUT_FACTOR
from onnxq.custom_ops.integer_schema import exponential as exp_attributes
from onnxq.custom_ops.registry import DOMAIN, Operator
from onnxq.solvers.integer_only import EXP_ONE

Array = np.ndarray[Any, Any]

_DOC = """\
SiLU, v · sigmoid(v), on the accumulator of a linear layer, by the exponential of IntegerExp.

```
t = Requantize(x, bias, multiplier, shift) within ±32767;   e = IntegerExp(-|t|)
g = ⌊32767 · 2^15 / (32767 + e)⌋;   g = 2^15 - g where t < 0        (sigmoid in steps of 2^-15)
y = clip(zero_point + round(t · g · out_multiplier / 2^out_shift), low, high)
```

`x: [..., N]` i32 or i16; `bias`, `multiplier`, `shift`: `[N]` or `[1]` i32; `zero_point: []` i8,
u8 or i16, whose type is that of `y: [..., N]`.

Before rounding to 8 bits the error is at most 8e-4 with I-BERT's polynomial, 1.5e-4 with degree 3
or 4, and 0.65 steps of t.

- Rounding is half up, but that of g, which is down.
- Errors: as of Requantize and IntegerExp.
"""

_INT32 = onnx.TensorProto.INT32
_INT64 = onnx.TensorProto.INT64


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    none = onnx.numpy_helper.from_array(np.zeros(1, np.int32), "none")
    zero16 = onnx.numpy_helper.from_array(np.array(0, np.int16), "zero")

    @script(domain, default_opset=op)
    def IntegerSilu(
        x,
        bias,
        multiplier,
        shift,
        zero_point,
        ln2: int,
        p4: int,
        p3: int,
        p2: int,
        p1: int,
        p0: int,
        s3: int,
        s2: int,
        s1: int,
        s0: int,
        exp_multiplier: int,
        exp_shift: int,
        out_multiplier: int,
        out_shift: int,
        low: int,
        high: int,
    ):
        wide = op.Cast(
            domain.Requantize(
                x, bias, multiplier, shift, op.Constant(value=zero16), low=-32767, high=32767
            ),
            to=_INT64,
        )
        e32 = domain.IntegerExp(
            op.Cast(op.Neg(op.Abs(wide)), to=_INT32),
            ln2=ln2,
            p4=p4,
            p3=p3,
            p2=p2,
            p1=p1,
            p0=p0,
            s3=s3,
            s2=s2,
            s1=s1,
            s0=s0,
            multiplier=exp_multiplier,
            shift=exp_shift,
        )
        total = op.Add(op.Cast(e32, to=_INT64), op.Constant(value_int=32767))
        upper = op.Div(op.Constant(value_int=1073709056), total)
        lower = op.Sub(op.Constant(value_int=32768), upper)
        gate = op.Where(op.Less(wide, op.Constant(value_int=0)), lower, upper)
        product = op.Mul(wide, gate)
        one_number = op.Constant(value_ints=[1])
        y = domain.Requantize(
            op.Cast(product, to=_INT32),
            op.Constant(value=none),
            op.Cast(op.Reshape(op.Constant(value_int=out_multiplier), one_number), to=_INT32),
            op.Cast(op.Reshape(op.Constant(value_int=out_shift), one_number), to=_INT32),
            zero_point,
            low=low,
            high=high,
        )
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerSilu.to_function_proto()
    return proto


def reference(
    x: Array, bias: Array, multiplier: Array, shift: Array, zero_point: Array, **attributes: int
) -> tuple[Array]:
    """See the operator's documentation."""
    wide = columns16(x, bias, multiplier, shift)
    exp = {"multiplier": attributes["exp_multiplier"], "shift": attributes["exp_shift"]}
    gate = (EXP_ONE << 15) // (EXP_ONE + exponential(-np.abs(wide), {**attributes, **exp}))
    gate = np.where(wide < 0, (1 << 15) - gate, gate)
    return (requantized(wide * gate, zero_point, attributes),)


OPERATOR = Operator(
    name="IntegerSilu",
    doc=_DOC,
    inputs=LINEAR_INPUTS,
    outputs={"y": "`[..., N]`, the type of zero_point"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=(*exp_attributes("exp_"), *OUTPUT_FACTOR),
    typed_by="zero_point",
)
