"""HQQ: zero points that suit most weights and let outliers go, without data.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). Minimises
``sum |w - s (q - z)|^p`` with p = 0.7 over real zero points, by turns:

    e <- sign(r) max(|r| - |r|^(p-1) / beta, 0),   r = w - s (q - z)
    z <- mean(q - (w - e) / s),                    beta <- 1.01 beta

Each group keeps the zero point of its least mean ``|r|`` and stops when that has risen. Zero points
stay real: ``MatMulNBits`` takes them as floats.
"""

from __future__ import annotations

import numpy as np

from onnxq.errors import UnsupportedError
from onnxq.formats import Format, IntFormat, Params
from onnxq.solvers.grid import Array, Solution, check_weights, granularity_of

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
    values = groups.values
    valid = np.ones(values.shape, np.float32) if groups.valid is None else groups.valid
    count = valid.sum(axis=1, keepdims=True)
    low = values.min(axis=1, keepdims=True, where=valid > 0, initial=np.inf)
    high = values.max(axis=1, keepdims=True, where=valid > 0, initial=-np.inf)
    span = (high - low) / np.float32(fmt.qmax - fmt.qmin)
    tiny = np.finfo(np.float32).smallest_normal
    # A constant group has no span: one step to its value keeps it exact.
    scale = np.where(span > tiny, span, np.where(np.abs(high) > tiny, np.abs(high), 1))
    scale = scale.astype(np.float32)
    zero = np.where(span > tiny, fmt.qmin - low / scale, fmt.qmin + (high < 0)).astype(np.float32)

    best, least = zero, np.full(zero.shape, np.inf, np.float32)
    running = np.ones(zero.shape, np.bool_)
    for _ in range(iterations + 1):
        codes = np.clip(np.rint(values / scale + zero), fmt.qmin, fmt.qmax)
        residual = values - (codes - zero) * scale
        error = (np.abs(residual) * valid).sum(axis=1, keepdims=True) / count
        running &= error < least
        if not running.any():
            break
        best, least = np.where(running, zero, best), np.where(running, error, least)
        magnitude = np.abs(residual)
        with np.errstate(divide="ignore"):
            shrunk = np.maximum(magnitude - magnitude ** np.float32(norm - 1) / beta, 0)
        kept = values - np.sign(residual) * shrunk
        zero = ((codes - kept / scale) * valid).sum(axis=1, keepdims=True) / count
        beta *= BETA_GROWTH
    params = Params(
        granularity,
        groups.to_param(scale[:, 0]),
        groups.to_param(best[:, 0].astype(np.float32)),
    )
    return Solution(fmt, fmt.encode(weights, params), params)
