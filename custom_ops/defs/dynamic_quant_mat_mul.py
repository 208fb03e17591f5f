"""LLM.int8(): INT8 activations, but for the few columns that hold outliers, which stay float.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
arXiv 2208.07339: the scale of a row is taken after the outlier columns were set to zero, and their
product with the dequantized weights is added in float. Weights are those of `QuantMatMul`, whose
kernels this operator shares.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.defs import quant_mat_mul
from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

OUTLIER_THRESHOLD = 6.0
"""The paper's magnitude from which on a column counts as outliers."""

_DOC = """\
Multiplies INT8 activations by packed, quantized weights as QuantMatMul does, but keeps columns of
outliers in float (LLM.int8()).

`x: [..., K]` f32 or f16 → `y: [..., N]` of the same type:

```
outlier[k] = k is in `outliers`, or |x[m, k]| >= threshold for some row m
y          = QuantMatMul(x where outlier is 0)  +  sum over outlier k, ascending: x[m,k] · W[k,n]
```

The rows' scales are those of x without the outliers. `outliers` may be empty, or hold a column
twice; `threshold = 0` looks for none. With neither, the result is QuantMatMul's, to the bit.

Kernels compute in float32: y of QuantMatMul, bias included, then one fused multiply-add after
another, with `W = (level - zero) · (scale · factor)`. f16 results are rounded once, at the end. The
body agrees with them within |y - exact| <= 2^-23 · (4 + √K) · Σ|x·W|, plus half a step of f16 where
that is the type.

- A NaN or an infinity in x is an outlier where there is a threshold: then it touches its own row
  only through the float sum. Else the row is NaN. Other rows are not touched by it.
- Errors: those of QuantMatMul; `int8_activations` other than 1; `outliers` that are not `[R]` or
  not in 0 to K - 1; a `threshold` that is negative or not finite.
"""

_FLOAT = onnx.TensorProto.FLOAT


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset21 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    no_order = onnx.numpy_helper.from_array(quant_mat_mul.NO_ORDER, "no_order")

    @script(domain, default_opset=op)
    def DynamicQuantMatMul(
        x,
        codes,
        scales,
        zero_points,
        levels,
        bias,
        outliers,
        K: int,
        N: int,
        group: int,
        bits: int,
        int8_activations: int,
        exponent_scales: int,
        factor: float,
        layout: int,
        threshold: float,
    ):
        one = op.Constant(value_ints=[1])
        nothing = op.Constant(value_float=0.0)
        x32 = op.Cast(x, to=_FLOAT)
        k = op.Reshape(op.Constant(value_int=K), one)
        # Columns named: the count of each in `outliers`.
        marks = op.Expand(op.Constant(value_float=1.0), op.Shape(outliers))
        named = op.ScatterElements(op.Expand(nothing, k), outliers, marks, axis=0, reduction="add")
        # Columns found: a row of the threshold more, so that there is something to look at; without
        # a threshold nothing is found. NaN is not below it.
        limit = op.Constant(value_float=threshold)
        rows = op.Reshape(x32, op.Concat(op.Constant(value_ints=[-1]), k, axis=0))
        below = op.Less(op.Abs(rows), limit)
        large = op.Where(below, nothing, op.Constant(value_float=1.0))
        with_none = op.Concat(large, op.Expand(nothing, op.Concat(one, k, axis=0)), axis=0)
        found = op.ReduceMax(with_none, op.Constant(value_ints=[0]), keepdims=0)
        searched = op.Where(op.Greater(limit, nothing), found, nothing)
        is_outlier = op.Greater(op.Add(named, searched), nothing)

        # ONNX Runtime lets a function inside of a function take few types.
        numbers = op.Cast(scales, to=_FLOAT)
        inner = op.Where(is_outlier, nothing, x32)
        outer = op.Where(is_outlier, x32, nothing)
        most = domain.QuantMatMul(
            inner,
            codes,
            numbers,
            zero_points,
            levels,
            bias,
            op.Constant(value=no_order),
            K=K,
            N=N,
            group=group,
            bits=bits,
            int8_activations=int8_activations,
            exponent_scales=exponent_scales,
            factor=factor,
            layout=layout,
        )
        rest = domain.QuantMatMul(
            outer,
            codes,
            numbers,
            zero_points,
            levels,
            op.Constant(value_floats=[0.0]),
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
        y = op.CastLike(op.Add(most, rest), x)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = DynamicQuantMatMul.to_function_proto()
    return proto


def reference(
    x: Array,
    codes: Array,
    scales: Array,
    zero_points: Array,
    levels: Array,
    bias: Array,
    outliers: Array,
    *,
    threshold: float,
    **attributes: Any,
) -> tuple[Array]:
    """The kernels in numpy, to the last bit.

    Args:
        x: ``[..., K]`` float32 or float16.
        codes: this and what follows to ``bias``: as QuantMatMul's.
        scales: as QuantMatMul's.
        zero_points: as QuantMatMul's.
        levels: as QuantMatMul's.
        bias: as QuantMatMul's.
        outliers: ``[R]`` int64, columns that stay float.
        threshold: columns with such a magnitude stay float too; 0 for none.
        attributes: QuantMatMul's.

    Returns:
        ``y: [..., N]`` of the type of x.
    """
    k, group = attributes["K"], attributes["group"]
    wide = x.astype(np.float32)
    columns = outlier_columns(wide.reshape(-1, k), outliers, threshold)
    inner = wide.copy()
    inner[..., columns] = 0
    weights = (codes, scales, zero_points, levels)
    (y,) = quant_mat_mul.reference(inner, *weights, bias, quant_mat_mul.NO_ORDER, **attributes)
    exponents = attributes["exponent_scales"]
    level, scale = quant_mat_mul.weight_parts(*weights, k, attributes["N"], group, exponents)
    with np.errstate(all="ignore"):
        for column in columns:
            factor = scale[:, column // group] * np.float32(attributes["factor"])
            weight = level[:, column] * factor
            y = quant_mat_mul.fma(wide[..., column : column + 1], weight, y)
        return (y.astype(x.dtype),)


def outlier_columns(x: Array, outliers: Array, threshold: float) -> list[int]:
    """The columns of ``x: [M, K]`` that are named, or hold a magnitude from the threshold on."""
    found: Array = np.zeros(x.shape[1], bool)
    if threshold > 0:
        found |= ~(np.abs(x) < np.float32(threshold)).all(axis=0)
    found[outliers] = True
    return [int(k) for k in np.flatnonzero(found)]


_BASE = quant_mat_mul.OPERATOR

OPERATOR = Operator(
    name="DynamicQuantMatMul",
    doc=_DOC,
    inputs={
        **{name: doc for name, doc in _BASE.inputs.items() if name != "order"},
        "outliers": "`[R]` i64, columns that stay float; may be empty",
    },
    outputs=_BASE.outputs,
    min_opset=_BASE.min_opset,
    build_function=_build_function,
    reference=reference,
    attributes=(
        *_BASE.attributes,
        Attribute("threshold", "FLOAT", "columns with such a magnitude stay float; 0: none do"),
    ),
)
