"""GPTAQ: GPTQ that also undoes the error of the inputs.

Li et al., arXiv 2504.02692. The layer sees inputs ``Y`` that come through layers already rounded,
where the float model has ``X``. With ``H = Y Y'`` and ``D = (X - Y) Y'`` (both times 2/T) and
``inv(H) = U' U``: ``P = alpha triu(D U', 1) U``, and each column w adds ``w P_ij`` to later ones.
"""

from __future__ import annotations

import numpy as np

from onnxq.formats import Format, Params
from onnxq.solvers.gptq import (
    BLOCK,
    column_order,
    diffuse,
    drop_dead,
    order_and_refresh,
    prepare_grid,
)
from onnxq.solvers.grid import Array, Solution, check_weights
from onnxq.solvers.hessian import DAMP, check_hessian, inverse_factor

ALPHA = 0.25


def gptaq(
    W: Array,
    H: Array,
    D: Array,
    fmt: Format,
    *,
    group: int | None = None,
    alpha: float = ALPHA,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    mse: bool = False,
    params: Params | None = None,
    damp: float = DAMP,
    block: int = BLOCK,
) -> Solution:
    """As :func:`onnxq.solvers.gptq.gptq`, with ``D [K, K]`` and its share ``alpha``.

    ``alpha = 0`` or ``D = 0`` gives GPTQ.

    Raises:
        DataError: NaN or Inf, shapes that do not fit, an H that cannot be factored.
        SpecError: ``act_order`` with groups that are not static.
    """
    weights = check_weights(W)
    mismatch = check_hessian(D, weights.shape[1]).copy()
    dead = np.diag(check_hessian(H, weights.shape[1])) <= 0
    mismatch[:, dead] = 0
    hessian, weights = drop_dead(check_hessian(H, weights.shape[1]), weights)
    grid, fit = prepare_grid(weights, fmt, group, mse=mse, params=params)
    ordered, refresh = order_and_refresh(grid, weights.shape[1], act_order, static_groups)
    order = column_order(hessian, ordered)
    factor, _ = inverse_factor(hessian[np.ix_(order, order)], damp)
    correction = alpha * np.triu(mismatch[np.ix_(order, order)] @ factor.T, 1) @ factor
    refit = fit if refresh else None
    return diffuse(weights, factor, grid, order, block=block, refit=refit, P=correction)
