"""MagR: make weights smaller where the inputs do not notice, before rounding to few bits.

Zhang et al., arXiv 2406.00800. For each row, proximal gradient steps on
``1/2 (v - w) H (v - w)' + a |v|_inf``: ``v <- v - eta (v - w) H`` with ``eta = 1 / lambda_max``,
then ``v <- v - a P(v / a)`` with P the projection onto the unit L1 ball, which cuts the largest
magnitudes. ``a = alpha lambda_max / |H|_1``.
"""

from __future__ import annotations

import numpy as np

from onnxq.solvers.grid import Array, Float32, Float64, check_weights
from onnxq.solvers.hessian import check_hessian

STEPS = 200
ALPHA = 0.01


def magr(W: Array, H: Array, *, alpha: float = ALPHA, steps: int = STEPS) -> Float32:
    """W with smaller extremes, ``[N, K]``.

    Args:
        W: ``[N, K]``.
        H: ``[K, K]``.
        alpha: strength; 0.01 to 0.1 are usual.
        steps: proximal gradient steps.

    Raises:
        DataError: NaN or Inf, or shapes that do not fit.
    """
    weights = check_weights(W).astype(np.float64)
    hessian = check_hessian(H, weights.shape[1])
    largest = float(np.linalg.eigvalsh(hessian)[-1])
    if largest <= 0 or alpha <= 0:
        return weights.astype(np.float32)
    penalty = alpha * largest / float(np.abs(hessian).sum(axis=0).max())
    current = weights.copy()
    for _ in range(steps):
        moved = current - (current - weights) @ hessian / largest
        current = moved - penalty * project_l1(moved / penalty)
    return current.astype(np.float32)


def project_l1(x: Float64) -> Float64:
    """The nearest point of the unit L1 ball for each row of ``x [N, K]`` (Duchi et al., 2008)."""
    magnitude = np.sort(np.abs(x), axis=1)[:, ::-1]
    excess = np.cumsum(magnitude, axis=1) - 1.0
    places = np.arange(1, x.shape[1] + 1)
    active = np.count_nonzero(magnitude * places > excess, axis=1)
    theta = excess[np.arange(len(x)), np.maximum(active, 1) - 1] / np.maximum(active, 1)
    inside = np.abs(x).sum(axis=1) <= 1.0
    cut = np.where(inside, 0.0, theta)[:, None]
    return np.asarray(np.sign(x) * np.maximum(np.abs(x) - cut, 0.0))
