"""GPFQ: greedy path following, error feedback without the inverse of a Hessian.

Lybrand & Saab, arXiv 2010.15979; Zhang, Zhou & Saab, arXiv 2201.11113. With float inputs X and
inputs Y of the rounded prefix, column t is rounded to ``q_t = Q(<Y_t, u + w_t X_t> / |Y_t|^2)`` and
``u += w_t X_t - q_t Y_t``. Only ``H = Y Y'`` and ``G = X Y'`` are needed:

    q_t = Q((sum_{s<=t} w_s G_st - sum_{s<t} q_s H_st) / H_tt)

With an MX format and groups that are refreshed this is the error diffusion of the MX paper
(arXiv 2310.10537, section 5): a block takes its scale from its corrected columns, is rounded, and
hands its residual on.
"""

from __future__ import annotations

import numpy as np

from onnxq.formats import Format, Params
from onnxq.solvers.gptq import column_order, order_and_refresh, prepare_grid
from onnxq.solvers.grid import Array, Solution, check_weights
from onnxq.solvers.hessian import check_hessian


def gpfq(
    W: Array,
    H: Array,
    fmt: Format,
    *,
    G: Array | None = None,
    group: int | None = None,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    mse: bool = False,
    params: Params | None = None,
) -> Solution:
    """Weights rounded along the path of least accumulated error.

    Args:
        W: ``[N, K]``.
        H: ``[K, K]``, ``Y Y'``.
        fmt: an integer, float, MX, NVFP4 or NF4 format.
        G: ``[K, K]``, ``X Y'``; default H.
        group: columns per scale; 0 for whole rows; None for the format's own block.
        act_order: columns of large inputs first. Default: with static groups.
        static_groups: scales from W as it came (default), or from the corrected columns; the
            latter suits MX formats only, integer scales run away with the accumulated error.
        mse: search the scales.
        params: scales found elsewhere.

    Raises:
        DataError: NaN or Inf, shapes that do not fit.
        SpecError: ``act_order`` with groups that are not static.
    """
    weights = check_weights(W)
    columns = weights.shape[1]
    hessian = check_hessian(H, columns)
    mixed = hessian if G is None else check_hessian(G, columns)
    grid, fit = prepare_grid(weights, fmt, group, mse=mse, params=params)
    ordered, refresh = order_and_refresh(grid, columns, act_order, static_groups)
    order = column_order(hessian, ordered)
    # Sums of w_s G_st for s <= t, in the order of the path; all at once.
    mixed, hessian = mixed[np.ix_(order, order)], hessian[np.ix_(order, order)]
    path = weights[:, order].astype(np.float64)
    target = path @ np.triu(mixed)
    diagonal = np.diag(hessian)
    safe = np.where(diagonal > 0, diagonal, 1.0)
    chosen = np.zeros_like(path)
    codes: list[Array] = []
    for t, column in enumerate(order):
        if refresh and column % grid.size == 0:
            last = min(t + grid.size, columns)
            # Before its block is rounded, each column as the earlier blocks leave it.
            earlier = target[:, t:last] - chosen[:, :t] @ hessian[:t, t:last]
            within = path[:, t:last] @ np.triu(hessian[t:last, t:last], 1)
            wanted = (earlier - within) / safe[t:last]
            grid.refit(int(column) // grid.size, fit(wanted.astype(np.float32), int(column)))
        wanted = (target[:, t] - chosen[:, :t] @ hessian[:t, t]) / safe[t]
        wanted = np.where(diagonal[t] > 0, wanted, 0.0)
        code, value = grid.round(wanted.astype(np.float32), int(column))
        chosen[:, t] = value
        codes.append(code)
    whole = np.empty((columns, weights.shape[0]), codes[0].dtype)
    whole[order] = np.stack(codes)
    return grid.solution(whole.T)
