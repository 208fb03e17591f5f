"""One choice from each of several lists, with the least damage within a budget of cost.

The multiple-choice knapsack problem, solved by dynamic programming over costs in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

STEPS: Final = 2000
"""Steps that the budget is divided into; costs are rounded up, so that it is kept."""


def choose(
    options: Sequence[Sequence[tuple[float, float]]], budget: float, *, steps: int = STEPS
) -> list[int] | None:
    """The index of one option of each list.

    Args:
        options: (cost, damage) of each option, neither negative.
        budget: most cost of all choices together.
        steps: that the slack between the cheapest choices and the budget is divided into.

    Returns:
        The choices, or None if even the cheapest cost more than the budget.
    """
    cheapest = [min(cost for cost, _ in each) for each in options]
    slack = budget - sum(cheapest)
    if slack < -1e-9 * max(budget, 1e-30):
        return None
    unit = max(slack, 0.0) / steps
    best = np.zeros(steps + 1)
    picks: list[np.ndarray] = []
    for each, least in zip(options, cheapest, strict=True):
        table = np.full((len(each), steps + 1), np.inf)
        for index, (cost, damage) in enumerate(each):
            extra = cost - least
            taken = 0 if extra <= 0 else int(np.ceil(extra / unit - 1e-9)) if unit else steps + 1
            if taken <= steps:
                table[index, taken:] = best[: steps + 1 - taken] + damage
        picks.append(table.argmin(axis=0))
        best = table.min(axis=0)
    at, chosen = steps, []
    for each, least, pick in list(zip(options, cheapest, picks, strict=True))[::-1]:
        index = int(pick[at])
        extra = each[index][0] - least
        at -= 0 if extra <= 0 else int(np.ceil(extra / unit - 1e-9))
        chosen.append(index)
    return chosen[::-1]
