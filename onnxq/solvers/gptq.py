"""GPTQ: round column by column and let the later columns absorb the error.

Frantar et al., arXiv 2210.17323. With ``inv(H) = U' U``: column i is rounded to q, and
``e = (w - q) / U_ii`` is taken from the columns after it, ``W_j -= e U_ij``. Columns go in blocks;
what a block does to the rest is one matrix product. GPTAQ (arXiv 2504.02692) adds ``+ w P_ij``,
see :mod:`onnxq.solvers.gptaq`.
"""

from __future__ import annotations

import numpy as np

from onnxq.errors import SpecError
from onnxq.formats import Format, Params
from onnxq.solvers.grid import (
    Array,
    Fit,
    Float32,
    Float64,
    Grid,
    Solution,
    check_weights,
    plain_fit,
)
from onnxq.solvers.hessian import DAMP, check_hessian, inverse_factor
from onnxq.solvers.scale_search import mse_params

BLOCK = 128


def gptq(
    W: Array,
    H: Array,
    fmt: Format,
    *,
    group: int | None = None,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    mse: bool = False,
    params: Params | None = None,
    damp: float = DAMP,
    block: int = BLOCK,
) -> Solution:
    """Weights rounded with error feedback through H.

    Args:
        W: ``[N, K]``.
        H: ``[K, K]``, see :mod:`onnxq.solvers.hessian`.
        fmt: an integer, float, MX, NVFP4 or NF4 format.
        group: columns per scale; 0 for whole rows; None for the format's own block.
        act_order: columns of large inputs first. Default: with static groups.
        static_groups: all scales from W as it came (default); else a group's scales are taken
            from its columns as they have become. Columns of quiet inputs take up most of the
            error, so that refreshed scales can grow until they cost more than they save.
        mse: search the scales (:func:`mse_params`) instead of taking the extremes'.
        params: scales found elsewhere; implies static groups.
        damp: part of the mean diagonal that is added to H's diagonal.
        block: columns per lazy update.

    Raises:
        DataError: NaN or Inf, shapes that do not fit, an H that cannot be factored.
        SpecError: ``act_order`` with groups that are not static: the groups would not be
            contiguous.
        UnsupportedError: a format that cannot be rounded by columns.
    """
    weights = check_weights(W)
    hessian, weights = drop_dead(check_hessian(H, weights.shape[1]), weights)
    grid, fit = prepare_grid(weights, fmt, group, mse=mse, params=params)
    ordered, refresh = order_and_refresh(grid, weights.shape[1], act_order, static_groups)
    order = column_order(hessian, ordered)
    factor, _ = inverse_factor(hessian[np.ix_(order, order)], damp)
    return diffuse(weights, factor, grid, order, block=block, refit=fit if refresh else None)


def order_and_refresh(
    grid: Grid, columns: int, act_order: bool | None, static_groups: bool | None
) -> tuple[bool, bool]:
    """Whether to sort the columns, and whether to refresh groups.

    Raises:
        SpecError: both, for then the columns of a group would not be contiguous.
    """
    refresh = static_groups is False and grid.size < columns
    ordered = not refresh if act_order is None else act_order
    if ordered and refresh:
        raise SpecError(
            "SPEC-ACT-ORDER",
            "act_order needs static groups: scales are fixed before columns change places",
            "leave static_groups out, or set it to true",
        )
    return ordered, refresh


def drop_dead(H: Float64, W: Float32) -> tuple[Float64, Float32]:
    """Inputs that are always zero: their weights become 0 and their diagonal 1."""
    dead = np.diag(H) <= 0
    if not dead.any():
        return H, W
    hessian, weights = H.copy(), W.copy()
    hessian[dead, dead] = 1.0
    weights[:, dead] = 0
    return hessian, weights


def column_order(H: Float64, act_order: bool) -> Array:
    """Columns by falling diagonal of H, or as they are."""
    return np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(len(H))


def prepare_grid(
    W: Float32, fmt: Format, group: int | None, *, mse: bool, params: Params | None
) -> tuple[Grid, Fit]:
    """The grid of all of W, and how to refresh one group."""
    plain, fit = plain_fit(fmt, W, group)
    if params is not None:
        return Grid(fmt, params, W.shape[1]), fit
    if not mse:
        return Grid(fmt, plain, W.shape[1]), fit

    def searched(columns: Float32, _: int) -> Params:
        return mse_params(columns, fmt, group=group)

    return Grid(fmt, mse_params(W, fmt, group=group), W.shape[1]), searched


def diffuse(
    W: Float32,
    U: Float64,
    grid: Grid,
    order: Array,
    *,
    block: int = BLOCK,
    refit: Fit | None = None,
    P: Float64 | None = None,
) -> Solution:
    """Round W's columns in ``order``, with error feedback through U.

    Args:
        W: ``[N, K]``.
        U: ``[L, L]`` upper triangular, in ``order``; L is the length of ``order``.
        grid: where to round to.
        order: columns of W; those that it leaves out must be on the grid already.
        block: columns per lazy update; enlarged to whole groups when these are refreshed.
        refit: refreshes a group when its first column comes.
        P: ``[L, L]`` strictly upper, GPTAQ's correction.
    """
    count = len(order)
    if refit is not None:
        block = max(grid.size, block // grid.size * grid.size)
    # Transposed, a column is a contiguous row and an update one outer product.
    work = np.ascontiguousarray(W[:, order].T)
    factor = U.astype(np.float32)
    correction = None if P is None else P.astype(np.float32)
    codes: list[Array] = []
    for start in range(0, count, block):
        stop = min(start + block, count)
        errors = np.zeros((stop - start, work.shape[1]), np.float32)
        for i in range(start, stop):
            column = int(order[i])
            if refit is not None and column % grid.size == 0:
                last = min(i + grid.size, count)
                grid.refit(column // grid.size, refit(work[i:last].T, column))
            w = work[i]
            code, value = grid.round(w, column)
            codes.append(code)
            error = (w - value) / factor[i, i]
            errors[i - start] = error
            if i + 1 < stop:
                work[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], error)
                if correction is not None:
                    work[i + 1 : stop] += np.outer(correction[i, i + 1 : stop], w)
        work[stop:] -= factor[start:stop, stop:].T @ errors
        if correction is not None:
            work[stop:] += correction[start:stop, stop:].T @ work[start:stop]
    whole = np.empty((W.shape[1], W.shape[0]), codes[0].dtype if codes else np.float32)
    for column in np.setdiff1d(np.arange(W.shape[1]), order):
        whole[column] = grid.round(W[:, column], int(column))[0]
    whole[order] = np.stack(codes) if codes else whole[order]
    return grid.solution(whole.T)
