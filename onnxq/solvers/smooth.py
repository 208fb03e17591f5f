"""Per-channel smoothing scales: move the range of activations into the weights.

``x W = (x / s) (diag(s) W)`` for any ``s > 0``. SmoothQuant (Xiao et al., arXiv 2211.10438, eq. 4)
takes ``s_j = amax_j^alpha / wmax_j^(1 - alpha)`` with one alpha for the whole model. Two things are
added here. Channels that hardly fired on the calibration rows get the median channel's maximum as a
floor, for a small maximum of few rows is an accident and not a property. And alpha is searched for
each site by two-fold cross-validation: scales and range come from one half of the rows, the error
of the quantized product is measured on the other, so that the choice holds on rows never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq.formats import Granularity, IntFormat, affine_params, dequantize, quantize

Float = npt.NDArray[np.float32]

ALPHAS = (0.3, 0.45, 0.6, 0.7, 0.8, 0.9)
"""Candidates that the search tries besides leaving the site as it is."""

ROTATED_ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.75)
"""Candidates in front of a rotation; 0.5 of root mean squares is its closed optimum."""

Measure = Literal["amax", "rms"]

MIN_ROWS = 4
"""Fewer rows than this say nothing about rows never seen: the site is left alone."""

MAX_ROWS = 192
"""Rows per fold on which the error is measured."""


@dataclass(frozen=True)
class Smoothing:
    """A choice for one site.

    Args:
        scale: ``s``, [K] float32, geometric mean 1; all ones if the site is best left alone.
        alpha: the exponent it came from, or None if the site is best left alone.
        gain_db: by how much the error of the quantized product falls on unseen rows.
    """

    scale: Float
    alpha: float | None
    gain_db: float


@dataclass(frozen=True)
class RotatedSmoothing:
    """A choice for one site in front of a rotation.

    Args:
        scale: ``s``, [K] float32, geometric mean 1.
        alpha: the exponent it came from, or None if no scale is best.
        measure: of channels, ``amax`` or ``rms``.
        gain_db: by how much the error falls on unseen rows, against the rotation alone.
    """

    scale: Float
    alpha: float | None
    measure: str
    gain_db: float


def smoothing_scale(amax: Float, wmax: Float, alpha: float) -> Float:
    """``s_j = max(amax_j, median amax)^alpha / wmax_j^(1 - alpha)``, geometric mean 1.

    Args:
        amax: [K] largest ``|x|`` of each input channel.
        wmax: [K] largest ``|W|`` of each input channel over all readers.
        alpha: 0 leaves activations alone, 1 gives every channel the same range.
    """
    amax64, wmax64 = np.asarray(amax, np.float64), np.asarray(wmax, np.float64)
    floor = np.median(amax64)
    amax64 = np.maximum(amax64, floor if floor > 0 else 1.0)
    wmax64 = np.maximum(wmax64, 1e-5)
    log_s = alpha * np.log(amax64) - (1 - alpha) * np.log(wmax64)
    scale: Float = np.exp(log_s - log_s.mean()).astype(np.float32)
    return scale


def search_smoothing(
    rows: Float,
    amax: Float,
    weight: Float,
    activation: IntFormat,
    weight_format: IntFormat,
    alphas: Sequence[float] = ALPHAS,
) -> Smoothing:
    """The alpha with the least cross-validated error of ``Q(x/s) Q(diag(s) W)``.

    Args:
        rows: [R, K] rows of the activation in the order of the samples, so that the two halves
            come from different samples.
        amax: [K] largest ``|x|`` of each channel over all samples, for the final scale.
        weight: [K, N] the readers' weights side by side.
        activation: format of the activation, one scale for all of it.
        weight_format: format of the weights, symmetric with one scale a column.
        alphas: candidates; leaving the site alone is always one more.
    """
    if len(rows) < MIN_ROWS:
        return Smoothing(np.ones_like(amax), None, 0.0)
    wmax = np.abs(weight).max(axis=1)
    half = len(rows) // 2
    folds = ((rows[:half], rows[half:]), (rows[half:], rows[:half]))
    errors = dict.fromkeys((None, *alphas), 0.0)
    for fit, held in folds:
        seen = held[np.linspace(0, len(held) - 1, min(MAX_ROWS, len(held))).astype(int)]
        exact = seen @ weight
        for alpha in errors:
            scale = _scale_of(np.abs(fit).max(axis=0), wmax, alpha)
            errors[alpha] += _product_error(
                fit / scale, seen / scale, weight * scale[:, None], exact, activation, weight_format
            )
    best = min(errors, key=lambda alpha: errors[alpha])
    gain = 10 * np.log10(errors[None] / errors[best]) if errors[best] > 0 else 0.0
    return Smoothing(_scale_of(amax, wmax, best), best, float(gain))


def search_rotated_smoothing(
    rows: Float,
    weight: Float,
    rotate: Callable[[Float], Float],
    activation: IntFormat,
    weight_format: IntFormat,
    alphas: Sequence[float] = ROTATED_ALPHAS,
) -> RotatedSmoothing:
    """The scale before a rotation with the least error of ``Q(x/s R) Q(R' diag(s) W)`` behind it.

    A rotation spreads what it gets, so the steps behind it follow the size of whole rows and not
    of the largest channel: the error is about ``sum_j E[x_j^2] / s_j^2 * sum_j |w_j|^2 s_j^2``,
    least (Cauchy-Schwarz) at ``s_j^2 = rms(x_j) / |w_j|``. Massive tokens make the maxima of
    SmoothQuant's rule another good guess (SmoothRot, Czako et al., arXiv 2506.05413). Both are
    tried at every alpha, scales from one half of the rows, errors from the other; errors count
    relative to the size of their row.

    Args:
        rows: [R, K] rows of the activation.
        weight: [K, N].
        rotate: ``x R`` for rows ``[..., K]``; R orthogonal.
        activation: format of a rotated row, one scale each.
        weight_format: format of the rotated weight, one scale a column.
        alphas: candidates; no scale at all is always one more.
    """
    if len(rows) < MIN_ROWS:
        return RotatedSmoothing(np.ones(rows.shape[1], np.float32), None, "", 0.0)
    half = len(rows) // 2
    errors: dict[tuple[float | None, Measure], float] = {(None, "amax"): 0.0}
    errors.update({(alpha, measure): 0.0 for alpha in alphas for measure in ("amax", "rms")})
    for fit, held in ((rows[:half], rows[half:]), (rows[half:], rows[:half])):
        seen = held[np.linspace(0, len(held) - 1, min(MAX_ROWS, len(held))).astype(int)]
        exact = seen @ weight
        size = np.maximum(np.square(exact).sum(axis=1), np.finfo(np.float32).tiny)
        for alpha, measure in errors:
            scale = _measured_scale(fit, weight, alpha, measure)
            left, right = rotate(seen / scale), rotate((weight * scale[:, None]).T)
            product = _fake(left, activation) @ _fake(right, weight_format).T
            error = np.square(product - exact).sum(axis=1) / size
            errors[alpha, measure] += float(error.sum(dtype=np.float64))
    best = min(errors, key=lambda choice: errors[choice])
    gain = 10 * np.log10(errors[None, "amax"] / errors[best]) if errors[best] > 0 else 0.0
    alpha, measure = best
    return RotatedSmoothing(
        _measured_scale(rows, weight, alpha, measure), alpha, measure, float(gain)
    )


def _measured_scale(rows: Float, weight: Float, alpha: float | None, measure: Measure) -> Float:
    if alpha is None:
        return np.ones(rows.shape[1], np.float32)
    if measure == "amax":
        return smoothing_scale(np.abs(rows).max(axis=0), np.abs(weight).max(axis=1), alpha)
    return smoothing_scale(
        np.sqrt(np.square(rows, dtype=np.float64).mean(axis=0)).astype(np.float32),
        np.linalg.norm(weight, axis=1).astype(np.float32),
        alpha,
    )


def _fake(rows: Float, fmt: IntFormat) -> Float:
    return fmt.fake_quant(rows, Granularity.per_channel(0))


def _scale_of(amax: Float, wmax: Float, alpha: float | None) -> Float:
    return np.ones_like(amax) if alpha is None else smoothing_scale(amax, wmax, alpha)


def _product_error(
    fit: Float,
    seen: Float,
    weight: Float,
    exact: Float,
    activation: IntFormat,
    weight_format: IntFormat,
) -> float:
    """Squared error of the quantized product on ``seen``, with the range taken from ``fit``."""
    scale, zero = affine_params(fit.min(), fit.max(), activation, symmetric=False)
    x = dequantize(quantize(seen, scale, zero, activation), scale, zero)
    wscale, wzero = affine_params(
        weight.min(axis=0), weight.max(axis=0), weight_format, symmetric=True
    )
    w = dequantize(quantize(weight, wscale, wzero, weight_format, axis=1), wscale, wzero, axis=1)
    return float(np.square(x @ w - exact, dtype=np.float64).sum())
