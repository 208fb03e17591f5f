"""Hadamard rotation of activations, by the fast transform.

A sum of n = core * 2^m numbers by butterflies rounds m + core times at most; the kernels do them in
a fixed order, so that their bits are those of `reference` on every instruction set. The body
multiplies by dense factors and stays within `ERROR_BUDGET`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

ERROR_BUDGET = 2.0**-23
"""|y - exact| <= budget * (2 + sqrt(block)) * |scale| * sum |x| of the block, plus half a step."""

_DOC = """\
Multiplies blocks of the last axis by a Hadamard matrix, and by a number.

`x: [..., K]` f32 or f16 → `y: [..., K]` of the same type, for each of the K / block blocks:

```
y = scale · (x · H),   H = H2 ⊗ core   [block, block],   entries +1 and -1
```

`core: [c, c]` f32 of +1 and -1; `H2` is Sylvester's matrix of order 2^m = block / c, with entries
(-1)^popcount(i & j). A core of order 1 gives the orders 2^m; orders 12, 20, 28, 36, 40, ... times
2^m need one (`onnxq.solvers.hadamard`). With `scale` 1/√block and a core that is a Hadamard matrix
the product is a rotation.

Kernels compute in float32, in this order, the same bits on every instruction set: each group of c
neighbours times the core, its rows one after another; then butterflies (a + b, a - b) of strides
c, 2c, 4c, ...; then times `scale`. f16 results are rounded once, at the end. The body agrees within
|y - exact| <= 2^-23 · (2 + √block) · |scale| · Σ|x|, plus half a step of the type of x.

- NaN and infinities spread over their block, and to no other.
- Errors: K is no multiple of `block`; `block` is not c · 2^m; c above 256; `scale` is not finite.
"""

_FLOAT = onnx.TensorProto.FLOAT
_INT64 = onnx.TensorProto.INT64
_BITS = 16


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    powers = onnx.numpy_helper.from_array(np.left_shift(1, np.arange(_BITS)), "powers")

    @script(domain, default_opset=op)
    def Hadamard(x, core, block: int, scale: float):
        one = op.Constant(value_ints=[1])
        two = op.Constant(value_float=2.0)
        width = op.Reshape(op.Constant(value_int=block), one)
        order = op.Shape(core, start=0, end=1)
        # H2 of order 2^m as two factors of orders 2^(m // 2) and 2^(m - m // 2).
        ratio = op.Cast(op.Div(width, order), to=_FLOAT)
        m = op.Cast(op.Round(op.Div(op.Log(ratio), op.Log(two))), to=_INT64)
        half = op.Div(m, op.Constant(value_ints=[2]))
        high = op.Cast(op.Pow(two, op.Cast(half, to=_FLOAT)), to=_INT64)
        low = op.Cast(op.Pow(two, op.Cast(op.Sub(m, half), to=_FLOAT)), to=_INT64)
        bit_values = op.Constant(value=powers)
        numbers = op.Range(
            op.Constant(value_int=0), op.ReduceMax(low, keepdims=0), op.Constant(value_int=1)
        )
        shifted = op.Div(op.Unsqueeze(numbers, one), bit_values)
        bits = op.Cast(op.Mod(shifted, op.Constant(value_int=2)), to=_FLOAT)
        common = op.MatMul(bits, op.Transpose(bits, perm=[1, 0]))
        signs = op.Sub(op.Constant(value_float=1.0), op.Mul(two, op.Mod(common, two, fmod=1)))
        zeros = op.Constant(value_ints=[0, 0])
        both = op.Constant(value_ints=[0, 1])
        signs_high = op.Slice(signs, zeros, op.Concat(high, high, axis=0), both)

        x32 = op.Cast(x, to=_FLOAT)
        # A block of zeros more: ONNX Runtime's MatMul takes no left matrix with an empty batch.
        flat = op.Reshape(x32, op.Constant(value_ints=[-1]))
        padded = op.Concat(flat, op.Expand(op.Constant(value_float=0.0), width), axis=0)
        size = op.Shape(flat)
        blocks = op.Add(op.Div(size, width), one)
        minor = op.Mul(low, order)
        by_high = op.MatMul(signs_high, op.Reshape(padded, op.Concat(blocks, high, minor, axis=0)))
        rows = op.Concat(op.Mul(blocks, high), low, order, axis=0)
        by_low = op.MatMul(signs, op.Reshape(by_high, rows))
        ordered = op.Reshape(op.MatMul(by_low, core), op.Constant(value_ints=[-1]))
        kept = op.Slice(ordered, op.Constant(value_ints=[0]), size)
        scaled = op.Mul(kept, op.Constant(value_float=scale))
        y = op.CastLike(op.Reshape(scaled, op.Shape(x), allowzero=1), x)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = Hadamard.to_function_proto()
    return proto


def reference(x: Array, core: Array, *, block: int, scale: float) -> tuple[Array]:
    """The kernels in numpy, to the last bit.

    Args:
        x: ``[..., K]`` float32 or float16.
        core: ``[c, c]`` float32 of +1 and -1.
        block: columns that are transformed together.
        scale: factor of the result.

    Returns:
        ``y: [..., K]`` of the type of x.
    """
    c = core.shape[0]
    groups = x.astype(np.float32).reshape(-1, c)
    with np.errstate(all="ignore"):
        y = groups[:, :1] * core[0]
        for row in range(1, c):
            y = y + groups[:, row : row + 1] * core[row]
        stride = c
        while stride < block:
            pair = y.reshape(-1, 2, stride)
            y = np.stack([pair[:, 0] + pair[:, 1], pair[:, 0] - pair[:, 1]], axis=1)
            stride *= 2
        return ((y * np.float32(scale)).reshape(x.shape).astype(x.dtype),)


OPERATOR = Operator(
    name="Hadamard",
    doc=_DOC,
    inputs={"x": "`[..., K]` f32 or f16, rank at least 1", "core": "`[c, c]` f32, +1 and -1"},
    outputs={"y": "`[..., K]`, the type of x"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=(
        Attribute("block", "INT", "columns that are transformed together"),
        Attribute("scale", "FLOAT", "factor of the result"),
    ),
)
