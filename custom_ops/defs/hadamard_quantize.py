"""Hadamard rotation and INT8 quantization in one pass over each row.

What a rotated product with INT8 activations needs (QuaRot, arXiv 2404.00456, section 4): the
rotated row never leaves the nearest cache in float. Numbers are those of `Hadamard` in float32,
then of `DynamicQuantizePerToken`, for each group of columns on its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.defs import dynamic_quantize_per_token as per_token
from onnxq.custom_ops.defs import hadamard
from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
Multiplies blocks of the last axis by a Hadamard matrix, and quantizes the result to INT8.

`x: [..., K]` f32 or f16 → `q: [..., K]` i8, `q_scale: [..., G]` f32, `G = ceil(K / group)`:

```
r = Hadamard(x, core; block, scale)         in f32, whatever the type of x
q, q_scale = DynamicQuantizePerToken(r)     for each group of columns; the last may be shorter
```

so that `r[..., k] ≈ q_scale[..., k // group] · q[..., k]`. With `group` = K or more there is one
scale a row (token). The order of the kernels' operations is that of the two operators, the same
bits on every instruction set. The body rotates by dense products, so that its r differs within
Hadamard's budget, and a q beside a tie may be the neighbour.

- A group that holds a NaN or an infinity after the rotation has `q_scale` NaN and q = 0.
- Errors: those of Hadamard; `group` below 1.
"""

_FLOAT = onnx.TensorProto.FLOAT


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)

    @script(domain, default_opset=op)
    def HadamardQuantize(x, core, block: int, scale: float, group: int):
        zero = op.Constant(value_ints=[0])
        one = op.Constant(value_ints=[1])
        last_axis = op.Constant(value_ints=[-1])
        rotated = domain.Hadamard(op.Cast(x, to=_FLOAT), core, block=block, scale=scale)
        # [..., K] -> [..., G, size], zeros behind the last.
        k = op.Shape(rotated, start=-1)
        outer = op.Shape(rotated, start=0, end=-1)
        size = op.Max(op.Min(op.Reshape(op.Constant(value_int=group), one), k), one)
        groups = op.Div(op.Sub(op.Add(k, size), one), size)
        padded_k = op.Mul(groups, size)
        nothing = op.Constant(value_float=0.0)
        pads = op.Concat(zero, op.Sub(padded_k, k), axis=0)
        padded = op.Pad(rotated, pads, nothing, last_axis)
        split = op.Reshape(padded, op.Concat(outer, groups, size, axis=0), allowzero=1)
        codes, scales = domain.DynamicQuantizePerToken(split)
        flat = op.Reshape(codes, op.Concat(outer, padded_k, axis=0), allowzero=1)
        q = op.Slice(flat, zero, k, last_axis)
        q_scale = op.Reshape(scales, op.Concat(outer, groups, axis=0), allowzero=1)
        return q, q_scale

    proto: onnx.FunctionProto = HadamardQuantize.to_function_proto()
    return proto


def reference(
    x: Array, core: Array, *, block: int, scale: float, group: int
) -> tuple[Array, Array]:
    """The kernels in numpy, to the last bit.

    Args:
        x: ``[..., K]`` float32 or float16.
        core: ``[c, c]`` float32 of +1 and -1.
        block: columns that are transformed together.
        scale: factor of the rotation.
        group: columns that share a scale of the quantization.

    Returns:
        ``q: [..., K]`` int8 and ``q_scale: [..., ceil(K / group)]`` float32.
    """
    (rotated,) = hadamard.reference(x.astype(np.float32), core, block=block, scale=scale)
    return per_token.quantize_groups(rotated, group)


OPERATOR = Operator(
    name="HadamardQuantize",
    doc=_DOC,
    inputs=hadamard.OPERATOR.inputs,
    outputs={"q": "`[..., K]` i8", "q_scale": "`[..., ceil(K / group)]` f32"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=(
        *hadamard.OPERATOR.attributes,
        Attribute("group", "INT", "columns that share a scale; K or more for one a row"),
    ),
)
