"""Find the fewest sites to leave in float that bring the outputs within a budget.

Sites are ranked; how many of the first are needed is found by doubling and halving, each trial on
the whole model lowered and run. Then each site left in float is given back, the costliest first,
and stays quantized if the budget is still met without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from onnxq.errors import QualityError, SpecError
from onnxq.passes.contract import Curve, Progress
from onnxq.passes.decide.measure import Metric, PlanMeter, Score, without
from onnxq.passes.plan import QuantPlan

GIVEN_BACK: Final = 12
"""Most sites that are tried to be given back; each costs a run of the whole model."""


@dataclass(frozen=True)
class Budget:
    """How far the outputs may be from the float model's.

    Args:
        metric: what the limit is in.
        limit: least dB, most nats, or most percent of perplexity.
    """

    metric: Metric
    limit: float

    @classmethod
    def of(
        cls, min_sqnr: float | None, max_kl: float | None, max_drop: float | None
    ) -> Budget | None:
        """The one that is given; None without any.

        Raises:
            SpecError: more than one.
        """
        kinds: tuple[tuple[Metric, float | None], ...] = (
            ("sqnr", min_sqnr),
            ("kl", max_kl),
            ("perplexity", max_drop),
        )
        given = [cls(metric, limit) for metric, limit in kinds if limit is not None]
        if len(given) > 1:
            raise SpecError(
                "SPEC-COMBINATION",
                "min-sqnr, max-kl and max-drop are one budget each, and only one can be kept",
                "give one of them",
            )
        return given[0] if given else None

    def value(self, score: Score) -> float:
        """``score`` in the unit of the limit."""
        return score.sqnr_db if self.metric == "sqnr" else score.badness(self.metric)

    def is_met(self, score: Score) -> bool:
        """Whether ``score`` is within the budget."""
        value = self.value(score)
        return value >= self.limit if self.metric == "sqnr" else value <= self.limit

    def distance(self, score: Score) -> str:
        """By how much ``score`` misses the limit."""
        unit = {"sqnr": "dB", "kl": "nats", "perplexity": "percentage points"}[self.metric]
        return f"{abs(self.value(score) - self.limit):.3g} {unit}"

    def __str__(self) -> str:
        if self.metric == "sqnr":
            return f"at least {self.limit:g} dB"
        return f"at most {self.limit:g} " + ("nats" if self.metric == "kl" else "% perplexity")


@dataclass
class FloatSearch:
    """The search for one plan; every set of sites is measured once.

    Args:
        meter: of the float model.
        plan: with all sites quantized.
        ranked: sites that may stay float, the first to do so first.
        costs: multiplications of each layer of the model.
        budget: to meet.
        why: reason that the plan gives for the sites left in float.
        progress: told before each trial.
    """

    meter: PlanMeter
    plan: QuantPlan
    ranked: Sequence[str]
    costs: dict[str, int]
    budget: Budget
    why: str
    progress: Progress
    trials: dict[frozenset[str], Score] = field(default_factory=dict)

    def find(self, most: int) -> list[str]:
        """Sites to leave in float, at most ``most``, in the order of the ranking.

        Raises:
            QualityError: ``QUALITY-BUDGET``: so many are not enough.
        """
        count = self._least(most)
        floats = list(self.ranked[:count])
        costliest = sorted(floats, key=lambda site: -self.costs.get(site, 0))
        for site in costliest[:GIVEN_BACK]:
            rest = [other for other in floats if other != site]
            if self.budget.is_met(self._score(rest)):
                floats = rest
        return floats

    def share(self, floats: Sequence[str]) -> float:
        """Share of the layers' multiplications that is quantized with ``floats`` in float."""
        plan = without(self.plan, floats, self.why)
        done = sum(cost for site, cost in self.costs.items() if site in plan.sites)
        return done / max(1, sum(self.costs.values()))

    def curve(self, chosen: Sequence[str]) -> Curve:
        """Every trial: share of quantized compute and accuracy; an exact one is off the scale."""
        names: dict[Metric, str] = {
            "sqnr": "SQNR of the worst output, dB",
            "kl": "KL divergence, nats",
            "perplexity": "increase of perplexity, %",
        }
        points = sorted(
            (100 * self.share(sorted(floats)), self.budget.value(score), f"{len(floats)} in float")
            for floats, score in self.trials.items()
            if math.isfinite(self.budget.value(score))
        )
        at = (100 * self.share(chosen), self.budget.value(self.trials[frozenset(chosen)]))
        return Curve(
            "Accuracy against quantized compute",
            "share of the linear layers' multiplications that is quantized, %",
            names[self.budget.metric],
            tuple(points),
            at,
            self.budget.limit,
        )

    def _score(self, floats: Sequence[str]) -> Score:
        key = frozenset(floats)
        if key not in self.trials:
            self.progress("partial", len(self.trials), None)
            self.trials[key] = self.meter.measure(without(self.plan, floats, self.why))
        return self.trials[key]

    def _least(self, most: int) -> int:
        """The least number of first sites that meets the budget, by doubling and halving."""
        low, high = -1, 0
        while not self.budget.is_met(self._score(self.ranked[:high])):
            if high == most:
                raise self._refusal(most)
            low, high = high, min(most, max(1, 2 * high))
        while high - low > 1:
            middle = (low + high) // 2
            if self.budget.is_met(self._score(self.ranked[:middle])):
                high = middle
            else:
                low = middle
        return high

    def _refusal(self, most: int) -> QualityError:
        floats, best = min(
            self.trials.items(), key=lambda item: item[1].badness(self.budget.metric)
        )
        return QualityError(
            "QUALITY-BUDGET",
            f"partial: {most} of {len(self.ranked)} layers in float do not meet {self.budget}; "
            f"the best found is {best.describe(self.budget.metric)} with {len(floats)} layers in "
            f"float, {self.budget.distance(best)} off",
            "allow more layers, relax the budget, or put smooth-quant or rotate before",
            best=self.budget.value(best),
            distance=abs(self.budget.value(best) - self.budget.limit),
        )
