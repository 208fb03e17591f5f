"""Rounding of activations to low-precision formats with a scale a block, in float.

The result stays float ("fake quantization"), so that any operator can follow: with float
activations `QuantMatMul` computes with exactly the numbers that a product of packed activations
would see. Kernels take exponents from the bits of a float; the body takes a logarithm and corrects
it by comparison with a table of powers of two, which gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

SCALE_FLOAT, SCALE_E8M0, SCALE_E8M0_CEIL, SCALE_E4M3 = range(4)
"""Values of the attribute ``scale``."""

_DOC = """\
Rounds activations to a low-precision format, block by block, and gives the rounded numbers.

`x: [..., K]` f32 or f16 → `y: [..., K]` of the same type, `y = s · round(x / s)`, for blocks of
`block` neighbours on the last axis; the last may be shorter, and 0 makes one block of each row (one
scale a token). With `amax = max |x|` over the block, in float32:

```
scale 0:  s = max(amax · clip / largest, 2^-126)                   float scales: INT8, INT4, FP8
scale 1:  s = 2^(floor(log2 amax) - floor(log2 largest))           MX, the rule of its specification
scale 2:  the smallest s = 2^e with amax <= largest · s            MX, rounded up ("RCEIL")
scale 3:  s = e4m3(amax / largest / f) · f                         NVFP4
```

f is `factor`, from the range of the whole tensor; with `factor = 0` it is taken from each row:
`max(amax of the row / (448 · largest), 2^-126)`, so that no token depends on another.

Exponents of scales 1 and 2 are bounded to -127 and 127. Elements are floats of `mantissa` bits,
whose smallest normal exponent is `min_exponent`, subnormals below; ties go to even, and what lies
beyond `largest` becomes `largest`, or below zero `lowest`:

```
round(v) = min(max(rint(v / step) · step, lowest), largest)        zeros are +0
step     = 2^(max(floor(log2 |v|), min_exponent) - mantissa)
```

Integers are such numbers too, with a step of 1 up to `largest`.

| format | block | mantissa | min_exponent | lowest, largest | scale |
|---|---|---|---|---|---|
| MXFP8 E4M3 | 32 | 3 | -6 | ±448 | 1 or 2 |
| MXFP8 E5M2 | 32 | 2 | -14 | ±57344 | 1 or 2 |
| MXFP6 E2M3 | 32 | 3 | 0 | ±7.5 | 1 or 2 |
| MXFP6 E3M2 | 32 | 2 | -2 | ±28 | 1 or 2 |
| MXFP4 | 32 | 1 | 0 | ±6 | 1 or 2 |
| MXINT8 | 32 | 6 | 0 | ±127/64 | 1 |
| NVFP4 | 16 | 1 | 0 | ±6 | 3 |
| INT8 | any | 7 | 7 | -128, 127 | 0 |
| INT4 | any | 3 | 3 | -8, 7 | 0 |

- A block that holds a NaN or an infinity is all NaN; other blocks are not touched by it.
- A block whose scale is 0 (NVFP4 only) is all 0.
- Errors: `x` is a scalar; `block` below 0; `mantissa` not in 0 to 15, `min_exponent` not in -30 to
  15, `largest` or `-lowest` not in (0, 65536]; `scale` not in 0 to 3; `factor` negative or not
  finite; `clip` not in (0, 1].
"""

_FLOAT = onnx.TensorProto.FLOAT
_INT64 = onnx.TensorProto.INT64
_FLT_MAX = float(np.finfo(np.float32).max)
_LOWEST = -149
_POWERS = 280
_LOG2_E = float(np.float32(1 / np.log(2)))
_E4M3 = (3, -6, 448.0)


def _powers() -> np.ndarray[Any, np.dtype[np.float32]]:
    """2^-149 to 2^127, and infinities behind: ``[280]`` float32."""
    with np.errstate(over="ignore"):
        return np.ldexp(1.0, np.arange(_LOWEST, _LOWEST + _POWERS)).astype(np.float32)


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    table = onnx.numpy_helper.from_array(_powers(), "powers")

    @script(domain, default_opset=op)
    def QuantizeBlock(
        x,
        block: int,
        mantissa: int,
        min_exponent: int,
        lowest: float,
        largest: float,
        scale: int,
        factor: float,
        clip: float,
    ):
        zero = op.Constant(value_ints=[0])
        one = op.Constant(value_ints=[1])
        last_axis = op.Constant(value_ints=[-1])
        nothing = op.Constant(value_float=0.0)
        flt_max = op.Constant(value_float=_FLT_MAX)
        to_log2 = op.Constant(value_float=_LOG2_E)
        powers = op.Constant(value=table)
        origin = op.Constant(value_int=_LOWEST)
        highest = op.Constant(value_int=_LOWEST + _POWERS - 2)
        top = op.Constant(value_float=largest)
        rule = op.Constant(value_int=scale)
        given_factor = op.Constant(value_float=factor)
        smallest = op.Constant(value_float=2.0**-126)

        # [..., K] -> [..., blocks, size], zeros behind the last.
        x32 = op.Cast(x, to=_FLOAT)
        k = op.Shape(x32, start=-1)
        given = op.Reshape(op.Constant(value_int=block), one)
        size = op.Max(op.Where(op.Equal(given, zero), k, given), one)
        blocks = op.Div(op.Sub(op.Add(k, size), one), size)
        missing = op.Sub(op.Mul(blocks, size), k)
        padded = op.Pad(x32, op.Concat(zero, missing, axis=0), nothing, last_axis)
        outer = op.Shape(x32, start=0, end=-1)
        v = op.Reshape(padded, op.Concat(outer, blocks, size, axis=0), allowzero=1)

        # NaN compares false, so it counts as infinite here; ReduceMax alone may drop it.
        magnitude = op.Abs(v)
        comparable = op.Where(
            op.LessOrEqual(magnitude, flt_max), magnitude, op.Constant(value_float=float("inf"))
        )
        reduced = op.ReduceMax(comparable, last_axis, keepdims=1)
        finite = op.LessOrEqual(reduced, flt_max)
        amax = op.Where(finite, reduced, nothing)
        positive = op.Max(amax, op.Constant(value_float=2.0**-149))

        # floor(log2): the logarithm may be one off.
        near = op.Clip(
            op.Cast(op.Floor(op.Mul(op.Log(positive), to_log2)), to=_INT64), origin, highest
        )
        below = op.Cast(op.Less(positive, op.Gather(powers, op.Sub(near, origin))), to=_INT64)
        up = op.Add(op.Sub(near, origin), op.Constant(value_int=1))
        above = op.Cast(op.GreaterOrEqual(positive, op.Gather(powers, up)), to=_INT64)
        exponent = op.Sub(op.Add(near, above), below)
        top_near = op.Cast(op.Floor(op.Mul(op.Log(top), to_log2)), to=_INT64)
        top_power = op.Gather(powers, op.Sub(top_near, origin))
        top_up = op.Gather(powers, op.Add(op.Sub(top_near, origin), op.Constant(value_int=1)))
        top_below = op.Cast(op.Less(top, top_power), to=_INT64)
        top_above = op.Cast(op.GreaterOrEqual(top, top_up), to=_INT64)
        top_exponent = op.Sub(op.Add(top_near, top_above), top_below)

        # Scales of powers of two.
        floor_exponent = op.Sub(exponent, top_exponent)
        reach = op.Mul(
            top, op.Gather(powers, op.Sub(op.Clip(floor_exponent, origin, highest), origin))
        )
        is_ceil = op.Equal(rule, op.Constant(value_int=SCALE_E8M0_CEIL))
        step_up = op.Cast(op.And(op.Greater(positive, reach), is_ceil), to=_INT64)
        bounded = op.Clip(
            op.Add(floor_exponent, step_up),
            op.Constant(value_int=-127),
            op.Constant(value_int=127),
        )
        power_scale = op.Gather(powers, op.Sub(bounded, origin))

        # Float scales.
        float_scale = op.Max(op.Div(op.Mul(amax, op.Constant(value_float=clip)), top), smallest)

        # E4M3 scales. A block of zero more, so that a row of none has a largest; ORT reduces an
        # empty tensor to its own shape, so all but the first is cut off.
        behind = op.Constant(value_ints=[0, 1])
        before_last = op.Constant(value_ints=[-2])
        every_amax = op.ReduceMax(op.Pad(amax, behind, nothing, before_last), before_last)
        row_amax = op.Slice(every_amax, zero, one, before_last)
        row_factor = op.Max(op.Div(row_amax, op.Mul(top, op.Constant(value_float=448.0))), smallest)
        of_tensor = op.Where(op.Greater(given_factor, nothing), given_factor, row_factor)
        ratio = op.Min(op.Div(op.Div(amax, top), of_tensor), op.Constant(value_float=448.0))
        ratio_near = op.Cast(
            op.Floor(op.Mul(op.Log(op.Max(ratio, op.Constant(value_float=2.0**-7))), to_log2)),
            to=_INT64,
        )
        ratio_index = op.Sub(ratio_near, origin)
        ratio_below = op.Cast(op.Less(ratio, op.Gather(powers, ratio_index)), to=_INT64)
        ratio_next = op.Gather(powers, op.Add(ratio_index, op.Constant(value_int=1)))
        ratio_above = op.Cast(op.GreaterOrEqual(ratio, ratio_next), to=_INT64)
        ratio_exponent = op.Max(
            op.Sub(op.Add(ratio_near, ratio_above), ratio_below), op.Constant(value_int=-6)
        )
        ratio_step = op.Gather(
            powers, op.Sub(op.Sub(ratio_exponent, op.Constant(value_int=3)), origin)
        )
        small_scale = op.Mul(op.Mul(op.Round(op.Div(ratio, ratio_step)), ratio_step), of_tensor)

        is_e4m3 = op.Equal(rule, op.Constant(value_int=SCALE_E4M3))
        is_float = op.Equal(rule, op.Constant(value_int=SCALE_FLOAT))
        s = op.Where(is_e4m3, small_scale, op.Where(is_float, float_scale, power_scale))

        # Elements.
        usable = op.And(finite, op.Greater(s, nothing))
        safe = op.Where(usable, s, op.Constant(value_float=1.0))
        kept = op.Where(usable, v, nothing)
        bottom = op.Neg(op.Constant(value_float=lowest))
        limit = op.Where(op.Less(kept, nothing), bottom, top)
        a = op.Min(op.Abs(op.Div(kept, safe)), limit)
        least = op.Gather(powers, op.Sub(op.Constant(value_int=min_exponent), origin))
        a_near = op.Cast(op.Floor(op.Mul(op.Log(op.Max(a, least)), to_log2)), to=_INT64)
        a_index = op.Sub(a_near, origin)
        a_below = op.Cast(op.Less(a, op.Gather(powers, a_index)), to=_INT64)
        a_next = op.Gather(powers, op.Add(a_index, op.Constant(value_int=1)))
        a_above = op.Cast(op.GreaterOrEqual(a, a_next), to=_INT64)
        a_exponent = op.Max(
            op.Sub(op.Add(a_near, a_above), a_below), op.Constant(value_int=min_exponent)
        )
        step = op.Gather(
            powers, op.Sub(op.Sub(a_exponent, op.Constant(value_int=mantissa)), origin)
        )
        rounded = op.Mul(op.Round(op.Div(a, step)), step)
        # ONNX Runtime's Where makes +0 of -0; the sum does it everywhere.
        signed = op.Add(op.Where(op.Less(kept, nothing), op.Neg(rounded), rounded), nothing)
        dequantized = op.Mul(signed, safe)
        shown = op.Where(finite, dequantized, op.Constant(value_float=float("nan")))
        flat = op.Reshape(shown, op.Concat(outer, op.Mul(blocks, size), axis=0), allowzero=1)
        y = op.CastLike(op.Slice(flat, zero, k, last_axis), x)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = QuantizeBlock.to_function_proto()
    return proto


def reference(
    x: Array,
    *,
    block: int,
    mantissa: int,
    min_exponent: int,
    lowest: float,
    largest: float,
    scale: int,
    factor: float,
    clip: float,
) -> tuple[Array]:
    """The operator in numpy, to the last bit.

    Args:
        x: ``[..., K]`` float32 or float16.
        block: elements that share a scale; 0 for a row.
        mantissa: bits of an element's mantissa.
        min_exponent: exponent of its smallest normal number.
        lowest: its lowest number.
        largest: its largest number.
        scale: which scales, 0 to 3.
        factor: of E4M3 scales; 0 for one a row.
        clip: share of amax that float scales reach.

    Returns:
        ``y: [..., K]`` of the type of x.
    """
    k = x.shape[-1]
    size = max(1, block or k)
    blocks = -(-k // size)
    padded = np.zeros((*x.shape[:-1], blocks * size), np.float32)
    padded[..., :k] = x
    v = padded.reshape(*x.shape[:-1], blocks, size)
    with np.errstate(all="ignore"):
        finite = np.isfinite(v).all(axis=-1, keepdims=True)
        amax = np.abs(np.where(finite, v, 0)).max(axis=-1, keepdims=True, initial=0)
        s = _scales(amax, np.float32(largest), scale, np.float32(factor), np.float32(clip))
        usable = finite & (s > 0)
        kept = np.where(usable, v, np.float32(0))
        safe = np.where(usable, s, np.float32(1))
        limit = np.where(kept < 0, np.float32(-lowest), np.float32(largest))
        magnitude = round_element(np.abs(kept / safe), mantissa, min_exponent, limit)
        y = (np.where(kept < 0, -magnitude, magnitude) + np.float32(0)) * safe
        y = np.where(finite, y, np.float32(np.nan))
        flat = y.reshape(*x.shape[:-1], blocks * size)[..., :k]
        return (np.ascontiguousarray(flat).astype(x.dtype),)


def _scales(
    amax: Array, largest: np.float32, rule: int, factor: np.float32, clip: np.float32
) -> Array:
    smallest = np.float32(2.0**-126)
    if rule == SCALE_FLOAT:
        floats: Array = np.maximum(amax * clip / largest, smallest)
        return floats
    if rule == SCALE_E4M3:
        of_row = amax.max(axis=-2, keepdims=True, initial=0) / (largest * np.float32(448))
        f = factor if factor > 0 else np.maximum(of_row, smallest)
        return round_element(amax / largest / f, *_E4M3) * f
    least = np.maximum(amax, np.float32(2.0**-149))
    exponent = np.frexp(least)[1] - np.frexp(largest)[1]
    if rule == SCALE_E8M0_CEIL:
        exponent = exponent + (least > np.ldexp(largest, exponent))
    scale: Array = np.ldexp(np.float32(1), np.clip(exponent, -127, 127))
    return scale.astype(np.float32)


def round_element(a: Array, mantissa: int, min_exponent: int, largest: Array | float) -> Array:
    """Magnitudes to the nearest element, ties to even, saturating; float32."""
    bounded = np.minimum(a, np.asarray(largest, np.float32))
    exponent = np.maximum(np.frexp(bounded)[1] - 1, min_exponent)
    rounded: Array = np.ldexp(np.rint(np.ldexp(bounded, mantissa - exponent)), exponent - mantissa)
    return rounded.astype(np.float32)


OPERATOR = Operator(
    name="QuantizeBlock",
    doc=_DOC,
    inputs={"x": "`[..., K]` f32 or f16, rank at least 1"},
    outputs={"y": "`[..., K]`, the type of x"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=(
        Attribute("block", "INT", "elements that share a scale; 0 for a whole row"),
        Attribute("mantissa", "INT", "bits of an element's mantissa"),
        Attribute("min_exponent", "INT", "exponent of an element's smallest normal number"),
        Attribute("lowest", "FLOAT", "an element's lowest number"),
        Attribute("largest", "FLOAT", "an element's largest number"),
        Attribute("scale", "INT", "0 float, 1 E8M0, 2 E8M0 rounded up, 3 E4M3 times factor"),
        Attribute(
            "factor", "FLOAT", "of E4M3 scales, from the range of the tensor; 0: of each row"
        ),
        Attribute("clip", "FLOAT", "share of amax that float scales reach"),
    ),
)
