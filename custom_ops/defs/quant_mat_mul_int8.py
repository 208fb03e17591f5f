"""`QuantMatMul` of activations that an operator before it has quantized to INT8.

Together with `HadamardQuantize` it is a rotated product whose activations are float nowhere; and
one quantization can serve several products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.defs import quant_mat_mul
from onnxq.custom_ops.registry import DOMAIN, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
Multiplies INT8 activations by packed, quantized weights, and adds a bias.

`q: [..., K]` i8, `q_scale: [..., 1]` f32, or with `int8_activations = 2` `[..., ceil(K / group)]`
→ `y: [..., N]` f32:

```
y = QuantMatMul(x), where x = q_scale · q    each k with the scale of its row, or of its group
```

The numbers are those of QuantMatMul where it quantizes by itself, to the bit: q and q_scale are
what DynamicQuantizePerToken gives, or HadamardQuantize. There is no `order`: who quantizes has it.
The body agrees within QuantMatMul's budget.

- A row or group whose q_scale is NaN makes its row NaN; other rows are not touched by it.
- Errors: those of QuantMatMul; `int8_activations` 0; q_scale of another shape.
"""

_FLOAT = onnx.TensorProto.FLOAT


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset21 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    none = onnx.numpy_helper.from_array(quant_mat_mul.NO_ORDER, "none")

    @script(domain, default_opset=op)
    def QuantMatMulInt8(
        q,
        q_scale,
        codes,
        scales,
        zero_points,
        levels,
        bias,
        K: int,
        N: int,
        group: int,
        bits: int,
        int8_activations: int,
        exponent_scales: int,
        factor: float,
        layout: int,
    ):
        zero = op.Constant(value_ints=[0])
        one = op.Constant(value_ints=[1])
        last_axis = op.Constant(value_ints=[-1])
        k = op.Reshape(op.Constant(value_int=K), one)
        mode = op.Reshape(op.Constant(value_int=int8_activations), one)
        group_size = op.Reshape(op.Constant(value_int=group), one)
        size = op.Where(op.Equal(mode, one), k, op.Min(group_size, k))
        # [..., K] -> [..., parts, size], zeros behind the last.
        parts = op.Shape(q_scale, start=-1)
        padded_k = op.Mul(parts, size)
        missing = op.Concat(zero, op.Sub(padded_k, k), axis=0)
        wide = op.Cast(q, to=_FLOAT)
        filled = op.Pad(wide, missing, op.Constant(value_float=0.0), last_axis)
        outer = op.Shape(q, start=0, end=-1)
        split = op.Reshape(filled, op.Concat(outer, parts, size, axis=0), allowzero=1)
        near = op.Mul(split, op.Unsqueeze(q_scale, last_axis))
        flat = op.Reshape(near, op.Concat(outer, padded_k, axis=0), allowzero=1)
        # ONNX Runtime lets a function inside of a function take few types.
        y = domain.QuantMatMul(
            op.Slice(flat, zero, k, last_axis),
            codes,
            op.Cast(scales, to=_FLOAT),
            zero_points,
            levels,
            bias,
            op.Constant(value=none),
            K=K,
            N=N,
            group=group,
            bits=bits,
            int8_activations=0,
            exponent_scales=exponent_scales,
            factor=factor,
            layout=layout,
        )
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = QuantMatMulInt8.to_function_proto()
    return proto


def reference(
    q: Array,
    q_scale: Array,
    codes: Array,
    scales: Array,
    zero_points: Array,
    levels: Array,
    bias: Array,
    *,
    K: int,
    N: int,
    group: int,
    bits: int,  # noqa: ARG001
    int8_activations: int,
    exponent_scales: int,
    factor: float,
    layout: int,  # noqa: ARG001
) -> tuple[Array]:
    """The kernels in numpy, to the last bit.

    Args:
        q: ``[..., K]`` int8.
        q_scale: ``[..., 1]`` or ``[..., G]`` float32.
        codes: this and what follows: as QuantMatMul's.
        scales: as QuantMatMul's.
        zero_points: as QuantMatMul's.
        levels: as QuantMatMul's.
        bias: as QuantMatMul's.
        K: rows of the weight.
        N: columns of the weight.
        group: k that share a scale.
        bits: of a code.
        int8_activations: 1 for a scale a row, 2 for one a group.
        exponent_scales: 1 when scales are E8M0 codes.
        factor: of all weights.
        layout: 1.

    Returns:
        ``y: [..., N]`` float32.
    """
    y = quant_mat_mul.integer_product(
        q.reshape(-1, K), q_scale.reshape(-1, q_scale.shape[-1]), codes, scales, zero_points,
        levels, bias, by_group=int8_activations == 2, K=K, N=N, group=group,
        exponent_scales=exponent_scales, factor=factor,
    )  # fmt: skip
    return (y.reshape(*q.shape[:-1], N),)


_BASE = quant_mat_mul.OPERATOR

OPERATOR = Operator(
    name="QuantMatMulInt8",
    doc=_DOC,
    inputs={
        "q": "`[..., K]` i8",
        "q_scale": "`[..., 1]` or `[..., ceil(K / group)]` f32",
        **{name: doc for name, doc in _BASE.inputs.items() if name not in ("x", "order")},
    },
    outputs={"y": "`[..., N]` f32"},
    min_opset=_BASE.min_opset,
    build_function=_build_function,
    reference=reference,
    attributes=_BASE.attributes,
)
