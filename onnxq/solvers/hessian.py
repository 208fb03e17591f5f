"""Second moments of a layer's inputs, and their factors.

``H = X X'``, up to a factor, for inputs ``X [K, T]``: damped by a part of its mean diagonal, and
factored so that ``inv(H) = U' U`` with U upper triangular (GPTQ, Frantar et al., arXiv 2210.17323).
The passes sum it up, in float64 and sample by sample.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from onnxq.errors import DataError
from onnxq.solvers.grid import Array, Float64

DAMP = 0.01
DAMP_GROWTH = 10.0
MAX_DAMP = 10.0


def check_hessian(H: Array, K: int) -> Float64:
    """``H`` as float64.

    Raises:
        DataError: not ``[K, K]``, or NaN or Inf in it.
    """
    if H.shape != (K, K):
        raise DataError(
            "DATA-SHAPE",
            f"a Hessian of shape {list(H.shape)} for {K} input channels",
            "accumulate it from inputs of this layer",
        )
    wide = np.asarray(H, np.float64)
    if not np.isfinite(wide).all():
        raise DataError("DATA-NOT-FINITE", "NaN or Inf in the Hessian", "check the inputs")
    return wide


def inverse_factor(H: Float64, damp: float = DAMP) -> tuple[Float64, float]:
    """U upper triangular with ``U' U = inv(H + d mean(diag H) I)``, and the damping d in use.

    The reversed matrix is factored: with R upper and ``H = R R'``, ``U = inv(R)``; the inverse of H
    itself is never formed. If that fails, the damping grows tenfold and it is tried again.

    Raises:
        DataError: not positive definite at any damping up to 10.
    """
    mean = float(np.mean(np.diag(H)))
    current = damp
    while current <= MAX_DAMP:
        damped = H + np.eye(len(H)) * (current * mean)
        lower, info = lapack.dpotrf(damped[::-1, ::-1], lower=1, clean=1)
        if info == 0:
            inverse, info = lapack.dtrtri(lower[::-1, ::-1], lower=0)
            if info == 0 and np.isfinite(inverse).all():
                return np.triu(inverse), current
        current = max(current, 1e-6) * DAMP_GROWTH
    raise DataError(
        "DATA-HESSIAN",
        f"the Hessian is not positive definite, not even with {MAX_DAMP:g} times its mean "
        "diagonal added",
        "it must be a sum X X' of real inputs; recompute it",
    )


def output_error(W: Array, W_hat: Array, H: Array) -> float:
    """``||(W - W_hat) X||^2 / ||W X||^2`` from ``H``; 0 when W X is zero."""
    W64 = np.asarray(W, np.float64)
    delta = W64 - W_hat
    error, signal = np.sum((delta @ H) * delta), np.sum((W64 @ H) * W64)
    return float(error / signal) if signal > 0 else 0.0
