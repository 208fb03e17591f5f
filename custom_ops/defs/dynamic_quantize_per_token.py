"""Symmetric INT8 quantization of activations with one scale a token, found at run time.

The numbers are chosen so that the body, the numpy reference and every compiled kernel give the same
bits: float32 throughout, one rounding an operation, the reciprocal taken once a row.

Why no clamp is needed: with u = 2^-24 and no underflow, scale >= amax/127 * (1 - u) and
inverse <= 1/scale * (1 + u), so |x| * inverse <= 127 * (1 + 4u) after its own rounding, which
rounds to 127. Where scale was raised to FLT_MIN, |x| / scale is smaller still.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.registry import DOMAIN, Operator

_FLT_MAX = float(np.finfo(np.float32).max)
_FLT_MIN = float(np.finfo(np.float32).tiny)
_Q_MAX = 127.0

_DOC = """\
Quantizes each token (row of the last axis) to signed INT8 with its own scale, symmetric about zero.

`x: [..., K]` f32 or f16 → `q: [..., K]` i8, `scale: [..., 1]` f32, with `x ≈ scale · q`:

```
amax  = max |x| over the row, in f32 (0 for K = 0)
scale = max(amax / 127, FLT_MIN)            FLT_MIN = 2^-126: finite and > 0 even for a row of zeros
q     = round_half_even(x · (1 / scale))    -127 <= q <= 127
```

- |x - scale · q| <= 0.5001 · scale; the reciprocal is rounded once a row, not once an element.
- A row that holds a NaN or an infinity gets `scale = NaN` and `q = 0`: dequantized it is all NaN,
  so the fault stays visible. Other rows are not touched by it.
- Values below 2^-126 in magnitude quantize as if `scale` were 2^-126.
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
        reduced = op.ReduceMax(comparable, last_axis, keepdims=1)
        # ORT reduces an empty tensor to its own shape, others to -inf: one column more, all but the
        # first cut off, and a floor of 0 give every empty row the greatest magnitude 0.
        padded = op.Pad(reduced, op.Constant(value_ints=[0, 1]), zero, last_axis)
        column = op.Slice(
            padded, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), last_axis
        )
        amax = op.Max(column, zero)
        is_finite = op.LessOrEqual(amax, largest)
        step = op.Max(
            op.Div(amax, op.Constant(value_float=_Q_MAX)), op.Constant(value_float=_FLT_MIN)
        )
        inverse = op.Div(op.Constant(value_float=1.0), step)
        kept = op.Where(is_finite, x32, zero)
        q = op.Cast(op.Round(op.Mul(kept, inverse)), to=onnx.TensorProto.INT8)
        scale = op.Where(is_finite, step, op.Constant(value_float=float("nan")))
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
    amax = np.abs(kept).max(axis=-1, keepdims=True, initial=0)
    step = np.maximum(amax / np.float32(_Q_MAX), np.float32(_FLT_MIN))
    q = np.rint(kept * (np.float32(1) / step)).astype(np.int8)
    return q, np.where(finite, step, np.float32(np.nan)).astype(np.float32)


OPERATOR = Operator(
    name="DynamicQuantizePerToken",
    doc=_DOC,
    inputs={"x": "`[..., K]` f32 or f16, rank at least 1"},
    outputs={"q": "`[..., K]` i8", "scale": "`[..., 1]` f32"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
)
