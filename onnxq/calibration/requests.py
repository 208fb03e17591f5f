"""What a pass wants to know about a value of the model: the vocabulary of the calibration sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from onnxq.errors import InternalError

StatKind = Literal["range", "channel", "histogram", "rows", "moment"]


@dataclass(frozen=True)
class StatRequest:
    """One statistic of one value, over all calibration samples.

    Non-finite elements never enter any statistic.

    ===========  ==========================================================================
    kind         result
    ===========  ==========================================================================
    range        smallest and largest element; their mean and moving average over batches
    channel      lo, hi, mean, mean of ``|x|`` and of ``x**2`` for each index of ``axis``
    histogram    two-sided histogram with bins of a power-of-two width
    rows         at most ``limit`` rows ``[limit, C]`` along ``axis``, drawn deterministically
    moment       ``X.T @ X`` of the rows along ``axis``, ``[C, C]``, and the number of rows
    ===========  ==========================================================================

    Args:
        value: name of a value of the main graph.
        kind: which statistic.
        axis: the channel axis of ``channel``, ``rows`` and ``moment``; may be negative.
        limit: number of rows kept by ``rows``.
        mask: name of the attention mask of ``value``, or None. It must broadcast to the value's
            shape. Where an additive mask (a float) is not finite or <= -1e3, or a boolean mask is
            False, the element does not enter; in ``rows`` and ``moment`` its whole row does not.

    Raises:
        InternalError: STAT-REQUEST when kind and limit do not make sense.
    """

    value: str
    kind: StatKind
    axis: int = -1
    limit: int = 0
    mask: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(StatKind):
            raise InternalError("STAT-REQUEST", f"there is no statistic `{self.kind}`")
        if self.kind == "rows" and self.limit < 1:
            raise InternalError(
                "STAT-REQUEST",
                f"rows of `{self.value}` need a limit of at least 1, not {self.limit}",
            )
