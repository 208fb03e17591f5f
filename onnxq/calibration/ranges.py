"""Clipping ranges, read off the statistics of an activation or off a weight.

All results contain zero (``lo <= 0 <= hi``); symmetric ones are ``(-a, a)``.

- ``minmax``: the extremes.
- ``moving-average``: the moving average of the extremes of each batch.
- ``percentile``: symmetric: the first bin edge below which ``percentile`` percent of ``|x|`` lie.
  Asymmetric: half of what is cut off at each end.
- ``entropy``: the range whose quantized histogram diverges least from the clipped one
  (Kullback-Leibler; Wu et al. 2020, arXiv 2004.09602, and TensorRT before it).
- ``mse``: the range with the least expected squared error, clipping and rounding together.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxq.calibration.statistics import BINS, Histogram, RangeStat
from onnxq.errors import DataError, InternalError, SpecError, UnsupportedError
from onnxq.formats.integer import IntFormat, affine_params

Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]
METHODS: tuple[str, ...] = ("minmax", "moving-average", "percentile", "entropy", "mse")

Array: TypeAlias = npt.NDArray[Any]
Float64: TypeAlias = npt.NDArray[np.float64]

_ZERO_BIN = BINS // 2
_ENTROPY_BINS = 2048
"""Most bins that the asymmetric entropy search looks at; its cost grows with their square."""
_ENTROPY_START = 128
"""The narrowest range that entropy considers, in bins, as in TensorRT's calibrator."""
_TIE = 1e-10
_MSE_STEPS = 96
_MSE_NARROWEST = 1 / 128
_MSE_ZERO_POINTS = 257
_BLOCK_ELEMENTS = 1 << 16


def choose_range(
    stat: Histogram | RangeStat,
    method: Method,
    fmt: IntFormat,
    *,
    symmetric: bool = False,
    percentile: float = 99.99,
) -> tuple[float, float]:
    """The range of an activation that the codes of ``fmt`` should cover.

    Args:
        stat: a histogram, or for ``minmax`` and ``moving-average`` a range.
        method: see the module's description.
        fmt: the format; entropy and mse depend on its number of codes.
        symmetric: the zero point is fixed; the result is ``(-a, a)``.
        percentile: share of elements to keep, in percent.

    Raises:
        DataError: RANGE-EMPTY when the statistic saw no element.
        InternalError: RANGE-STATISTIC when the method needs another kind of statistic.
        SpecError: RANGE-METHOD or RANGE-PERCENTILE.
    """
    _check(method, percentile)
    if stat.empty:
        raise DataError(
            "RANGE-EMPTY",
            "a range was asked of a value of which no finite element was seen",
            "calibrate with samples that reach it",
        )
    if isinstance(stat, RangeStat):
        if method not in ("minmax", "moving-average"):
            raise InternalError("RANGE-STATISTIC", f"method {method} needs a histogram")
        bounds = (stat.lo, stat.hi) if method == "minmax" else stat.moving
    elif method == "minmax":
        bounds = (stat.lo, stat.hi)
    elif method == "percentile":
        bounds = _percentile(stat, percentile, symmetric)
    elif method == "entropy":
        bounds = _entropy_symmetric(stat, fmt) if symmetric else _entropy(stat, fmt)
    elif method == "mse":
        bounds = _mse(stat, fmt, symmetric)
    else:
        raise InternalError("RANGE-STATISTIC", "the moving average needs a range statistic")
    return _finish(*bounds, symmetric)


def _check(method: str, percentile: float) -> None:
    if method not in METHODS:
        raise SpecError(
            "RANGE-METHOD",
            f"there is no calibration method `{method}`",
            f"use {', '.join(METHODS)}",
        )
    if not 0 < percentile <= 100:
        raise SpecError(
            "RANGE-PERCENTILE", f"percentile={percentile} is not in (0, 100]", "99.9 is usual"
        )


def _finish(lo: float, hi: float, symmetric: bool) -> tuple[float, float]:
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    if symmetric:
        hi = max(-lo, hi)
        lo = -hi
    return lo, hi


def _folded(stat: Histogram) -> npt.NDArray[np.int64]:
    """``[n]`` counts of ``|x|`` in bins of the same width, cut after the last filled one."""
    counts = stat.counts[_ZERO_BIN:] + stat.counts[:_ZERO_BIN][::-1]
    used = np.flatnonzero(counts)
    return counts[: used[-1] + 1]


def _percentile(stat: Histogram, percentile: float, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        cdf = np.cumsum(_folded(stat))
        index = int(np.searchsorted(cdf, percentile / 100 * cdf[-1]))
        amax = min((index + 1) * stat.width, max(-stat.lo, stat.hi))
        return -amax, amax
    cut = (100 - percentile) / 200
    cdf = np.cumsum(stat.counts)
    first = int(np.searchsorted(cdf, cut * cdf[-1], side="right"))
    last = int(np.searchsorted(cdf, (1 - cut) * cdf[-1]))
    return (
        max(stat.lo_edge + first * stat.width, stat.lo),
        min(stat.lo_edge + (last + 1) * stat.width, stat.hi),
    )


def _entropy_symmetric(stat: Histogram, fmt: IntFormat) -> tuple[float, float]:
    """The rule of Wu et al. on the histogram of ``|x|``, with ``2**(bits - 1)`` levels."""
    counts = _folded(stat).astype(np.float64)
    counts[0] = counts[min(1, len(counts) - 1)]
    best = _least_divergence(counts, 0.0, 1 << (fmt.bits - 1))
    amax = max(-stat.lo, stat.hi)
    if best < len(counts):
        amax = min(amax, best * stat.width)
    return -amax, amax


def _entropy(stat: Histogram, fmt: IntFormat) -> tuple[float, float]:
    """Both ends independently: the upper with all of the lower side kept, then the lower."""
    counts, width, zero = _coarsened(stat)
    levels = (1 << fmt.bits) - 1
    if zero < len(counts):
        counts[zero] = counts[min(zero + 1, len(counts) - 1)]
    # Candidates end at or above zero, so the part below zero is never cut by the upper end.
    stop = _least_divergence(counts, 0.0, levels, first=zero + 1)
    above = float(counts[stop:].sum())
    flipped = counts[:stop][::-1]
    start = stop - _least_divergence(flipped, above, levels, first=stop - zero)
    lo = stat.lo if start == 0 else max(stat.lo, (start - zero) * width)
    hi = stat.hi if stop == len(counts) else min(stat.hi, (stop - zero) * width)
    return lo, hi


def _coarsened(stat: Histogram) -> tuple[Float64, float, int]:
    """Counts of at most _ENTROPY_BINS bins that cover zero, their width and the index of zero."""
    shift = 0
    used = np.flatnonzero(stat.counts) - _ZERO_BIN
    while max(used[-1] >> shift, 0) - min(used[0] >> shift, 0) >= _ENTROPY_BINS:
        shift += 1
    index = used >> shift
    base = min(int(index[0]), 0)
    counts = np.zeros(max(int(index[-1]), 0) - base + 1)
    np.add.at(counts, index - base, stat.counts[used + _ZERO_BIN].astype(np.float64))
    return counts, stat.width * 2.0**shift, -base


def _least_divergence(counts: Float64, before: float, levels: int, first: int = 0) -> int:
    """The number of bins to keep, ``counts[:i]``, with the least KL divergence.

    P is ``counts[:i]`` with what is cut off added to its last bin (and ``before``, cut off at
    the other end, to its first); Q is ``counts[:i]`` in ``levels`` groups of bins, the mass of
    each spread evenly over its bins that are not empty. Sums over a group are differences of
    cumulative sums, so that one candidate costs O(levels). Ties go to the widest range.

    Args:
        counts: ``[n]``.
        before: mass cut off before the first bin.
        levels: number of groups.
        first: least number of bins to keep, besides _ENTROPY_START and ``levels``.
    """
    n = len(counts)
    start = max(first, levels, _ENTROPY_START)
    if n <= start:
        return n
    total = counts.sum() + before
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    own = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])
    keep = np.arange(start, n + 1)
    # Group g of candidate i holds the bins k with g * i / levels <= k < (g + 1) * i / levels.
    edges = -(-np.arange(levels + 1)[None, :] * keep[:, None] // levels)
    group_mass = np.diff(mass[edges], axis=1)
    group_filled = np.diff(filled[edges], axis=1)
    level = np.log(
        np.divide(group_mass, group_filled, out=np.ones_like(group_mass), where=group_filled > 0)
    )
    kept, last, opening = mass[keep], counts[keep - 1], counts[0]
    cut = counts.sum() - kept
    p_log_p = own[keep] + _xlogx(last + cut) - _xlogx(last)
    p_log_q = (group_mass * level).sum(axis=1) + cut * level[:, -1]
    possible = (cut == 0) | (last > 0)
    if before:
        p_log_p += _xlogx(opening + before) - _xlogx(opening)
        p_log_q += before * level[:, 0]
        possible &= bool(opening > 0)
    with np.errstate(divide="ignore"):
        divergence = (p_log_p - p_log_q) / total - np.log(total) + np.log(kept)
    divergence[~possible | (kept <= 0)] = np.inf
    if not np.isfinite(divergence).any():
        return n
    return int(keep[np.flatnonzero(divergence <= divergence.min() + _TIE)[-1]])


def _xlogx(x: Array | float) -> Any:
    x = np.asarray(x, np.float64)
    return np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0)), 0.0)


def _mse(stat: Histogram, fmt: IntFormat, symmetric: bool) -> tuple[float, float]:
    """Least expected squared error over scales and zero points.

    Zero is a code, so the grid is ``s * k`` for integers ``k_lo <= k <= k_lo + 2**b - 1``
    whatever the zero point, and the rounding error up to x depends on s alone:

        C_s(x) = integral of density(t) * (t - s * rint(t / s))**2 from the left end to x
        error(s, k_lo) = C_s(hi) - C_s(lo) + integral outside of [lo, hi] of the clipping error

    with the density constant inside a bin. C_s is exact: the error of one cell is s**3 / 12.
    """
    search = _MseSearch(stat)
    steps = fmt.qmax - fmt.qmin
    if symmetric:
        widest = max(-stat.lo, stat.hi) / (fmt.qmax - fmt.zero)
        zero_points = np.array([fmt.qmin - fmt.zero])
    else:
        span = max(stat.hi, 0.0) - min(stat.lo, 0.0)
        if stat.lo >= 0 or stat.hi <= 0:
            widest = span / steps
            zero_points = np.array([0 if stat.lo >= 0 else -steps])
        else:
            # One step fewer, so that both ends fit at any place of zero in its cell.
            widest = span / max(1, steps - 1)
            places = np.linspace(-steps, 0, _MSE_ZERO_POINTS)
            zero_points = np.unique(np.rint(places).astype(np.int64))
    if widest <= 0:
        return stat.lo, stat.hi
    ratio = _MSE_NARROWEST ** (1 / (_MSE_STEPS - 1))
    scales = widest * ratio ** np.arange(_MSE_STEPS)
    best, zero_point = search.least(scales, zero_points, steps)
    fine = best * ratio ** np.linspace(-1, 1, 25)
    best, zero_point = search.least(fine[fine <= widest * (1 + 1e-12)], zero_points, steps)
    if symmetric:
        amax = best * (fmt.qmax - fmt.zero)
        return -amax, amax
    return best * zero_point, best * (zero_point + steps)


class _MseSearch:
    """Errors of many grids on one histogram; see :func:`_mse`."""

    def __init__(self, stat: Histogram) -> None:
        used = np.flatnonzero(stat.counts)
        counts = stat.counts[used[0] : used[-1] + 1].astype(np.float64)
        # In units of bins: edges are integers, and no power of a tiny or huge width occurs.
        self._unit = stat.width
        self._edges = np.arange(used[0], used[-1] + 2, dtype=np.float64) - _ZERO_BIN
        self._density = counts
        powers = [np.diff(_power(self._edges, k + 1)) / (k + 1) for k in range(3)]
        self._below = [np.concatenate([[0.0], np.cumsum(counts * part)]) for part in powers]

    def least(
        self, scales: Float64, zero_points: npt.NDArray[np.int64], steps: int
    ) -> tuple[float, int]:
        """The scale and lowest integer of the grid with the least error."""
        best = (np.inf, float(scales[0]), int(zero_points[0]))
        for scale in scales:
            s = float(scale) / self._unit
            lo, hi = (
                s * zero_points.astype(np.float64),
                s * (zero_points + steps).astype(np.float64),
            )
            errors = self._errors(s, lo, hi)
            index = int(np.argmin(errors))
            if errors[index] < best[0]:
                best = (float(errors[index]), float(scale), int(zero_points[index]))
        return best[1], best[2]

    def _errors(self, s: float, lo: Float64, hi: Float64) -> Float64:
        """Error of the grids ``[lo, hi]`` with step ``s``, in squared bins times elements."""
        cells = self._cell_integral(self._edges / s)
        rounding = np.concatenate([[0.0], np.cumsum(self._density * np.diff(cells))]) * s**3
        inside = self._at(hi, s, cells, rounding) - self._at(lo, s, cells, rounding)
        total = [part[-1] for part in self._below]
        lower, upper = self._moments(lo), self._moments(hi)
        above = [t - part for t, part in zip(total, upper, strict=True)]
        return inside + _squares(lower, lo) + _squares(above, hi)

    def _at(self, x: Float64, s: float, cells: Float64, rounding: Float64) -> Float64:
        """C_s at ``x``."""
        x, j = self._locate(x)
        return rounding[j] + self._density[j] * s**3 * (self._cell_integral(x / s) - cells[j])

    def _moments(self, x: Float64) -> list[Float64]:
        """Integrals of density, density * t and density * t**2 up to ``x``."""
        x, j = self._locate(x)
        edge = self._edges[j]
        return [
            part[j] + self._density[j] * (_power(x, k + 1) - _power(edge, k + 1)) / (k + 1)
            for k, part in enumerate(self._below)
        ]

    def _locate(self, x: Float64) -> tuple[Float64, npt.NDArray[np.int64]]:
        """``x`` moved into the histogram, and the bin it is in."""
        x = np.clip(x, self._edges[0], self._edges[-1])
        j = np.clip(np.floor(x - self._edges[0]).astype(np.int64), 0, len(self._density) - 1)
        return x, j

    @staticmethod
    def _cell_integral(u: Float64) -> Float64:
        """Integral of ``(t - rint(t))**2`` from 0 to ``u``."""
        cell = np.rint(u)
        rest = u - cell
        return np.asarray(cell / 12 + rest * rest * rest / 3)


def _power(x: Float64, k: int) -> Float64:
    """``x**k`` for k of 1 to 3 by multiplication, many times faster than ``pow``."""
    return x if k == 1 else x * _power(x, k - 1)


def _squares(moments: list[Float64], x: Float64) -> Float64:
    """Integral of ``density * (t - x)**2`` from the moments of a region."""
    return np.maximum(moments[2] - 2 * x * moments[1] + x * x * moments[0], 0.0)


def weight_range(
    weight: Array,
    axis: int | None,
    method: Method,
    fmt: IntFormat,
    *,
    symmetric: bool = True,
    percentile: float = 99.99,
    p: float = 2.4,
) -> tuple[Float64, Float64]:
    """The ranges of a weight, one per index of ``axis``.

    ``mse`` shrinks the extremes by a common factor of 1.00, 0.99, ..., 0.21 and keeps the one
    with the least ``sum |x_hat - x|**p`` (GPTQ's rule); a scan in steps of 0.05 finds the place
    and one in steps of 0.01 the factor.

    Args:
        weight: any shape, a float type.
        axis: the channel axis; None for one range of the whole weight.
        method: ``minmax``, ``percentile`` or ``mse``.
        fmt: the format.
        symmetric: the zero point is fixed; ranges are ``(-a, a)``.
        percentile: share of elements to keep in each channel, in percent.
        p: exponent of the error of ``mse``.

    Returns:
        lo, hi: ``[C]`` float64, or of shape ``[]`` without an axis.

    Raises:
        DataError: RANGE-NOT-FINITE for NaN or Inf in the weight.
        UnsupportedError: RANGE-WEIGHT-METHOD for a method that needs many batches or elements.
    """
    _check(method, percentile)
    if method in ("entropy", "moving-average"):
        raise UnsupportedError(
            "RANGE-WEIGHT-METHOD",
            f"method {method} is for activations: a weight's channel has too few elements",
            "use minmax, percentile or mse for weights",
        )
    rows = _as_rows(weight, axis)
    if not np.isfinite(rows).all():
        raise DataError(
            "RANGE-NOT-FINITE", "NaN or Inf in a weight", "repair the model: it cannot compute"
        )
    if method == "percentile":
        lo, hi = _weight_percentile(rows, percentile, symmetric)
    else:
        lo = rows.min(axis=1, initial=0).astype(np.float64)
        hi = rows.max(axis=1, initial=0).astype(np.float64)
    lo, hi = np.minimum(lo, 0.0), np.maximum(hi, 0.0)
    if symmetric:
        hi = np.maximum(-lo, hi)
        lo = -hi
    if method == "mse":
        factor = _best_shrink(rows, lo, hi, fmt, symmetric, p)
        lo, hi = lo * factor, hi * factor
    return (lo.reshape(()), hi.reshape(())) if axis is None else (lo, hi)


def _as_rows(weight: Array, axis: int | None) -> npt.NDArray[np.float32]:
    """``[C, elements of a channel]`` float32."""
    array = np.asarray(weight, np.float32)
    if axis is None:
        return array.reshape(1, -1)
    moved = np.moveaxis(array, axis, 0)
    return np.ascontiguousarray(moved.reshape(moved.shape[0], -1))


def _weight_percentile(
    rows: npt.NDArray[np.float32], percentile: float, symmetric: bool
) -> tuple[Float64, Float64]:
    if symmetric:
        amax = np.percentile(np.abs(rows), percentile, axis=1, method="higher").astype(np.float64)
        return -amax, amax
    cut = (100 - percentile) / 2
    lo = np.percentile(rows, cut, axis=1, method="lower").astype(np.float64)
    hi = np.percentile(rows, 100 - cut, axis=1, method="higher").astype(np.float64)
    return lo, hi


def _best_shrink(
    rows: npt.NDArray[np.float32],
    lo: Float64,
    hi: Float64,
    fmt: IntFormat,
    symmetric: bool,
    p: float,
) -> Float64:
    """``[C]`` factors for ``lo`` and ``hi``."""
    factors = np.ones(len(rows))
    per_block = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, len(rows), per_block):
        part = slice(start, start + per_block)
        error = _ShrinkError(rows[part], lo[part], hi[part], fmt, symmetric, p)
        coarse = _argmin_factor(error, np.arange(100, 20, -5)[:, None] / 100)
        offsets = np.arange(4, -5, -1)[:, None] / 100
        factors[part] = _argmin_factor(error, np.clip(coarse + offsets, 0.21, 1.0))
    return factors


def _argmin_factor(error: _ShrinkError, candidates: Float64) -> Float64:
    """Per channel the first of the ``candidates`` ``[n, 1 or C]`` with the least error."""
    errors = np.stack([error(np.broadcast_to(f, error.channels)) for f in candidates])
    chosen = np.argmin(errors, axis=0)
    full = np.broadcast_to(candidates, errors.shape)
    return np.asarray(np.take_along_axis(full, chosen[None, :], axis=0)[0])


class _ShrinkError:
    """``sum |x_hat - x|**p`` per channel when the range is shrunk by a factor per channel."""

    def __init__(
        self,
        rows: npt.NDArray[np.float32],
        lo: Float64,
        hi: Float64,
        fmt: IntFormat,
        symmetric: bool,
        p: float,
    ) -> None:
        self._rows, self._lo, self._hi = rows, lo, hi
        self._fmt, self._symmetric, self._p = fmt, symmetric, p
        self._work = np.empty_like(rows)
        self.channels = len(rows)

    def __call__(self, factor: Float64) -> Float64:
        scale, zero = affine_params(
            self._lo * factor, self._hi * factor, self._fmt, symmetric=self._symmetric
        )
        scale, offset = scale[:, None], zero.astype(np.float32)[:, None]
        work = self._work
        np.divide(self._rows, scale, out=work)
        np.rint(work, out=work)
        np.clip(work, self._fmt.qmin - offset, self._fmt.qmax - offset, out=work)
        work *= scale
        work -= self._rows
        np.abs(work, out=work)
        np.power(work, np.float32(self._p), out=work)
        return np.asarray(work.sum(axis=1, dtype=np.float64))
