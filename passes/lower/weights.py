"""Integer codes, scales and zero points of a constant weight, as the plan asks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.calibration.ranges import weight_range
from onnxq.errors import InternalError
from onnxq.formats import Format, IntFormat, affine_params, parse_format, quantize
from onnxq.graph.match import Linear
from onnxq.graph.match.values import attr_int
from onnxq.passes.plan import WeightPlan
from onnxq.passes.weights.rounded import RoundedWeight
from onnxq.solvers.rtn import rtn
from onnxq.solvers.scale_search import mse_params

Array = npt.NDArray[np.generic]
Float = npt.NDArray[np.float32]

CHUNK = 1 << 18
"""Weights that are rounded at once."""

STRIP = 16
"""Columns that are turned at once: those of a cache line."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in integers.

    Args:
        codes: shape of the weight, integer type of the format.
        scale: float32, ``[]`` per tensor, ``[N]`` per channel, blocked ONNX shape with blocks.
        zero_point: shape of ``scale``, type of ``codes``.
        axis: the axis of the scales, or None per tensor. With blocks it is the reduction axis.
    """

    codes: Array
    scale: Float
    zero_point: Array
    axis: int | None


def integer_format(name: str) -> IntFormat:
    """The integer format called ``name``."""
    fmt = parse_format(name)
    if not isinstance(fmt, IntFormat):
        raise InternalError("PLAN-FORMAT", f"`{name}` is not an integer format")
    return fmt


def grid_format(plan: WeightPlan) -> Format:
    """The format as codes are decoded in float: blocks of integers take signed scales."""
    fmt = parse_format(plan.format)
    if not isinstance(fmt, IntFormat):
        return fmt
    if not plan.symmetric:
        return dataclasses.replace(fmt, block=0, scheme="asym")
    return dataclasses.replace(fmt, block=0, scheme="full" if plan.block else "sym")


def weight_as_read(linear: Linear) -> tuple[Float, int, int]:
    """The weight in the layout in which the node reads it, with its in and out axis."""
    stored = linear.w
    if linear.kind == "conv":
        return stored, linear.in_axis, linear.out_axis
    in_axis = 1 if linear.kind == "gemm" and attr_int(linear.node, "transB", 0) else 0
    if linear.in_axis != in_axis:
        stored = np.ascontiguousarray(stored.T)
    return stored, in_axis, 1 - in_axis


def rows_of(linear: Linear) -> Float:
    """The weight as ``[N, K]``, one row an output channel."""
    stored = linear.w
    return stored if linear.in_axis == 1 else np.ascontiguousarray(stored.T)


def quantize_weight(
    weight: Float,
    plan: WeightPlan,
    *,
    in_axis: int,
    out_axis: int,
) -> QuantizedWeight:
    """Quantize one weight.

    Args:
        weight: any layout; blocks run along ``in_axis``, channels along ``out_axis``.
        plan: format, granularity and how ranges are chosen.
        in_axis: axis of the reduction.
        out_axis: axis of the outputs.
    """
    fmt = integer_format(plan.format)
    if plan.block:
        return _quantize_blocks(weight, plan, fmt, in_axis)
    axis = out_axis if plan.per_channel else None
    lo, hi = weight_range(weight, axis, plan.method, fmt, symmetric=plan.symmetric)
    scale, zero = affine_params(lo, hi, fmt, symmetric=plan.symmetric)
    codes = quantize(weight, scale, zero, fmt, axis=axis)
    return QuantizedWeight(codes, scale, zero, axis)


def take_rounded(rounded: RoundedWeight, plan: WeightPlan, *, in_axis: int) -> QuantizedWeight:
    """What a solver rounded, ``[N, K]``, in the layout with the reduction along ``in_axis``.

    Args:
        rounded: the solver's result.
        plan: says whether scales stand for blocks or channels.
        in_axis: 0 for ``[K, N]``, 1 for ``[N, K]``.
    """
    fmt = integer_format(plan.format)
    codes = rounded.codes.astype(fmt.numpy_dtype)
    zero = rounded.zero_point
    if zero.dtype != np.float32:
        zero = zero.astype(fmt.numpy_dtype)
    if not plan.block:
        axis = 1 - in_axis
        codes = codes if in_axis == 1 else np.ascontiguousarray(codes.T)
        return QuantizedWeight(codes, rounded.scale[:, 0], zero[:, 0], axis)
    if in_axis == 1:
        return QuantizedWeight(codes, rounded.scale, zero, 1)
    turned, scale, zero = (np.ascontiguousarray(a.T) for a in (codes, rounded.scale, zero))
    return QuantizedWeight(turned, scale, zero, 0)


def _quantize_blocks(weight: Float, plan: WeightPlan, fmt: IntFormat, axis: int) -> QuantizedWeight:
    """Blocks of ``plan.block`` along ``axis``; the last may be shorter."""
    moved = np.moveaxis(weight, axis, -1)
    length = moved.shape[-1]
    blocks = -(-length // plan.block)
    padded = np.zeros((*moved.shape[:-1], blocks * plan.block), np.float32)
    padded[..., :length] = moved
    grouped = padded.reshape(-1, plan.block)
    lo, hi = weight_range(grouped, 0, plan.method, fmt, symmetric=plan.symmetric)
    scale, zero = affine_params(lo, hi, fmt, symmetric=plan.symmetric)
    scale = np.moveaxis(scale.reshape(*moved.shape[:-1], blocks), -1, axis)
    zero = np.moveaxis(zero.reshape(*moved.shape[:-1], blocks), -1, axis)
    codes = quantize(weight, scale, zero, fmt, axis=axis, block=plan.block)
    return QuantizedWeight(codes, np.ascontiguousarray(scale), np.ascontiguousarray(zero), axis)


def to_nearest(rows: Float, fmt: Format, plan: WeightPlan) -> RoundedWeight:
    """``[N, K]`` weights rounded to nearest in any format; ``plan`` says how scales are chosen.

    Args:
        rows: one row an output channel.
        fmt: the format, its scheme included.
        plan: block and method.
    """
    parts = nearest_parts(rows, fmt, plan)
    if len(rows) * rows.shape[1] <= CHUNK or not isinstance(fmt, IntFormat):
        return next(parts)
    codes, scales, zeros, start = np.empty(0), [], [], 0
    for part in parts:
        if start == 0:
            codes = np.empty(rows.shape, part.codes.dtype)
        codes[start : start + len(part.codes)] = part.codes
        start += len(part.codes)
        scales.append(part.scale)
        zeros.append(part.zero_point)
    scale, zero = np.concatenate(scales), np.concatenate(zeros)
    return dataclasses.replace(part, codes=codes, scale=scale, zero_point=zero)


def nearest_parts(rows: Float, fmt: Format, plan: WeightPlan) -> Iterator[RoundedWeight]:
    """As :func:`to_nearest`, some rows at a time where each row is rounded by itself."""
    if not isinstance(fmt, IntFormat):
        yield _to_nearest(np.ascontiguousarray(rows), fmt, plan, plan.block or None)
        return
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        yield _to_nearest(_contiguous(rows[start : start + step]), fmt, plan, plan.block)


def _contiguous(rows: Float) -> Float:
    """``rows``, copied in narrow strips if it is a turned view: a quarter of numpy's time."""
    if rows.flags.c_contiguous:
        return rows
    copy = np.empty(rows.shape, rows.dtype)
    for start in range(0, rows.shape[1], STRIP):
        copy[:, start : start + STRIP] = rows[:, start : start + STRIP]
    return copy


def _to_nearest(rows: Float, fmt: Format, plan: WeightPlan, group: int | None) -> RoundedWeight:
    params = None
    if plan.method == "mse":
        params = mse_params(rows, fmt, group=group, norm=2)
    return RoundedWeight.of(rtn(rows, fmt, group=group, params=params))
