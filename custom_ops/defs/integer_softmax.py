"""Softmax over the last axis, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import exponential, wrap32
from onnxq.custom_ops.integer_schema import exponential as exp_attributes
from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
Softmax over the last axis after I-BERT (arXiv 2101.01321, section 3.4).

`x: [..., S]` i32 in steps of the exponential's input; `mask` i32, added to x, broadcastable to
it; `y: [..., S]` u8 in steps of 2^-bits:

```
d = x + mask;   e = IntegerExp(d - max(d));   f = ⌊2^32 / Σe⌋
y = min(⌊e · f / 2^(32 - bits)⌋, 2^bits - 1)                 rounding = 0, as I-BERT
y = min(⌊(⌊e · f / 2^(31 - bits)⌋ + 1) / 2⌋, 2^bits - 1)     rounding = 1: to nearest, halves up
```

`x + mask` is taken modulo 2^32; a masked position holds a number so low that its exponential is
0. I-BERT always rounds down, which loses up to S · 2^-bits of the row's sum.

With x in steps up to 1e-3 and 8 bits the error is at most 0.85 + S / 256 steps of 2^-8 to nearest,
1.35 + S / 256 down: exponentials have 15 bits, and S of them may round alike.

- A row whose positions are all masked alike is treated as if none were.
- Errors: rows without columns; the mask cannot be broadcast; `bits` is not from 1 to 8; exp(0) is
  2^14 or less; as of IntegerExp.
"""

_INT32 = onnx.TensorProto.INT32
_INT64 = onnx.TensorProto.INT64
_UINT64 = onnx.TensorProto.UINT64
_UINT8 = onnx.TensorProto.UINT8


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)

    @script(domain, default_opset=op)
    def IntegerSoftmax(
        x,
        mask,
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
        multiplier: int,
        shift: int,
        bits: int,
        rounding: int,
    ):
        d = op.Cast(op.Add(x, mask), to=_INT64)
        last = op.Constant(value_ints=[-1])
        below = op.Sub(d, op.ReduceMax(d, last, keepdims=1))
        # Far below 30 halvings: clipping to int32 changes nothing.
        lowest = op.Constant(value_int=-2147483648)
        kept = op.Where(op.Less(below, lowest), lowest, below)
        e32 = domain.IntegerExp(
            op.Cast(kept, to=_INT32),
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
            multiplier=multiplier,
            shift=shift,
        )
        e = op.Cast(e32, to=_INT64)
        f = op.Div(op.Constant(value_int=4294967296), op.ReduceSum(e, last, keepdims=1))
        one = op.Constant(value_int=1)
        two = op.Constant(value_int=2)
        one_unsigned = op.Cast(one, to=_UINT64)
        bits_unsigned = op.Cast(op.Constant(value_int=bits), to=_UINT64)
        levels = op.Cast(op.BitShift(one_unsigned, bits_unsigned, direction="LEFT"), to=_INT64)
        half_step = op.Div(op.Constant(value_int=2147483648), levels)
        halves = op.Div(op.Mul(e, f), half_step)
        rounded = op.Div(op.Add(halves, op.Constant(value_int=rounding)), two)
        y = op.Cast(op.Min(rounded, op.Sub(levels, one)), to=_UINT8)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerSoftmax.to_function_proto()
    return proto


def reference(x: Array, mask: Array, **attributes: int) -> tuple[Array]:
    """See the operator's documentation."""
    d = wrap32(x.astype(np.int64) + mask)
    e = exponential(d - d.max(axis=-1, keepdims=True, initial=-(1 << 31)), attributes)
    factor = (1 << 32) // e.sum(axis=-1, keepdims=True)
    bits = attributes["bits"]
    rounded = ((e * factor >> (31 - bits)) + attributes["rounding"]) >> 1
    return (np.minimum(rounded, (1 << bits) - 1).astype(np.uint8),)


OPERATOR = Operator(
    name="IntegerSoftmax",
    doc=_DOC,
    inputs={"x": "`[..., S]` i32", "mask": "i32, broadcastable to x"},
    outputs={"y": "`[..., S]` u8"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=(
        *exp_attributes(),
        Attribute("bits", "INT", "of the output, 1 to 8"),
        Attribute("rounding", "INT", "0 down, 1 to nearest"),
    ),
)
