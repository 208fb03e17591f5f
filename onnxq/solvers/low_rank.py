"""Low-rank branches: taken off before rounding (SVDQuant), or added after it (EoRA).

- ``low_rank_split`` (Li et al., arXiv 2411.05007): ``W = L R + residual`` with the truncated SVD of
  W; only the residual is rounded.
- ``low_rank_compensate`` (Liu et al., arXiv 2410.21271): for the error ``D = W - W_hat`` the best
  rank r in the norm of the inputs, ``min |(D - B A) X|``: with ``X X' = Q diag(l) Q'`` the
  truncated SVD of ``D Q sqrt(l)``, mapped back.
"""

from __future__ import annotations

import numpy as np

from onnxq.errors import SpecError
from onnxq.solvers.grid import Array, Float32, check_weights
from onnxq.solvers.hessian import check_hessian


def low_rank_split(W: Array, rank: int) -> tuple[Float32, Float32, Float32]:
    """``left [N, r]``, ``right [r, K]`` and the residual ``[N, K]``; their sum is W in float32.

    Raises:
        SpecError: a rank outside 1 to min(N, K).
    """
    weights = check_weights(W)
    _check_rank(rank, weights)
    u, s, v = np.linalg.svd(weights.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    left = (u[:, :rank] * root).astype(np.float32)
    right = (root[:, None] * v[:rank]).astype(np.float32)
    residual = weights.astype(np.float64) - left.astype(np.float64) @ right
    return left, right, residual.astype(np.float32)


def low_rank_compensate(W: Array, W_hat: Array, H: Array, rank: int) -> tuple[Float32, Float32]:
    """``B [N, r]`` and ``A [r, K]`` such that ``W_hat + B A`` is near W for the inputs of H.

    Directions that the inputs hardly use (eigenvalues below K eps times the largest) are left out.

    Raises:
        DataError: NaN or Inf, or shapes that do not fit.
        SpecError: a rank outside 1 to min(N, K).
    """
    weights = check_weights(W)
    _check_rank(rank, weights)
    delta = weights.astype(np.float64) - check_weights(W_hat)
    values, vectors = np.linalg.eigh(check_hessian(H, weights.shape[1]))
    used = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    root, vectors = np.sqrt(values[used]), vectors[:, used]
    u, s, v = np.linalg.svd((delta @ vectors) * root, full_matrices=False)
    r = min(rank, len(s))
    half = np.sqrt(s[:r])
    A = (half[:, None] * v[:r] / root) @ vectors.T
    B = u[:, :r] * half
    return B.astype(np.float32), A.astype(np.float32)


def _check_rank(rank: int, W: Float32) -> None:
    if not 1 <= rank <= min(W.shape):
        raise SpecError(
            "SPEC-RANK",
            f"rank {rank} for weights {list(W.shape)}",
            f"use a rank from 1 to {min(W.shape)}",
        )
