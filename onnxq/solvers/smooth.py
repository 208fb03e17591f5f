"""Per-channel smoothing scales: move the range of activations into the weights.

``x W = (x / s) (diag(s) W)`` for any ``s > 0``. SmoothQuant (Xiao et al., arXiv 2211.10438, eq. 4)
takes ``s_j = amax_j^alpha / wmax_j^(1 - alpha)`` with one alpha for the whole model. Two things are
added here. Channels that hardly fired on the calibration rows get the median channel's maximum as a
floor, for a small maximum of few rows is an accident and not a property. And alpha is searched for
each site by two-fold cross-validation: scales and range come from one half of the rows, the error
of the quantized product is measured on the other, so that the choice holds on rows never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.formats import IntFormat, affine_params, dequantize, quantize

Float = npt.NDArray[np.float32]

ALPHAS = (0.3, 0.45, 0.6, 0.7, 0.8, 0.9)
"""Candidates that the search tries besides leaving the site as it is."""

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
