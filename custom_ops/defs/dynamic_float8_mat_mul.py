"""FP8 activations, a scale a token, times packed weights.

The product of `QuantizeBlock` and `QuantMatMul` as one node: GPUs whose tensor cores multiply FP8
need the codes of both sides, which a rounded float no longer shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.defs import quant_mat_mul, quantize_block
from onnxq.custom_ops.registry import DOMAIN, Operator

Array = np.ndarray[Any, Any]

ROWS = {
    "block": 0,
    "mantissa": 3,
    "min_exponent": -6,
    "lowest": -448.0,
    "largest": 448.0,
    "scale": quantize_block.SCALE_FLOAT,
    "factor": 0.0,
    "clip": 1.0,
}
"""QuantizeBlock's attributes for E4M3 with a scale a row."""

_DOC = """\
Rounds each row of activations to FP8 E4M3 and multiplies it by packed, quantized weights.

`x: [..., K]` f32 or f16 → `y: [..., N]` of the same type:

```
r = QuantizeBlock(x; block 0, E4M3, scale 0)      in f32: r = s · q, s = max(amax / 448, 2^-126)
y = QuantMatMul(r, weights)                       with int8_activations 0
```

Weights of any format serve; kernels for CUDA multiply codes of both sides where the weights are
E4M3 with one scale a column. Sums run over q, and s multiplies them; a result lies within
2^-20 · (4 + √K) · Σ|r·W| of the exact product, plus half a step of y's type, and within
2^-10 · Σ|r·W| where FP8 tensor cores sum, which keep fewer bits. The CPU has no kernel of its own:
there the body's two operators run on theirs.

- A row with a NaN or an infinity in x is NaN; other rows are not touched by it.
- Errors: those of QuantMatMul.
"""

_FLOAT = onnx.TensorProto.FLOAT


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset21 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    no_order = onnx.numpy_helper.from_array(quant_mat_mul.NO_ORDER, "no_order")

    @script(domain, default_opset=op)
    def DynamicFloat8MatMul(
        x,
        codes,
        scales,
        zero_points,
        levels,
        bias,
        K: int,
        N: int,
        group: int,
        bits: int,
        exponent_scales: int,
        factor: float,
        layout: int,
    ):
        # ONNX Runtime lets a function inside of a function take few types.
        rounded = domain.QuantizeBlock(
            op.Cast(x, to=_FLOAT),
            block=0,
            mantissa=3,
            min_exponent=-6,
            lowest=-448.0,
            largest=448.0,
            scale=0,
            factor=0.0,
            clip=1.0,
        )
        product = domain.QuantMatMul(
            rounded,
            codes,
            op.Cast(scales, to=_FLOAT),
            zero_points,
            levels,
            bias,
            op.Constant(value=no_order),
            K=K,
            N=N,
            group=group,
            bits=bits,
            int8_activations=0,
            exponent_scales=exponent_scales,
            factor=factor,
            layout=layout,
        )
        y = op.CastLike(product, x)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = DynamicFloat8MatMul.to_function_proto()
    return proto


def reference(
    x: Array,
    codes: Array,
    scales: Array,
    zero_points: Array,
    levels: Array,
    bias: Array,
    **attributes: Any,
) -> tuple[Array]:
    """The body's two operators in numpy, as the CPU's kernels compute them.

    Args:
        x: ``[..., K]`` float32 or float16.
        codes: this and what follows to ``bias``: as QuantMatMul's.
        scales: as QuantMatMul's.
        zero_points: as QuantMatMul's.
        levels: as QuantMatMul's.
        bias: as QuantMatMul's.
        attributes: QuantMatMul's but for ``int8_activations``.

    Returns:
        ``y: [..., N]`` of the type of x.
    """
    (rounded,) = quantize_block.reference(x.astype(np.float32), **ROWS)
    weights = (codes, scales, zero_points, levels, bias, quant_mat_mul.NO_ORDER)
    (y,) = quant_mat_mul.reference(rounded, *weights, int8_activations=0, **attributes)
    with np.errstate(over="ignore"):
        return (y.astype(x.dtype),)


_BASE = quant_mat_mul.OPERATOR

OPERATOR = Operator(
    name="DynamicFloat8MatMul",
    doc=_DOC,
    inputs={name: doc for name, doc in _BASE.inputs.items() if name != "order"},
    outputs=_BASE.outputs,
    min_opset=_BASE.min_opset,
    build_function=_build_function,
    reference=reference,
    attributes=tuple(a for a in _BASE.attributes if a.name != "int8_activations"),
)
