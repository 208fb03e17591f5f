"""HQQ: zero points that suit most weights and let outliers go, without data.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). Minimises
``sum |w - s (q - z)|^p`` with p = 0.7 over real zero points, by turns:

    e <- sign(r) max(|r| - |r|^(p-1) / beta, 0),   r = w - s (q - z)
    z <- mean(q - (w - e) / s),                    beta <- 1.01 beta

Zero points stay real: ``MatMulNBits`` takes them as floats. Two things differ from the published
method. Each group stops for itself, when its p-norm has risen (there: all together, by the mean
magnitude). And besides the range [min, max] the affine range, which has zero on the grid and suits
heavy tails, is tried as a start; each group keeps the better. So no group ends worse than by RTN.
"""

from __future__ import annotations

import numpy as np

from onnxq.errors import UnsupportedError
from onnxq.formats import Format, Groups, IntFormat, Params
from onnxq.solvers.grid import Array, Float32, Float64, Solution, check_weights, granularity_of

NORM = 0.7
BETA = 10.0
BETA_GROWTH = 1.01
ITERATIONS = 20


def hqq(
    W: Array,
    fmt: Format,
    *,
    group: int | None = None,
    norm: float = NORM,
    beta: float = BETA,
    iterations: int = ITERATIONS,
) -> Solution:
    """Weights rounded with HQQ's real zero points (``params.zero_point`` is float32).

    Raises:
        DataError: NaN or Inf in W.
        UnsupportedError: not an integer format with the ``asym`` scheme.
    """
    if not isinstance(fmt, IntFormat) or fmt.symmetric:
        raise UnsupportedError(
            "UNSUPPORTED-GRID",
            f"HQQ needs an asymmetric integer format, not {fmt}",
            "use for example uint4g64 or int4g64asym",
        )
    weights = check_weights(W)
    granularity = granularity_of(fmt, group)
    groups = granularity.split(weights)
    valid = np.ones(1, np.float32) if groups.valid is None else groups.valid.astype(np.float32)
    starts = [_range_start(groups, fmt), _affine_start(groups, weights, fmt)]
    ends = [
        _descend(groups.values, valid, fmt, scale, zero, norm, beta, iterations)
        for scale, zero in starts
    ]
    affine = ends[1][1] < ends[0][1]
    scale = np.where(affine, starts[1][0], starts[0][0])[:, 0]
    zero = np.where(affine, ends[1][0], ends[0][0])[:, 0]
    params = Params(granularity, groups.to_param(scale), groups.to_param(zero))
    return Solution(fmt, fmt.encode(weights, params), params)


def _p_norm(magnitude: Float32, norm: float) -> Float64:
    """``sum |x|^p`` of each row, ``[G, 1]``."""
    powered = magnitude ** np.float32(norm)
    return np.asarray(powered.sum(axis=1, keepdims=True, dtype=np.float64))


def _range_start(groups: Groups, fmt: IntFormat) -> tuple[Float32, Float32]:
    """Scale and real zero point ``[G, 1]`` of [min, max]."""
    present = np.True_ if groups.valid is None else groups.valid
    low = groups.values.min(axis=1, keepdims=True, where=present, initial=np.inf)
    high = groups.values.max(axis=1, keepdims=True, where=present, initial=-np.inf)
    span = (high - low) / np.float32(fmt.qmax - fmt.qmin)
    tiny = np.finfo(np.float32).smallest_normal
    # A constant group has no span: one step to its value keeps it exact.
    step = np.where(np.abs(high) > tiny, np.abs(high), np.float32(1))
    scale = np.where(span > tiny, span, step).astype(np.float32)
    zero = np.where(span > tiny, fmt.qmin - low / scale, fmt.qmin + (high < 0))
    return scale, zero.astype(np.float32)


def _affine_start(groups: Groups, W: Float32, fmt: IntFormat) -> tuple[Float32, Float32]:
    """Scale and zero point ``[G, 1]`` of the affine format."""
    params = fmt.params(W, groups.granularity)
    assert params.zero_point is not None
    return groups.from_param(params.scale), groups.from_param(params.zero_point.astype(np.float32))


def _residual(values: Float32, fmt: IntFormat, scale: Float32, zero: Float32) -> Float32:
    codes = np.clip(np.rint(values / scale + zero), fmt.qmin, fmt.qmax)
    return np.asarray(values - (codes - zero) * scale)


def _descend(
    values: Float32,
    valid: Float32,
    fmt: IntFormat,
    scale: Float32,
    zero: Float32,
    norm: float,
    beta: float,
    iterations: int,
) -> tuple[Float32, Float64]:
    """Zero points ``[G, 1]`` of the least p-norm on the way, and that p-norm."""
    count = np.broadcast_to(valid, values.shape).sum(axis=1, keepdims=True)
    best, least = zero, np.full(zero.shape, np.inf)
    running = np.ones(zero.shape, np.bool_)
    for _ in range(iterations + 1):
        residual = _residual(values, fmt, scale, zero)
        magnitude = np.abs(residual)
        error = _p_norm(magnitude * valid, norm)
        running &= error < least
        if not running.any():
            break
        best, least = np.where(running, zero, best), np.where(running, error, least)
        with np.errstate(divide="ignore"):
            shrunk = np.maximum(magnitude - magnitude ** np.float32(norm - 1) / beta, 0)
        codes = np.rint((values - residual) / scale + zero)
        kept = values - np.sign(residual) * shrunk
        moved = ((codes - kept / scale) * valid).sum(axis=1, keepdims=True) / count
        zero = moved.astype(np.float32)
        beta *= BETA_GROWTH
    return best, least
