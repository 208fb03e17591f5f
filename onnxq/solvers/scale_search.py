"""Scales of least weighted error, by scanning shrunken ranges of each group.

- ``mse_params``: ranges times ``1 - i/100`` for i in 0..79, least ``sum |w - q(w)|^2.4`` (the grid
  of GPTQ's and QuaRot's quantizers).
- ``opt_rtn``: symmetric integers, after AutoRound's optimised RTN and llama.cpp: 201 inverse
  scales around that of the extreme; for the codes each gives, the scale is then set to its
  weighted least-squares value. The weights are the second moments of the inputs ("imatrix").
  Other formats scan ``mse_params`` with the same weights and the square.
- ``awq_clip``: the range of each row and group that loses least in the layer's output, from the
  diagonal blocks of H (AWQ, Lin et al., arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np

from onnxq.formats import (
    NAMED_FLOATS,
    Format,
    Granularity,
    Groups,
    IntFormat,
    MxFormat,
    NvFp4Format,
    Params,
)
from onnxq.formats import affine_params as affine
from onnxq.solvers.grid import Array, Float32, Float64, Solution, check_weights, granularity_of
from onnxq.solvers.hessian import check_hessian

MSE_NORM = 2.4
MSE_FACTORS = tuple(1 - i / 100 for i in range(80))
MX_FACTORS = (1.0, 0.5, 2.0)
OPT_STEPS = 100
OPT_REACH = 0.75
AWQ_FACTORS = tuple(1 - i / 20 for i in range(10))

Error = Callable[[Float32], Float64]
"""Error of each group, ``[G]``, from the differences ``[G, L]``."""


def mse_params(
    W: Array,
    fmt: Format,
    *,
    group: int | None = None,
    norm: float = MSE_NORM,
    factors: Sequence[float] | None = None,
    importance: Array | None = None,
) -> Params:
    """Scales of least ``sum importance * |w - q(w)|^norm`` for each group.

    Args:
        W: ``[N, K]``.
        fmt: a format with a scale for each group.
        group: columns per scale; 0 for whole rows; None for the format's own block.
        norm: the exponent.
        factors: of the extremes' range, powers of two for MX; default 1 down to 0.21 (MX: 1, 1/2,
            2).
        importance: ``[K]``, for example the second moments of the inputs.

    Raises:
        DataError: NaN or Inf in W.
    """
    weights = check_weights(W)
    granularity = granularity_of(fmt, group)
    weight = None if importance is None else _grouped(importance, weights, granularity)

    def error(delta: Float32) -> Float64:
        powered = delta * delta if norm == 2 else np.abs(delta) ** np.float32(norm)
        if weight is not None:
            powered = powered * weight
        return np.asarray(powered.sum(axis=1, dtype=np.float64))

    plain = MX_FACTORS if isinstance(fmt, MxFormat) else MSE_FACTORS
    return _search(weights, fmt, granularity, error, factors or plain)


def awq_clip(
    W: Array,
    H: Array,
    fmt: Format,
    *,
    group: int | None = None,
    factors: Sequence[float] | None = None,
) -> Params:
    """Scales of least output error ``d H_gg d'`` for each row and group g.

    Raises:
        DataError: NaN or Inf, or an H that does not fit W.
    """
    weights = check_weights(W)
    granularity = granularity_of(fmt, group)
    rows, columns = weights.shape
    size = granularity.size or columns
    hessian = check_hessian(H, columns)
    padded = np.zeros((-(-columns // size) * size,) * 2)
    padded[:columns, :columns] = hessian
    blocks = np.stack([padded[i : i + size, i : i + size] for i in range(0, len(padded), size)])

    def error(delta: Float32) -> Float64:
        parts = delta.astype(np.float64).reshape(rows, -1, size).transpose(1, 0, 2)
        per_block = np.sum((parts @ blocks) * parts, axis=2)
        return np.asarray(per_block.T.reshape(-1))

    plain = MX_FACTORS if isinstance(fmt, MxFormat) else AWQ_FACTORS
    return _search(weights, fmt, granularity, error, factors or plain)


def opt_rtn(
    W: Array, fmt: Format, *, group: int | None = None, importance: Array | None = None
) -> Solution:
    """Round to nearest with searched scales, weighted by ``importance`` (``[K]``).

    Raises:
        DataError: NaN or Inf in W.
    """
    weights = check_weights(W)
    granularity = granularity_of(fmt, group)
    if isinstance(fmt, IntFormat) and fmt.symmetric:
        params = _least_squares_scales(weights, fmt, granularity, importance)
    else:
        params = mse_params(weights, fmt, group=group, norm=2.0, importance=importance)
    return Solution(fmt, fmt.encode(weights, params), params)


def _least_squares_scales(
    W: Float32, fmt: IntFormat, granularity: Granularity, importance: Array | None
) -> Params:
    groups = granularity.split(W)
    values = groups.values
    weight = np.ones(1, np.float32) if importance is None else _grouped(importance, W, granularity)
    index = np.abs(values).argmax(axis=1)[:, None]
    extreme = np.take_along_axis(values, index, axis=1).astype(np.float64)
    start = fmt.params(W, granularity)
    best = groups.from_param(start.scale)[:, 0].astype(np.float64)
    least = _weighted_error(values, fmt, best, weight)
    half = 1 << (fmt.bits - 1)
    for step in range(-OPT_STEPS, OPT_STEPS + 1):
        target = -half + step * OPT_REACH * half / OPT_STEPS
        inverse = np.where(extreme == 0, 1.0, target / np.where(extreme == 0, 1.0, extreme))
        if fmt.scheme == "sym":
            inverse = np.abs(inverse)
        scaled = values * inverse.astype(np.float32)
        codes = np.clip(np.rint(scaled, out=scaled), fmt.qmin - fmt.zero, fmt.qmax - fmt.zero)
        weighted = weight * codes
        square = np.sum(weighted * codes, axis=1, dtype=np.float64)
        product = np.sum(weighted * values, axis=1, dtype=np.float64)
        usable = (square > 0) & (product != 0)
        scale = np.where(usable, product / np.where(square > 0, square, 1), best)
        error = _weighted_error(values, fmt, scale, weight)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return replace(start, scale=groups.to_param(best.astype(np.float32)))


def _weighted_error(values: Float32, fmt: IntFormat, scale: Float64, weight: Array) -> Float64:
    column = scale.astype(np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(np.rint(values / column), fmt.qmin - fmt.zero, fmt.qmax - fmt.zero)
    delta = codes * column - values
    error = np.sum(weight * delta * delta, axis=1, dtype=np.float64)
    return np.where(np.isfinite(error), error, np.inf)


def _grouped(importance: Array, W: Float32, granularity: Granularity) -> Float32:
    """``importance [K]`` in the rows of the groups of W."""
    wide = np.broadcast_to(np.asarray(importance, np.float32), W.shape)
    return np.asarray(granularity.split(wide).values)


def _search(
    W: Float32,
    fmt: Format,
    granularity: Granularity,
    error: Error,
    factors: Sequence[float],
) -> Params:
    """For each group, the candidate of least error; the earlier factor on a tie."""
    base = fmt.params(W, granularity)
    groups = granularity.split(W)
    best, least = base, np.full(groups.values.shape[0], np.inf)
    for factor in factors:
        candidate = _shrunk(fmt, base, groups, factor)
        values = fmt.decode(fmt.encode(W, candidate), candidate)
        loss = error(granularity.split(values - W).values)
        better = loss < least
        least = np.where(better, loss, least)
        best = _merged(best, candidate, groups, better)
    return best


def _shrunk(fmt: Format, base: Params, groups: Groups, factor: float) -> Params:
    """``base`` for ranges times ``factor``."""
    if isinstance(fmt, IntFormat) and not fmt.symmetric:
        lo = factor * groups.values.min(axis=1, initial=0).astype(np.float64)
        hi = factor * groups.values.max(axis=1, initial=0).astype(np.float64)
        scale, zero = affine(lo, hi, fmt, symmetric=False)
        return replace(base, scale=groups.to_param(scale), zero_point=groups.to_param(zero))
    if isinstance(fmt, MxFormat):
        codes = base.scale.view(np.uint8).astype(np.int16) + round(np.log2(factor))
        bounded = np.clip(codes, 0, 254).astype(np.uint8)
        return replace(base, scale=bounded.view(ml_dtypes.float8_e8m0fnu))
    scale = base.scale.astype(np.float32) * np.float32(factor)
    if isinstance(fmt, NvFp4Format):
        scale = np.minimum(scale, np.float32(NAMED_FLOATS["fp8e4m3"].max))
    return replace(base, scale=scale.astype(base.scale.dtype))


def _merged(old: Params, new: Params, groups: Groups, better: Array) -> Params:
    mask = groups.to_param(better)
    zero = old.zero_point
    if zero is not None and new.zero_point is not None:
        zero = np.where(mask, new.zero_point, zero).astype(zero.dtype)
    return replace(old, scale=np.where(mask, new.scale, old.scale), zero_point=zero)
