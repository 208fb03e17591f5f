"""Matrix product with packed, quantized weights; activations float or INT8, a token or group.

Two definitions stand side by side. The *value* is what the body computes: dequantize, multiply.
Floats are not associative, so the body agrees with it within the budget ``ERROR_BUDGET``. The
*kernels* fix the order of every operation, and `reference` does the same in numpy, so that all
instruction sets and the reference agree to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.defs import dynamic_quantize_per_token as per_token
from onnxq.custom_ops.layout import unpack_codes, unpack_groups
from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

ERROR_BUDGET = 2.0**-23
"""|y - exact| <= budget * (4 + sqrt(K)) * sum |x w|, plus half a step of the output's type."""

NO_ORDER = np.zeros(1, np.int32)
"""The input ``order`` that leaves columns as they are."""

_DOC = """\
Multiplies activations by packed, quantized weights and adds a bias.

`x: [..., K]` f32 or f16 → `y: [..., N]` of the same type:

```
y      = x[..., order] · W + bias
W[k,n] = (levels[code[k,n]] - zero_points[k // group, n]) · scales[k // group, n] · factor
```

`levels` gives the format: -8 to 7 for INT4, -128 to 127 for INT8, -1 and 1 for binary weights, the
16 numbers of E2M1 or NF4, the 64 of E2M3, the 256 of E4M3, any codebook. Codes, scales and zero
points lie in layout 1 (`custom_ops/layout.py`): panels of 32 columns, `P = ceil(N / 32)`, steps of
four k, `J = ceil(K / 4)`, groups `G = ceil(K / group)`; the last group may be shorter.

`order` puts columns of x with similar magnitudes into one group (act-order of GPTQ): row k of W
meets column order[k]. `[1]` holding 0 stands for none.

With `int8_activations = 1` each row of x (in that order) is first quantized as
DynamicQuantizePerToken does it, `x ≈ s · q`, and groups are summed in integers. Levels must then be
integers, at most 255 apart (for E2M1 twice its numbers, with `factor` 0.5). With
`int8_activations = 2` each group of the row has a scale of its own.

Kernels compute, in float32 and in this order, the same bits on every instruction set:

```
int8_activations 1:  t = fma(sum over the group of q · (level - zero), scale, t)   group after group
                     y = t · (s · factor) + bias
                     with i16 scales: t = sum over groups of scale · sum(...), in int32, then float
int8_activations 2:  t = fma(sum over the group of q · (level - zero) · s of the group, scale, t)
                     y = t · factor + bias
int8_activations 0:  t = fma(x, (level - zero) · (scale · factor), t)              k after k
                     y = t + bias
```

i16 scales (Integer Scale, arXiv 2405.14597) are for `int8_activations` 1 and 4-bit levels one
apart; `factor` holds the reciprocal of their amplifier.

f16 results are rounded once, at the end. The body agrees with them within
|y - exact| <= 2^-23 · (4 + √K) · Σ|x·W|, plus half a step of f16 where that is the type.

- A row with a NaN or an infinity in x is NaN, or what float arithmetic makes of it without
  `int8_activations`; other rows are not touched by it.
- Errors: another layout, `bits` other than 1, 2, 3, 4, 6 and 8, a group that is no multiple of 4 or
  below 16 (unless it spans K), with integer activations above 65536; `int8_activations` other than
  0, 1 and 2; shapes that do not fit; a place in `order` outside of K; levels other than those; a
  NaN or infinite scale, where scales are constants of the model; i16 scales with other levels or
  activations, or where a column's sum over k of 127 · |scale| · max|level - zero| exceeds 2^31 - 1.
"""

_E8M0_BIAS = 127
_FLOAT = onnx.TensorProto.FLOAT
_UINT8 = onnx.TensorProto.UINT8
_INT64 = onnx.TensorProto.INT64
_BOOL = onnx.TensorProto.BOOL
_E8M0_NAN = 255


def powers_of_two() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The number of each E8M0 code, ``[256]`` float32."""
    powers = np.ldexp(1.0, np.arange(256) - _E8M0_BIAS)
    powers[_E8M0_NAN] = np.nan
    return powers.astype(np.float32)


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset21 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    powers = onnx.numpy_helper.from_array(powers_of_two(), "powers")
    # Of planes of 4, 2 and 1 bits: where each field of a byte begins, [f, 1], and the mask of one.
    shifts4, shifts2, shifts1 = (
        onnx.numpy_helper.from_array(np.arange(0, 8, width, dtype=np.uint8)[:, None])
        for width in (4, 2, 1)
    )
    mask4, mask2, mask1 = (
        onnx.numpy_helper.from_array(np.array([(1 << width) - 1], np.uint8)) for width in (4, 2, 1)
    )

    @script(domain, default_opset=op)
    def QuantMatMul(
        x,
        codes,
        scales,
        zero_points,
        levels,
        bias,
        order,
        K: int,
        N: int,
        group: int,
        bits: int,
        int8_activations: int,
        exponent_scales: int,
        factor: float,
        layout: int,  # noqa: ARG001
    ):
        zero = op.Constant(value_ints=[0])
        one = op.Constant(value_ints=[1])
        k = op.Reshape(op.Constant(value_int=K), one)
        n = op.Reshape(op.Constant(value_int=N), one)
        group_size = op.Reshape(op.Constant(value_int=group), one)

        # [P, J, bytes] -> [P, J, 128]: each plane's fields, one after another, hold columns that
        # lie apart. A plane that the codes do not have is read from zeros behind them.
        panels = op.Shape(codes, start=0, end=1)
        steps = op.Shape(codes, start=1, end=2)
        width = op.Reshape(op.Constant(value_int=bits), one)
        eight = op.Constant(value_ints=[8])
        four = op.Constant(value_ints=[4])
        two = op.Constant(value_ints=[2])
        step_bytes = op.Mul(width, op.Constant(value_ints=[16]))
        lanes = op.Concat(panels, steps, op.Constant(value_ints=[128]), axis=0)
        padded = op.Concat(codes, op.Expand(op.Cast(zero, to=_UINT8), lanes), axis=2)
        last = op.Constant(value_ints=[2])
        has8 = op.Equal(width, eight)
        has4 = op.Equal(op.Mod(op.Div(width, four), two), one)
        has2 = op.Equal(op.Mod(op.Div(width, two), two), one)
        has1 = op.Equal(op.Mod(width, two), one)
        # Where planes begin, in bytes, and their lowest bit.
        low2 = op.Where(has4, four, zero)
        low1 = op.Add(low2, op.Where(has2, two, zero))
        sixteen = op.Constant(value_ints=[16])
        at8 = op.Where(has8, zero, step_bytes)
        at4 = op.Where(has4, zero, step_bytes)
        at2 = op.Where(has2, op.Mul(low2, sixteen), step_bytes)
        at1 = op.Where(has1, op.Mul(low1, sixteen), step_bytes)
        plane8 = op.Slice(padded, at8, op.Add(at8, op.Constant(value_ints=[128])), last)
        plane4 = op.Slice(padded, at4, op.Add(at4, op.Constant(value_ints=[64])), last)
        plane2 = op.Slice(padded, at2, op.Add(at2, op.Constant(value_ints=[32])), last)
        plane1 = op.Slice(padded, at1, op.Add(at1, op.Constant(value_ints=[16])), last)
        split4 = op.BitShift(
            op.Unsqueeze(plane4, last), op.Constant(value=shifts4), direction="RIGHT"
        )
        split2 = op.BitShift(
            op.Unsqueeze(plane2, last), op.Constant(value=shifts2), direction="RIGHT"
        )
        split1 = op.BitShift(
            op.Unsqueeze(plane1, last), op.Constant(value=shifts1), direction="RIGHT"
        )
        code4 = op.Reshape(op.BitwiseAnd(split4, op.Constant(value=mask4)), lanes)
        code2 = op.Reshape(op.BitwiseAnd(split2, op.Constant(value=mask2)), lanes)
        code1 = op.Reshape(op.BitwiseAnd(split1, op.Constant(value=mask1)), lanes)
        upper2 = op.BitShift(code2, op.Cast(low2, to=_UINT8), direction="LEFT")
        upper1 = op.BitShift(code1, op.Cast(low1, to=_UINT8), direction="LEFT")
        code = op.BitwiseOr(op.BitwiseOr(plane8, code4), op.BitwiseOr(upper2, upper1))
        columns = op.Concat(panels, steps, op.Constant(value_ints=[32, 4]), axis=0)
        level = op.Gather(levels, op.Cast(op.Reshape(code, columns), to=_INT64))
        # [J, 4, P, 32] -> [4 J, 32 P]
        wide = op.Reshape(
            op.Transpose(level, perm=[1, 3, 0, 2]),
            op.Concat(
                op.Mul(steps, op.Constant(value_ints=[4])),
                op.Mul(panels, op.Constant(value_ints=[32])),
                axis=0,
            ),
        )
        first_two = op.Constant(value_ints=[0, 1])
        corner = op.Concat(k, n, axis=0)
        level_kn = op.Slice(wide, op.Constant(value_ints=[0, 0]), corner, first_two)

        # Scales as numbers or, from uint8, as exponents.
        number = op.Cast(scales, to=_FLOAT)
        exponent = op.Clip(
            op.Cast(number, to=_INT64), op.Constant(value_int=0), op.Constant(value_int=255)
        )
        is_exponent = op.Cast(op.Constant(value_int=exponent_scales), to=_BOOL)
        power = op.Gather(op.Constant(value=powers), exponent)
        scale = op.Where(is_exponent, power, number)
        # [P, G, 32] -> [K, N]: a row for each k.
        row = op.Div(
            op.Range(op.Constant(value_int=0), op.Constant(value_int=K), op.Constant(value_int=1)),
            group_size,
        )
        minus_one = op.Constant(value_ints=[-1])
        groups = op.Shape(scales, start=1, end=2)
        by_group = op.Concat(groups, minus_one, axis=0)
        scale_gn = op.Reshape(op.Transpose(scale, perm=[1, 0, 2]), by_group)
        scale_kn = op.Gather(op.Slice(scale_gn, zero, n, one), row)
        zero_wide = op.Expand(op.Cast(zero_points, to=_FLOAT), op.Shape(scales))
        zero_gn = op.Reshape(op.Transpose(zero_wide, perm=[1, 0, 2]), by_group)
        zero_kn = op.Gather(op.Slice(zero_gn, zero, n, one), row)
        weight = op.Mul(
            op.Sub(level_kn, zero_kn), op.Mul(scale_kn, op.Constant(value_float=factor))
        )

        # Columns of x as `order` has them; one place alone stands for all.
        places = op.Range(
            op.Constant(value_int=0), op.Constant(value_int=K), op.Constant(value_int=1)
        )
        none = op.Equal(op.Shape(order), one)
        column = op.Where(none, places, op.Cast(order, to=_INT64))
        x32 = op.Gather(op.Cast(x, to=_FLOAT), column, axis=-1)
        # [..., K] -> [..., parts, size], zeros behind the last: what shares a scale.
        mode = op.Reshape(op.Constant(value_int=int8_activations), one)
        size = op.Where(op.Equal(mode, two), op.Min(group_size, k), k)
        parts = op.Div(op.Sub(op.Add(k, size), one), size)
        padded_k = op.Mul(parts, size)
        nothing = op.Constant(value_float=0.0)
        missing = op.Concat(zero, op.Sub(padded_k, k), axis=0)
        filled = op.Pad(x32, missing, nothing, minus_one)
        outer = op.Shape(x32, start=0, end=-1)
        split = op.Reshape(filled, op.Concat(outer, parts, size, axis=0), allowzero=1)
        q, s = domain.DynamicQuantizePerToken(split)
        near = op.Reshape(
            op.Mul(op.Cast(q, to=_FLOAT), s), op.Concat(outer, padded_k, axis=0), allowzero=1
        )
        is_integer = op.Cast(op.Constant(value_int=int8_activations), to=_BOOL)
        left = op.Where(is_integer, op.Slice(near, zero, k, minus_one), x32)
        y32 = op.Add(op.MatMul(left, weight), bias)
        y = op.CastLike(y32, x)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = QuantMatMul.to_function_proto()
    return proto


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32 arrays with one rounding, as the instruction gives it.

    The product of two floats is exact in float64. Its sum with c is rounded to odd, so that
    rounding it again, to float32, cannot go wrong (Boldo and Melquiond, 2008).
    """
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        addend = np.broadcast_to(c.astype(np.float64), product.shape)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (error != 0) & even
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(inexact, odd, total).astype(np.float32)


def reference(
    x: Array,
    codes: Array,
    scales: Array,
    zero_points: Array,
    levels: Array,
    bias: Array,
    order: Array,
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
        x: ``[..., K]`` float32 or float16.
        codes: ``[P, J, 16 * bits]`` uint8.
        scales: ``[P, G, 32]``.
        zero_points: ``[P, G, 32]`` int8, or ``[1, 1, 1]``.
        levels: ``[2**bits]`` float32.
        bias: ``[N]`` or ``[1]`` float32.
        order: ``[K]`` int32, the columns of x; or ``[1]``, as they are.
        K: rows of the weight.
        N: columns of the weight.
        group: k that share a scale.
        bits: of a code.
        int8_activations: 1 when rows of x are quantized first, 2 when groups of rows are.
        exponent_scales: 1 when scales are E8M0 codes.
        factor: of all weights.
        layout: 1.

    Returns:
        ``y: [..., N]`` of the type of x.
    """
    rows = in_order(x.reshape(-1, K), order)
    if int8_activations:
        by_group = int8_activations == 2
        q, q_scale = per_token.quantize_groups(rows, group if by_group else K)
        y = integer_product(
            q, q_scale, codes, scales, zero_points, levels, bias, by_group=by_group,
            K=K, N=N, group=group, exponent_scales=exponent_scales, factor=factor,
        )  # fmt: skip
        return (y.astype(x.dtype).reshape(*x.shape[:-1], N),)
    level, scale = weight_parts(codes, scales, zero_points, levels, K, N, group, exponent_scales)
    total: Array = np.zeros((rows.shape[0], N), np.float32)
    with np.errstate(all="ignore"):
        weight = level * np.repeat(scale * np.float32(factor), group, axis=1)[:, :K]
        wide = rows.astype(np.float32)
        for k in range(K):
            total = fma(wide[:, k : k + 1], weight[None, :, k], total)
        return ((total + bias).astype(x.dtype).reshape(*x.shape[:-1], N),)


def in_order(x: Array, order: Array) -> Array:
    """Columns of ``x: [..., K]`` as ``order: [K]`` has them, or, from ``[1]``, as they are."""
    return x if len(order) == 1 else x[..., order]


def integer_product(
    q: Array,
    q_scale: Array,
    codes: Array,
    scales: Array,
    zero_points: Array,
    levels: Array,
    bias: Array,
    *,
    by_group: bool,
    K: int,
    N: int,
    group: int,
    exponent_scales: int,
    factor: float,
) -> Array:
    """The product of quantized rows ``q: [M, K]`` with the weight, ``[M, N]`` float32.

    ``q_scale`` is ``[M, 1]``, or with ``by_group`` ``[M, G]``.
    """
    level, scale = weight_parts(codes, scales, zero_points, levels, K, N, group, exponent_scales)
    total: Array = np.zeros((len(q), N), np.float32)
    whole = np.zeros(total.shape, np.int64)
    with np.errstate(all="ignore"):
        for g in range(scale.shape[1]):
            part = slice(g * group, min((g + 1) * group, K))
            dots = q[:, part].astype(np.float64) @ level[:, part].T.astype(np.float64)
            if scales.dtype == np.int16:
                whole += dots.astype(np.int64) * scale[:, g].astype(np.int64)
                continue
            sums = dots.astype(np.float32)
            if by_group:
                sums = sums * q_scale[:, g : g + 1]
            total = fma(sums, scale[None, :, g], total)
        if scales.dtype == np.int16:
            total = whole.astype(np.float32)
        factor32 = np.float32(factor)
        return np.asarray(total * (factor32 if by_group else q_scale * factor32) + bias, np.float32)


def weight_parts(
    codes: Array,
    scales: Array,
    zero_points: Array,
    levels: Array,
    k: int,
    n: int,
    group: int,
    exponent_scales: int,
) -> tuple[Array, Array]:
    """Levels less zero points ``[N, K]`` and scales ``[N, G]``, both float32."""
    level = levels[unpack_codes(codes, n, k)]
    zero = np.broadcast_to(zero_points, scales.shape).astype(np.float32)
    level = level - np.repeat(unpack_groups(zero, n), group, axis=1)[:, :k]
    numbers = powers_of_two()[scales] if exponent_scales else scales.astype(np.float32)
    return level, unpack_groups(numbers, n)


OPERATOR = Operator(
    name="QuantMatMul",
    doc=_DOC,
    inputs={
        "x": "`[..., K]` f32 or f16",
        "codes": "`[P, J, 16 * bits]` u8",
        "scales": "`[P, G, 32]` f32, f16, bf16, f8e4m3fn, i16, or u8 exponents (E8M0)",
        "zero_points": "`[P, G, 32]` i8, or `[1, 1, 1]` holding 0",
        "levels": "`[2^bits]` f32",
        "bias": "`[N]` f32, or `[1]` for all columns",
        "order": "`[K]` i32, columns of x, or `[1]` holding 0: as they are",
    },
    outputs={"y": "`[..., N]`, the type of x"},
    min_opset=21,
    build_function=_build_function,
    reference=reference,
    attributes=(
        Attribute("K", "INT", "reduction length"),
        Attribute("N", "INT", "output columns"),
        Attribute("group", "INT", "k that share a scale; K or more for one a column"),
        Attribute("bits", "INT", "of a code: 1, 2, 3, 4, 6 or 8"),
        Attribute(
            "int8_activations", "INT", "1: quantize each row of x to INT8 first, 2: each group"
        ),
        Attribute("exponent_scales", "INT", "1: scales are E8M0 codes, 2^(code - 127)"),
        Attribute("factor", "FLOAT", "of all weights"),
        Attribute("layout", "INT", "version of the layout: 1"),
    ),
)
