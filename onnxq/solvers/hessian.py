"""Second moments of a layer's inputs, and their factors.

``H = 2/T X X'`` for inputs ``X [K, T]``. Accumulated in float64 batch by batch, damped by a part of
its mean diagonal, and factored so that ``inv(H) = U' U`` with U upper triangular (GPTQ, Frantar et
al., arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack

from onnxq.errors import DataError
from onnxq.solvers.grid import Array, Float64

DAMP = 0.01
DAMP_GROWTH = 10.0
MAX_DAMP = 10.0


@dataclass
class HessianSum:
    """Running ``2/T X X'`` over batches ``[T_b, K]``; optionally ``G = 2/T X Y'`` beside it."""

    total: Float64 | None = None
    samples: int = 0

    def add(self, batch: Array, other: Array | None = None) -> None:
        """Add rows of inputs: ``batch' @ other`` (``other`` defaults to ``batch``).

        Raises:
            DataError: NaN or Inf in the batch.
        """
        rows = np.asarray(batch, np.float32).reshape(-1, batch.shape[-1])
        right = rows if other is None else np.asarray(other, np.float32).reshape(rows.shape)
        product = (rows.T @ right).astype(np.float64)
        if not np.isfinite(product).all():
            raise DataError(
                "DATA-NOT-FINITE",
                "NaN, Inf or overflow in the calibration inputs of a layer",
                "check the calibration data and the model's activations",
            )
        self.total = product if self.total is None else self.total + product
        self.samples += rows.shape[0]

    def result(self) -> Float64:
        """``2/T`` times the sum.

        Raises:
            DataError: nothing was added.
        """
        if self.total is None or not self.samples:
            raise DataError("DATA-EMPTY", "no calibration inputs", "pass at least one batch")
        return self.total * (2.0 / self.samples)


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
