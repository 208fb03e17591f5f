"""FP8 activations times plain FP8 weights, with the scales that cuBLASLt takes of both.

GPUs whose tensor cores multiply FP8 need the codes of both sides, in rows, with one scale a row or
one a block; nothing is expanded or put in another order on the way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.defs import quantize_block
from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

ROWS = {
    "mantissa": 3,
    "min_exponent": -6,
    "lowest": -448.0,
    "largest": 448.0,
    "scale": quantize_block.SCALE_FLOAT,
    "factor": 0.0,
    "clip": 1.0,
}
"""QuantizeBlock's attributes for E4M3, but for the block."""
BLOCK = 128
"""The one size of blocks that there are kernels for."""

_DOC = """\
Rounds activations to FP8 E4M3 and multiplies them by plain FP8 weights.

`x: [..., K]` f32 or f16 → `y: [..., N]` of the same type:

```
r    = QuantizeBlock(x; block, E4M3, scale 0)     in f32: r = s · q, s = max(amax / 448, 2^-126)
W    = weight[n, k] · scales[n, 0]                with block 0: a scale a column of y
     = weight[n, k] · scales[n / 128, k / 128]    with block 128
y    = r · W, transposed, + bias
```

With block 0 a token of x has one scale, with block 128 one for each 128 of its columns. Scales of
blocks have zeros at the end of their rows, up to a multiple of 4, as cuBLASLt reads them. One scale
for all of a weight is written N times.

Sums run over q; a result lies within 2^-20 · (4 + √K) · Σ|r·W| of the exact product, plus half a
step of y's type, and within 2^-10 · Σ|r·W| where FP8 tensor cores sum, which keep fewer bits. The
CPU has no kernel of its own: there the body runs, QuantizeBlock on its kernel.

- A row with a NaN or an infinity in x is NaN; other rows are not touched by it.
- Errors: block neither 0 nor 128; K no multiple of 128 with block 128; shapes that do not fit.
"""

_FLOAT = onnx.TensorProto.FLOAT


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset21 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)

    @script(domain, default_opset=op)
    def DynamicFloat8MatMul(x, weight, scales, bias, block: int):
        # ONNX Runtime lets a function inside of a function take few types.
        rounded = domain.QuantizeBlock(
            op.Cast(x, to=_FLOAT),
            block=block,
            mantissa=3,
            min_exponent=-6,
            lowest=-448.0,
            largest=448.0,
            scale=0,
            factor=0.0,
            clip=1.0,
        )
        wide = op.Cast(weight, to=_FLOAT)
        nothing = op.Constant(value_int=0)
        one = op.Constant(value_int=1)
        share = op.Max(op.Constant(value_int=block), one)
        n = op.Squeeze(op.Shape(wide, start=0, end=1))
        k = op.Squeeze(op.Shape(wide, start=1, end=2))
        last = op.Sub(op.Squeeze(op.Shape(scales, start=1, end=2)), one)
        rows = op.Div(op.Range(nothing, n, one), share)
        columns = op.Min(op.Div(op.Range(nothing, k, one), share), last)
        spread = op.Gather(op.Gather(scales, rows, axis=0), columns, axis=1)
        product = op.MatMul(rounded, op.Transpose(op.Mul(wide, spread), perm=[1, 0]))
        y = op.CastLike(op.Add(product, bias), x)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = DynamicFloat8MatMul.to_function_proto()
    return proto


def spread_scales(scales: Array, n: int, k: int, block: int) -> Array:
    """A scale for each weight, ``[n, k]`` or ``[n, 1]``."""
    if not block:
        return scales
    return scales[np.arange(n)[:, None] // block, np.arange(k) // block]


def reference(x: Array, weight: Array, scales: Array, bias: Array, *, block: int) -> tuple[Array]:
    """The body in numpy, its sums in float64.

    Args:
        x: ``[..., K]`` float32 or float16.
        weight: ``[N, K]`` float8_e4m3fn.
        scales: ``[N, 1]`` float32; with blocks ``[ceil(N / 128), K / 128 rounded up to 4s]``.
        bias: ``[N]`` float32, or ``[1]``.
        block: 0 or 128.

    Returns:
        ``y: [..., N]`` of the type of x.
    """
    (rounded,) = quantize_block.reference(x.astype(np.float32), block=block, **ROWS)
    n, k = weight.shape
    matrix = weight.astype(np.float32) * spread_scales(scales, n, k, block)
    with np.errstate(over="ignore", invalid="ignore"):
        y = rounded.astype(np.float64) @ matrix.T.astype(np.float64) + bias
        return (y.astype(np.float32).astype(x.dtype),)


OPERATOR = Operator(
    name="DynamicFloat8MatMul",
    doc=_DOC,
    inputs={
        "x": "`[..., K]` f32 or f16",
        "weight": "`[N, K]` f8e4m3fn",
        "scales": "`[N, 1]` f32, or with blocks `[ceil(N / 128), K / 128 rounded up to 4s]`",
        "bias": "`[N]` f32, or `[1]` for all columns",
    },
    outputs={"y": "`[..., N]`, the type of x"},
    min_opset=21,
    build_function=_build_function,
    reference=reference,
    attributes=(Attribute("block", "INT", "0: scales of rows; 128: of blocks"),),
)
