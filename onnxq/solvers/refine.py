"""Go over rounded weights again: scales by least squares, codes by coordinate descent.

GPTQ decides each column once, knowing nothing of the columns behind it. With all decided, the loss

    L(q) = q H q' - 2 q T',   T = w H, or w (H + alpha D) where the inputs' error is undone as well

is quadratic in each row q of the rounded weights, so it can only fall by

- setting all scales of a row to their least-squares values for the codes at hand: with c the
  centred codes and groups g, ``A s = b``, ``A_gh = c_g H_gh c_h'``, ``b_g = c_g T_g'``;
- rounding one column again, the others fixed: ``q_j <- Q(q_j + (T - q H)_j / H_jj)``, in turn for
  all columns (QuantEase, Behdin et al., arXiv 2309.01885).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxq.errors import SpecError
from onnxq.formats import IntFormat
from onnxq.solvers.gptq import BLOCK, column_order, drop_dead
from onnxq.solvers.grid import Array, Float32, Float64, Grid, Solution, check_weights
from onnxq.solvers.hessian import DAMP, check_hessian

SWEEPS = 2
_RIDGE = 1e-6


def refine(
    W: Array,
    H: Array,
    solution: Solution,
    *,
    D: Array | None = None,
    alpha: float = 1.0,
    damp: float = DAMP,
    sweeps: int = SWEEPS,
    block: int = BLOCK,
) -> Solution:
    """``solution`` with a loss that is no larger in any row.

    Args:
        W: ``[N, K]``.
        H: ``[K, K]``, see :mod:`onnxq.solvers.hessian`.
        solution: of any solver that rounds by columns.
        D: ``[K, K]`` ``(X - Y) Y'`` of GPTAQ; None to leave the inputs' error.
        alpha: share of that error which is undone.
        damp: part of the mean diagonal that is added to H's diagonal, as in the solver before.
        sweeps: rounds of both steps.
        block: columns per lazy update.

    Raises:
        DataError: NaN or Inf, shapes that do not fit.
        SpecError: fewer than no sweeps.
        UnsupportedError: a format that cannot be rounded by columns.
    """
    if sweeps < 0:
        raise SpecError("SPEC-RANGE", f"sweeps={sweeps} is below 0")
    weights = check_weights(W)
    raw, kept = drop_dead(check_hessian(H, weights.shape[1]), weights)
    damped = raw + np.eye(len(raw)) * (damp * float(np.mean(np.diag(raw))))
    target = kept.astype(np.float64) @ damped
    if D is not None:
        mismatch = check_hessian(D, weights.shape[1]) * (np.diag(raw) > 0)
        target += alpha * (kept.astype(np.float64) @ mismatch)
    order = column_order(damped, act_order=True)
    narrow, pull = damped.astype(np.float32), target.astype(np.float32)
    for _ in range(sweeps):
        if isinstance(solution.fmt, IntFormat):
            solution = _refit(solution, narrow, pull)
        solution, moved = _sweep(solution, narrow, pull, order, block)
        if not moved:
            break
    return solution


def _refit(solution: Solution, H: Float32, target: Float32) -> Solution:
    """Least-squares scales for the codes at hand, in the rows in which they lower the loss."""
    params = solution.params
    rows, columns = solution.codes.shape
    size = params.granularity.size or columns
    starts = np.arange(0, columns, size)
    scale = params.scale.reshape(rows, -1)
    centred = solution.codes.astype(np.float32)
    if params.zero_point is not None:
        zero = params.zero_point.reshape(rows, -1).astype(np.float32)
        centred -= np.repeat(zero, size, axis=1)[:, :columns]
    A = np.empty((rows, len(starts), len(starts)))
    for group, start in enumerate(starts):
        part = centred[:, start : start + size]
        product = (part @ H[start : start + size, start:]) * centred[:, start:]
        A[:, group, group:] = np.add.reduceat(product, starts[group:] - start, axis=1)
        A[:, group:, group] = A[:, group, group:]
    b = np.add.reduceat((centred * target).astype(np.float64), starts, axis=1)
    solvable = A.copy()
    diagonal = np.einsum("ngg->ng", solvable)
    # A group of zeros has no scale of its own: it keeps the one it has.
    empty = diagonal <= 0
    solvable[empty] = 0
    diagonal[...] = np.where(empty, 1.0, diagonal * (1 + _RIDGE))
    found = np.linalg.solve(solvable, np.where(empty, scale, b)[..., None])[..., 0]
    found = found.astype(np.float32)
    usable = np.isfinite(found).all(axis=1) & ((found > 0) == (scale > 0)).all(axis=1)
    better = usable & (_quadratic(found, A, b) < _quadratic(scale, A, b))
    chosen = np.where(better[:, None], found, scale).reshape(params.scale.shape)
    return Solution(solution.fmt, solution.codes, replace(params, scale=chosen))


def _quadratic(scale: Float32, A: Float64, b: Float64) -> Float64:
    """``s A s' - 2 s b'`` of each row, ``[N]``: the loss as a function of the scales."""
    wide = scale.astype(np.float64)
    moved = np.einsum("ngh,nh->ng", A, wide) - 2 * b
    return np.asarray((wide * moved).sum(axis=1), np.float64)


def _sweep(
    solution: Solution, H: Float32, target: Float32, order: Array, block: int
) -> tuple[Solution, bool]:
    """Every column rounded again, once; whether any code changed."""
    grid = Grid(solution.fmt, solution.params, len(order))
    hessian = np.ascontiguousarray(H[np.ix_(order, order)])
    values = np.ascontiguousarray(solution.values()[:, order].T)
    codes = np.ascontiguousarray(solution.codes[:, order].T)
    slope = np.ascontiguousarray(target[:, order].T) - hessian @ values
    moved = False
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        before = values[start:stop].copy()
        for i in range(start, stop):
            w = values[i] + slope[i] / hessian[i, i]
            code, value = grid.round(w, int(order[i]))
            change = value - values[i]
            if change.any():
                codes[i], values[i], moved = code, value, True
                slope[i + 1 : stop] -= np.outer(hessian[i, i + 1 : stop], change)
        slope[stop:] -= hessian[start:stop, stop:].T @ (values[start:stop] - before)
    whole = np.empty_like(codes)
    whole[order] = codes
    return grid.solution(whole.T), moved
