"""SiLU on the accumulator of a linear layer, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import (
    POLYNOMIAL_ATTRIBUTES,
    POWERS,
    exponential,
    rescale,
    wrap32,
)
from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator
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
    table = onnx.numpy_helper.from_array(POWERS, "powers")
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
        powers = op.Constant(value=table)
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
        out_power = op.Gather(powers, op.Constant(value_int=out_shift))
        scaled = op.Mul(product, op.Constant(value_int=out_multiplier))
        raised = op.Add(scaled, op.Div(out_power, op.Constant(value_int=2)))
        rounded = op.Div(op.Sub(raised, op.Mod(raised, out_power)), out_power)
        moved = op.Add(rounded, op.Cast(zero_point, to=_INT64))
        least = op.Constant(value_int=low)
        most = op.Constant(value_int=high)
        capped = op.Where(op.Greater(moved, most), most, moved)
        clipped = op.Where(op.Less(capped, least), least, capped)
        y = op.CastLike(clipped, zero_point)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerSilu.to_function_proto()
    return proto


def reference(
    x: Array, bias: Array, multiplier: Array, shift: Array, zero_point: Array, **attributes: int
) -> tuple[Array]:
    """See the operator's documentation."""
    total = wrap32(x.astype(np.int64) + bias)
    wide = np.clip(rescale(total, multiplier, shift), -32767, 32767)
    exp = {"multiplier": attributes["exp_multiplier"], "shift": attributes["exp_shift"]}
    gate = (EXP_ONE << 15) // (EXP_ONE + exponential(-np.abs(wide), {**attributes, **exp}))
    gate = np.where(wide < 0, (1 << 15) - gate, gate)
    moved = rescale(wide * gate, attributes["out_multiplier"], attributes["out_shift"])
    clipped = np.clip(moved + int(zero_point), attributes["low"], attributes["high"])
    return (clipped.astype(zero_point.dtype),)


OPERATOR = Operator(
    name="IntegerSilu",
    doc=_DOC,
    inputs={
        "x": "`[..., N]` i32 or i16",
        "bias": "`[N]` or `[1]` i32",
        "multiplier": "`[N]` or `[1]` i32",
        "shift": "`[N]` or `[1]` i32, 1 to 62",
        "zero_point": "`[]` i8, u8 or i16",
    },
    outputs={"y": "`[..., N]`, the type of zero_point"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=(
        Attribute("ln2", "INT", "ln 2 in steps of t"),
        *POLYNOMIAL_ATTRIBUTES,
        Attribute("exp_multiplier", "INT", "of the value of the polynomial"),
        Attribute("exp_shift", "INT", "of the value of the polynomial"),
        Attribute("out_multiplier", "INT", "of the product, any sign"),
        Attribute("out_shift", "INT", "of the product, 1 to 62"),
        Attribute("low", "INT", "least value of y"),
        Attribute("high", "INT", "largest value of y"),
    ),
    typed_by="zero_point",
)
