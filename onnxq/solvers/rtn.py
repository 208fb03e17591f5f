"""Round to nearest, the baseline of all others."""

from __future__ import annotations

from onnxq.formats import Format, Params
from onnxq.solvers.grid import Array, Solution, check_weights, granularity_of


def rtn(
    W: Array, fmt: Format, *, group: int | None = None, params: Params | None = None
) -> Solution:
    """Round every weight to the nearest value of its group's grid.

    Args:
        W: ``[N, K]``.
        fmt: any format.
        group: columns per scale; 0 for whole rows; None for the format's own block.
        params: scales found elsewhere; default those of the extremes.

    Raises:
        DataError: NaN or Inf in W.
    """
    weights = check_weights(W)
    chosen = params or fmt.params(weights, granularity_of(fmt, group))
    return Solution(fmt, fmt.encode(weights, chosen), chosen)
