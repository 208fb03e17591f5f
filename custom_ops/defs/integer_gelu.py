"""GELU on the accumulator of a linear layer, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import columns16, erf, requantized
from onnxq.custom_ops.integer_schema import ERF, LINEAR_INPUTS, OUTPUT_FACTOR
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
    none = onnx.numpy_helper.from_array(np.zeros(1, np.int32), "none")
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

    proto: onnx.FunctionProto = IntegerGelu.to_function_proto()
    return proto


def reference(
    x: Array, bias: Array, multiplier: Array, shift: Array, zero_point: Array, **attributes: int
) -> tuple[Array]:
    """See the operator's documentation."""
    wide = columns16(x, bias, multiplier, shift)
    product = wide * (erf(wide, attributes) + attributes["one"])
    return (requantized(product, zero_point, attributes),)


OPERATOR = Operator(
    name="IntegerGelu",
    doc=_DOC,
    inputs=LINEAR_INPUTS,
    outputs={"y": "`[..., N]`, the type of zero_point"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=(*ERF, Attribute("one", "INT", "1 in steps of erf"), *OUTPUT_FACTOR),
    typed_by="zero_point",
)
