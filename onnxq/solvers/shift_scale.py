"""Outlier Suppression+: centre each channel, then shrink the channels that reach beyond a limit.

Wei et al., arXiv 2304.09145, section 4. With channel extremes ``lo_j`` and ``hi_j``::

    z_j = (hi_j + lo_j) / 2                   shift: every channel becomes symmetric about zero
    s_j = max(1, (hi_j - z_j) / t)            scale: no channel reaches beyond t
    x W + b = ((x - z) / s)(diag(s) W) + (b + z W)

One threshold t is searched for each site, from the largest channel downwards. The paper steps t
evenly and measures the error of a whole attention block; here t falls by a quarter of an octave a
step, and the error is that of the quantized layers that read x, taken on rows that did not set the
range (two-fold, as in :mod:`onnxq.solvers.smooth`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.formats import IntFormat, affine_params, dequantize, quantize

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

STEPS = 24
"""Thresholds below the largest channel, a quarter of an octave apart: down to a 64th."""

_MAX_ROWS = 192


@dataclass(frozen=True)
class ShiftScale:
    """A choice for one site.

    Attributes:
        shift: z ``[K]`` float64.
        scale: s ``[K]`` float64, at least 1.
        gain_db: by how much the squared error of the quantized product falls on unseen rows; 0 if
            the site is best left alone (then z is 0 and s is 1).
    """

    shift: Float64
    scale: Float64
    gain_db: float

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be changed."""
        return not self.shift.any() and bool((self.scale == 1.0).all())


def centre(lo: npt.ArrayLike, hi: npt.ArrayLike) -> Float64:
    """``z = (hi + lo) / 2``."""
    return np.asarray((np.asarray(hi, np.float64) + np.asarray(lo, np.float64)) / 2, np.float64)


def limit(lo: npt.ArrayLike, hi: npt.ArrayLike, threshold: float) -> Float64:
    """``s_j = max(1, hi_j / t, lo_j / -t)``."""
    reach = np.maximum(np.asarray(hi, np.float64), -np.asarray(lo, np.float64))
    return np.asarray(np.maximum(1.0, reach / threshold), np.float64)


def search_shift_scale(
    rows: Float32,
    lo: npt.ArrayLike,
    hi: npt.ArrayLike,
    weight: Float32,
    *,
    may_shift: bool,
    activation: IntFormat,
    weight_format: IntFormat,
) -> ShiftScale:
    """Shift and scale with the least error of ``Q((x - z)/s) Q(diag(s) W)``.

    Args:
        rows: ``[R, K]`` rows of x, in the order of the samples.
        lo: ``[K]`` least value of each channel over all samples.
        hi: ``[K]`` its largest value.
        weight: ``[K, N]`` the readers' weights side by side.
        may_shift: whether the writer can take z; else z is 0.
        activation: format of x, one scale for all of it.
        weight_format: format of the weights, symmetric with one scale a column.
    """
    least = np.asarray(lo, np.float64)
    most = np.asarray(hi, np.float64)
    options: list[tuple[bool, float | None]] = [(False, None)]
    for shifts in (False, True) if may_shift else (False,):
        options += [(shifts, 2.0 ** (-step / 4)) for step in range(STEPS + 1)]
    half = len(rows) // 2
    errors = np.zeros(len(options))
    for fit, held in ((rows[:half], rows[half:]), (rows[half:], rows[:half])):
        seen = held[np.linspace(0, len(held) - 1, min(_MAX_ROWS, len(held))).astype(int)]
        exact = seen @ weight
        for number, option in enumerate(options):
            z, s = _params(fit.min(axis=0), fit.max(axis=0), *option)
            errors[number] += _error(
                (fit - z) / s,
                (seen - z) / s,
                weight * s[:, None],
                exact - z @ weight,
                activation,
                weight_format,
            )
    best = int(errors.argmin())
    shift, scale = _params(least, most, *options[best])
    gain = 10 * np.log10(errors[0] / errors[best]) if errors[best] > 0 else 0.0
    return ShiftScale(shift, scale, float(gain))


def _params(
    lo: npt.ArrayLike, hi: npt.ArrayLike, shifts: bool, share: float | None
) -> tuple[Float64, Float64]:
    """Z and s for a threshold of ``share`` times the largest channel; None: leave alone."""
    low, high = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    z = centre(low, high) if shifts else np.zeros_like(low)
    if share is None:
        return z, np.ones_like(low)
    low, high = low - z, high - z
    largest = float(np.maximum(high, -low).max())
    return z, limit(low, high, share * largest) if largest > 0 else np.ones_like(low)


def _error(
    fit: npt.NDArray[np.floating],
    seen: npt.NDArray[np.floating],
    weight: npt.NDArray[np.floating],
    exact: npt.NDArray[np.floating],
    activation: IntFormat,
    weight_format: IntFormat,
) -> float:
    """Squared error of the quantized product on ``seen``, with the range taken from ``fit``."""
    scale, zero = affine_params(fit.min(), fit.max(), activation, symmetric=False)
    codes = quantize(seen.astype(np.float32), scale, zero, activation)
    columns = weight.astype(np.float32)
    wscale, wzero = affine_params(
        columns.min(axis=0), columns.max(axis=0), weight_format, symmetric=True
    )
    w = dequantize(quantize(columns, wscale, wzero, weight_format, axis=1), wscale, wzero, axis=1)
    return float(np.square(dequantize(codes, scale, zero) @ w - exact, dtype=np.float64).sum())
