"""Qronos: correct past errors exactly before each step, in an efficient form.

Zhang et al., arXiv 2505.11695. ``H = Y Y'``, ``G = X Y'`` (X float inputs, Y those of the rounded
prefix). The first column is rounded as GPFQ would, all others are solved again given it:

    q_0 = Q((w G_:0 - v triu(H, 1)_0:') / H_00)
    W_1: <- (w G_:1 - q_0 H_0,1:) inv(H_1:,1:)

and then rounded with GPTQ's feedback on ``H_1:,1:``. H is damped by a part of its mean diagonal, as
in GPTQ (the paper takes a part of its largest eigenvalue, which for inputs with a few loud channels
is either no damping at all or far too much); with X = Y the result is then GPTQ's.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from onnxq.errors import DataError
from onnxq.formats import Format, Params
from onnxq.solvers.gptq import BLOCK, column_order, diffuse, drop_dead, prepare_grid
from onnxq.solvers.grid import Array, Solution, check_weights
from onnxq.solvers.hessian import DAMP, check_hessian, inverse_factor


def qronos(
    W: Array,
    H: Array,
    fmt: Format,
    *,
    G: Array | None = None,
    group: int | None = None,
    act_order: bool = True,
    mse: bool = False,
    params: Params | None = None,
    damp: float = DAMP,
    block: int = BLOCK,
) -> Solution:
    """Weights rounded by Qronos; scales are those of W (static groups).

    Args:
        W: ``[N, K]``.
        H: ``[K, K]``, ``Y Y'``.
        fmt: an integer, float, MX, NVFP4 or NF4 format.
        G: ``[K, K]``, ``X Y'``; default H, when the inputs are those of the float model.
        group: columns per scale; 0 for whole rows; None for the format's own block.
        act_order: columns of large inputs first.
        mse: search the scales.
        params: scales found elsewhere.
        damp: part of the mean diagonal that is added to H's diagonal.
        block: columns per lazy update.

    Raises:
        DataError: NaN or Inf, shapes that do not fit, an H that cannot be factored.
    """
    weights = check_weights(W)
    raw = check_hessian(H, weights.shape[1])
    mixed = raw if G is None else check_hessian(G, weights.shape[1])
    grid, _ = prepare_grid(weights, fmt, group, mse=mse, params=params)
    hessian, weights = drop_dead(raw, weights)
    order = column_order(hessian, act_order)
    hessian, mixed = hessian[np.ix_(order, order)], mixed[np.ix_(order, order)]
    shift = damp * float(np.mean(np.diag(hessian)))
    damped = hessian + shift * np.eye(len(order))
    path = weights[:, order].astype(np.float64)

    first = (path @ mixed[:, 0] - path[:, 1:] @ hessian[0, 1:]) / hessian[0, 0]
    _, value = grid.round(first.astype(np.float32), int(order[0]))
    solved = weights.copy()
    solved[:, order[0]] = value
    if len(order) > 1:
        try:
            rest = cho_factor(damped[1:, 1:])
        except np.linalg.LinAlgError as error:
            raise DataError(
                "DATA-HESSIAN",
                f"the Hessian is not positive definite with damping {damp:g}",
                "raise damp, or use more calibration data",
            ) from error
        shifted = mixed + shift * np.eye(len(order))
        right = path @ shifted[:, 1:] - np.outer(value.astype(np.float64), hessian[0, 1:])
        solved[:, order[1:]] = cho_solve(rest, right.T).T.astype(np.float32)
    factor, _ = inverse_factor(damped[1:, 1:], 0.0) if len(order) > 1 else (damped[1:, 1:], 0.0)
    return diffuse(solved, factor, grid, order[1:], block=block)
