"""GELU on the accumulator of a linear layer, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import POLYNOMIAL_ATTRIBUTES, POWERS, erf, rescale, wrap32
from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
GELU by the error function, after I-BERT (arXiv 2101.01321, section 3.3), on the accumulator of a
linear layer: its bias is added, its columns are brought to one scale of 16 bits, which is fine
enough for the polynomial (8 bits are not), and the result to 8 bits.

```
t = Requantize(x, bias, multiplier, shift) within ±32767;   g = t · (IntegerErf(t) + one)
y = clip(zero_point + round(g · out_multiplier / 2^out_shift), low, high)
```

`x: [..., N]` i32 or i16; `bias`, `multiplier`, `shift`: `[N]` or `[1]` i32; `zero_point: []` i8,
u8 or i16, whose type is that of `y: [..., N]`. GELU(v) = v/2 · (1 + erf(v/√2)): the attributes of
erf are those for inputs in steps of the scale of t over √2, and half the scale of erf goes into
out_multiplier.

Before rounding to 8 bits the error is at most 0.0185 with I-BERT's polynomial (2.5 steps of t where
that is more), and 0.0024 with degree 3 or 4 for steps up to 1e-3 (beyond, 1.5 steps more).

- Rounding is half up.
- Errors: as of Requantize and IntegerErf; |one| plus the largest |erf| reaches 2^16.
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
    def IntegerGelu(
        x,
        bias,
        multiplier,
        shift,
        zero_point,
        bound: int,
        p4: int,
        p3: int,
        p2: int,
        p1: int,
        p0: int,
        s3: int,
        s2: int,
        s1: int,
        s0: int,
        erf_shift: int,
        one: int,
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
        erf32 = domain.IntegerErf(
            op.Cast(wide, to=_INT32),
            bound=bound,
            p4=p4,
            p3=p3,
            p2=p2,
            p1=p1,
            p0=p0,
            s3=s3,
            s2=s2,
            s1=s1,
            s0=s0,
            erf_shift=erf_shift,
        )
        product = op.Mul(wide, op.Add(op.Cast(erf32, to=_INT64), op.Constant(value_int=one)))
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

    proto: onnx.FunctionProto = IntegerGelu.to_function_proto()
    return proto


def reference(
    x: Array, bias: Array, multiplier: Array, shift: Array, zero_point: Array, **attributes: int
) -> tuple[Array]:
    """See the operator's documentation."""
    total = wrap32(x.astype(np.int64) + bias)
    wide = np.clip(rescale(total, multiplier, shift), -32767, 32767)
    product = wide * (erf(wide, attributes) + attributes["one"])
    moved = rescale(product, attributes["out_multiplier"], attributes["out_shift"])
    clipped = np.clip(moved + int(zero_point), attributes["low"], attributes["high"])
    return (clipped.astype(zero_point.dtype),)


OPERATOR = Operator(
    name="IntegerGelu",
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
        Attribute("bound", "INT", "where erf reaches 1, in steps of t"),
        *POLYNOMIAL_ATTRIBUTES,
        Attribute("erf_shift", "INT", "of the value of the polynomial"),
        Attribute("one", "INT", "1 in steps of erf"),
        Attribute("out_multiplier", "INT", "of the product, any sign"),
        Attribute("out_shift", "INT", "of the product, 1 to 62"),
        Attribute("low", "INT", "least value of y"),
        Attribute("high", "INT", "largest value of y"),
    ),
    typed_by="zero_point",
)
