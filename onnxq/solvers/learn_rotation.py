"""Rotations learned from activations, by Cayley steps on a closed objective.

Objective ``kurtosis``: rows ``x [D]`` are scaled to norm ``sqrt(D)``. Behind a rotation their
coordinates ``y = x R`` have, about zero, the kurtosis ``k = mean_j y_j^4``: 1 where all are of one
size, 1.8 for the uniform distribution, which an integer grid suits best, 3 for a Gaussian one, D
for a single spike. KurTail (Akhondzadeh et al., arXiv 2503.01483) minimises ``|k - 1.8|``; here
over the mean of the rows::

    f(R) = mean_i |k_i - 1.8|        df/dR = 4 / (n D) sum_i sign(k_i - 1.8) x_i' (y_i^3)

Objective ``range``: the square of the step of a grid that spans a row, so the noise itself that
rounding makes; rows count as they are, and so do large ones for more::

    f(R) = mean_i (max_j y_ij - min_j y_ij)^2

R stays orthogonal: with the skew matrix ``A = G R' - R G'`` of the gradient G and a step t,
``R <- (I + t/2 A)^-1 (I - t/2 A) R`` (Wen & Yin 2013). Momentum is a sum of skew matrices, so it
needs no transport. Nothing is random: the same rows and start give the same rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

Objective = Literal["kurtosis", "range"]

UNIFORM_KURTOSIS = 1.8
MOMENTUM = 0.9
LARGEST_TURN = 0.15
"""Spectral bound, in radians about, on what one step turns at first; it falls like a cosine."""


@dataclass(frozen=True, eq=False)
class LearnedRotation:
    """What was found.

    Attributes:
        matrix: ``[D, D]`` float64, orthogonal to 1e-12.
        before: objective at the start.
        after: objective of ``matrix``; never above ``before``.
    """

    matrix: Float64
    before: float
    after: float


def normalized(rows: npt.NDArray[Any]) -> Float32:
    """Rows ``[n, D]`` scaled to norm ``sqrt(D)``, without those that are zero or not finite."""
    wide = np.asarray(_finite(rows), np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    kept = norm[:, 0] > 0
    return np.asarray(wide[kept] * (np.sqrt(rows.shape[1]) / norm[kept]), np.float32)


def _finite(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = rows[np.isfinite(rows).all(axis=1)]
    return found


def kurtosis_objective(rows: Float32, matrix: Float64) -> tuple[float, Float64]:
    """``f`` and its gradient ``[D, D]``.

    Args:
        rows: ``[n, D]`` of norm ``sqrt(D)``.
        matrix: R.
    """
    turned = rows @ matrix.astype(np.float32)
    square = turned * turned
    distance = np.mean(square * square, axis=1, dtype=np.float64) - UNIFORM_KURTOSIS
    slope = np.sign(distance).astype(np.float32)[:, None] * square * turned
    gradient = (rows.T @ slope).astype(np.float64) * (4.0 / rows.size)
    return float(np.abs(distance).mean()), gradient


def range_objective(rows: Float32, matrix: Float64) -> tuple[float, Float64]:
    """``f`` and its gradient ``[D, D]``, of rows ``[n, D]`` as they are."""
    turned = rows @ matrix.astype(np.float32)
    index = np.arange(len(turned))
    most, least = turned.argmax(axis=1), turned.argmin(axis=1)
    width = turned[index, most] - turned[index, least]
    slope = np.zeros_like(turned)
    slope[index, most] += 2 * width
    slope[index, least] -= 2 * width
    gradient = (rows.T @ slope).astype(np.float64) / len(rows)
    return float(np.square(width).mean(dtype=np.float64)), gradient


_OBJECTIVES: Final[Mapping[Objective, Callable[[Float32, Float64], tuple[float, Float64]]]] = {
    "kurtosis": kurtosis_objective,
    "range": range_objective,
}


def learn_rotation(
    rows: npt.NDArray[Any],
    start: Float64,
    *,
    steps: int,
    keep_ones: bool = False,
    objective: Objective = "kurtosis",
) -> LearnedRotation:
    """The best rotation on the way from ``start`` in ``steps`` Cayley steps.

    Args:
        rows: ``[n, D]`` activations; for ``kurtosis`` each is scaled to one norm.
        start: ``[D, D]`` orthogonal.
        steps: gradients taken.
        keep_ones: hold ``R 1 = 1``, as a LayerNorm needs it; ``start`` must do so.
        objective: what is made small.
    """
    is_scaled = objective == "kurtosis"
    sample = normalized(rows) if is_scaled else _finite(rows).astype(np.float32, copy=False)
    measure = _OBJECTIVES[objective]
    matrix = start
    if not len(sample):
        return LearnedRotation(start, 0.0, 0.0)
    best, before, after = start, 0.0, np.inf
    memory = np.zeros_like(start)
    for step in range(steps + 1):
        value, gradient = measure(sample, matrix)
        before = value if step == 0 else before
        if value < after:
            best, after = matrix, value
        if step == steps:
            break
        skew = _skew(gradient @ matrix.T, keep_ones)
        memory = MOMENTUM * memory + skew
        size = np.linalg.norm(memory, 2)
        if size == 0:
            break
        turn = LARGEST_TURN * 0.5 * (1 + np.cos(np.pi * step / steps))
        matrix = cayley(memory * (turn / size)) @ matrix
    return LearnedRotation(nearest_orthogonal(best), before, float(after))


def _skew(product: Float64, keep_ones: bool) -> Float64:
    """``G R' - R G'``; with ``keep_ones`` the part of it that maps the ones to zero."""
    skew = product - product.T
    if keep_ones:
        skew = skew - skew.mean(axis=1, keepdims=True)
        skew = skew - skew.mean(axis=0, keepdims=True)
    return skew


def cayley(skew: Float64) -> Float64:
    """``(I + A/2)^-1 (I - A/2)``, orthogonal for a skew A ``[D, D]``."""
    half = skew / 2
    eye = np.eye(len(skew))
    return np.asarray(np.linalg.solve(eye + half, eye - half), np.float64)


def nearest_orthogonal(matrix: Float64) -> Float64:
    """The polar factor: takes away what many products rounded."""
    u, _, v = np.linalg.svd(matrix)
    return np.asarray(u @ v, np.float64)
