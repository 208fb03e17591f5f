"""Symmetric INT8 quantization of activations with one scale a token, found at run time.

The numbers are chosen so that the body, the numpy reference and every compiled kernel give the same
bits: float32 throughout, one rounding an operation, the reciprocal taken once a row.

The factor is 127 / amax and not 1 / scale: ONNX Runtime's optimizer rewrites x * (1 / s) to x / s,
which differs in the last bit and so in ties. (Seen on 1.31.1; the contract test holds it.)

Why no clamp is needed: with u = 2^-24 and |x| <= amax, x * (127 / amax) is at most 127 * (1 + u)^2
in magnitude after both roundings, which rounds to 127. Nothing under- or overflows, because
127 * 2^-126 <= amax < 2^128.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.registry import DOMAIN, Operator

_FLT_MAX = float(np.finfo(np.float32).max)
_Q_MAX = 127.0
# Its scale is 2^-126, the smallest normal float32.
_AMAX_MIN = _Q_MAX * float(np.finfo(np.float32).tiny)

_DOC = """\
Quantizes each token (row of the last axis) to signed INT8 with its own scale, symmetric about zero.

`x: [..., K]` f32 or f16 → `q: [..., K]` i8, `scale: [..., 1]` f32, with `x ≈ scale · q`:

```
amax  = max(127 · 2^-126, max |x| over the row)   in f32; so that scale > 0 for a row of zeros
scale = amax / 127
q     = round_half_even(x · (127 / amax))         -127 <= q <= 127
```

- |x - scale · q| <= 0.5001 · scale. The factor 127 / amax is rounded once a row, so a value within
  2^-16 steps of a tie may go the other way than `x / scale` would.
- An empty row (K = 0) has the scale of a row of zeros.
- A row that holds a NaN or an infinity gets `scale = NaN` and `q = 0`: dequantized it is all NaN,
  so the fault stays visible. Other rows are not touched by it.
- Errors: `x` is a scalar (rank 0).
"""


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)

    @script(domain, default_opset=op)
    def DynamicQuantizePerToken(x):
        largest = op.Constant(value_float=_FLT_MAX)
        last_axis = op.Constant(value_ints=[-1])
        x32 = op.Cast(x, to=onnx.TensorProto.FLOAT)
        magnitude = op.Abs(x32)
        # NaN compares false, so it counts as infinite here; ReduceMax alone may drop it.
        comparable = op.Where(
            op.LessOrEqual(magnitude, largest), magnitude, op.Constant(value_float=float("inf"))
        )
        zero = op.Constant(value_float=0.0)
        levels = op.Constant(value_float=_Q_MAX)
        reduced = op.ReduceMax(comparable, last_axis, keepdims=1)
        # ORT reduces an empty tensor to its own shape, others to -inf: one column more, all but the
        # first cut off, and the floor below give every empty row the smallest amax.
        padded = op.Pad(reduced, op.Constant(value_ints=[0, 1]), zero, last_axis)
        column = op.Slice(
            padded, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), last_axis
        )
        amax = op.Max(column, op.Constant(value_float=_AMAX_MIN))
        is_finite = op.LessOrEqual(amax, largest)
        kept = op.Where(is_finite, x32, zero)
        q = op.Cast(op.Round(op.Mul(kept, op.Div(levels, amax))), to=onnx.TensorProto.INT8)
        nan = op.Constant(value_float=float("nan"))
        scale = op.Where(is_finite, op.Div(amax, levels), nan)
        return q, scale

    proto: onnx.FunctionProto = DynamicQuantizePerToken.to_function_proto()
    return proto


def reference(
    x: np.ndarray[Any, Any],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The operator in numpy.

    Args:
        x: ``[..., K]`` float32 or float16.

    Returns:
        ``q: [..., K]`` int8 and ``scale: [..., 1]`` float32, ``x ~ scale * q``.
    """
    x32 = x.astype(np.float32)
    finite = np.isfinite(x32).all(axis=-1, keepdims=True)
    kept = np.where(finite, x32, np.float32(0))
    amax = np.abs(kept).max(axis=-1, keepdims=True, initial=np.float32(_AMAX_MIN))
    levels = np.float32(_Q_MAX)
    q = np.rint(kept * (levels / amax)).astype(np.int8)
    return q, np.where(finite, amax / levels, np.float32(np.nan))


def quantize_groups(
    x: np.ndarray[Any, Any], group: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The same for each group of columns on its own.

    Args:
        x: ``[..., K]`` float32 or float16.
        group: columns that share a scale; the last group may be shorter.

    Returns:
        ``q: [..., K]`` int8 and ``scale: [..., ceil(K / group)]`` float32.
    """
    k = x.shape[-1]
    size = max(min(group, k), 1)
    groups = -(-k // size)
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * size - k)])
    q, scale = reference(padded.reshape(*x.shape[:-1], groups, size))
    return q.reshape(padded.shape)[..., :k], scale[..., 0]


OPERATOR = Operator(
    name="DynamicQuantizePerToken",
    doc=_DOC,
    inputs={"x": "`[..., K]` f32 or f16, rank at least 1"},
    outputs={"q": "`[..., K]` i8", "scale": "`[..., 1]` f32"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
)
