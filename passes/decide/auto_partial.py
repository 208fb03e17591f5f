"""``auto-partial``: leave the fewest layers in float that bring the outputs within a budget.

Layers are taken out of the plan worst first, as ``sensitivity`` ranked them; how many it takes is
found by doubling and halving, each time on the whole model lowered and run (Wu et al.,
arXiv 2004.09602, section 5.1, takes them one at a time).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxq.errors import QualityError, SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.decide.measure import Metric, PlanMeter, Score, multiplications, without
from onnxq.passes.decide.sensitivity import SENSITIVITY, Sensitivities, take_samples
from onnxq.passes.keys import PLAN, ROUNDED
from onnxq.passes.plan import QuantPlan

_WHY = "auto-partial: sensitive"


@dataclass(frozen=True)
class AutoPartial(Pass):
    """Leave sensitive layers in float until the outputs are good enough.

    Args:
        min_sqnr: least SQNR of every output in dB.
        max_kl: largest mean KL divergence of the softmax of logits, in nats.
        max_drop: largest increase of next-token perplexity in percent.
        max_layers: most layers to leave in float; -1: any number.
        order: take the most sensitive layers first (``layers``: fewest layers), or those with the
            most damage a multiplication (``compute``: least compute in float).
        samples: to run for each trial.
    """

    name: ClassVar[str] = "auto-partial"
    summary: ClassVar[str] = "leave the fewest sensitive layers in float that meet a budget"
    requires: ClassVar = (PLAN, SENSITIVITY)
    uses: ClassVar = (ROUNDED,)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0
    needs_data: ClassVar[bool] = True
    may_match_nothing: ClassVar[bool] = True

    min_sqnr: float | None = None
    max_kl: float | None = None
    max_drop: float | None = None
    max_layers: int = -1
    order: Literal["layers", "compute"] = "layers"
    samples: int = 2

    def __post_init__(self) -> None:
        given = [v for v in (self.min_sqnr, self.max_kl, self.max_drop) if v is not None]
        if len(given) != 1:
            raise SpecError(
                "SPEC-EMPTY",
                "`auto-partial` needs exactly one of min-sqnr, max-kl, max-drop",
                "for example auto-partial{max-drop=1}",
            )
        if self.samples < 1 or self.max_layers < -1:
            raise SpecError("SPEC-RANGE", "samples is at least 1, max-layers at least -1")

    @property
    def metric(self) -> Metric:
        """What the budget is in."""
        if self.min_sqnr is not None:
            return "sqnr"
        return "kl" if self.max_kl is not None else "perplexity"

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.min_sqnr is not None:
            return f"at least {self.min_sqnr:g} dB"
        if self.max_kl is not None:
            return f"at most {self.max_kl:g} nats"
        return f"at most {self.max_drop:+g} % perplexity"

    def meets(self, score: Score) -> bool:
        """Whether ``score`` is within the budget."""
        if self.min_sqnr is not None:
            return score.sqnr_db >= self.min_sqnr
        limit = self.max_kl if self.max_kl is not None else self.max_drop
        assert limit is not None
        return score.badness(self.metric) <= limit

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Search, and write the plan with the layers left out.

        Raises:
            QualityError: ``QUALITY-BUDGET``: the budget cannot be met.
        """
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        costs = {linear.name: multiplications(linear) for linear in analyze(model).linears}
        ranked = self._rank(ctx.artifacts.get(SENSITIVITY), plan, costs)
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else None
        samples = take_samples(ctx, self.samples)
        with PlanMeter(model, ctx, samples, self.metric, rounded) as meter:
            search = _Search(meter, plan, ranked, ctx)
            count = self._least(search, len(ranked))
        kept = without(plan, ranked[:count], _WHY)
        for site in ranked[:count]:
            report.change(site, "stays float", self.budget)
        for tried in sorted(search.scores):
            share = _share(without(plan, ranked[:tried], _WHY), costs)
            report.note(
                f"{tried} layers in float: {search.scores[tried].describe(self.metric)}, "
                f"{share:.1%} of the linear layers' multiplications quantized"
            )
        ctx.artifacts.put(PLAN, kept)
        return report

    def _rank(self, found: Sensitivities, plan: QuantPlan, costs: dict[str, int]) -> list[str]:
        """Candidates, the first to leave in float first."""

        def damage(site: str) -> float:
            bad = found.scores[site].badness(found.metric)
            return bad / max(1, costs.get(site, 1)) if self.order == "compute" else bad

        known = [site for site in plan.sites if site in found.scores]
        return sorted(known, key=lambda site: -damage(site))

    def _least(self, search: _Search, total: int) -> int:
        """The least number of layers that meets the budget, by doubling and halving."""
        most = total if self.max_layers < 0 else min(total, self.max_layers)
        low, high = -1, 0
        while not self.meets(search.score(high)):
            if high == most:
                raise self._refusal(search, most, total)
            low, high = high, min(most, max(1, 2 * high))
        while high - low > 1:
            middle = (low + high) // 2
            if self.meets(search.score(middle)):
                high = middle
            else:
                low = middle
        return high

    def _refusal(self, search: _Search, most: int, total: int) -> QualityError:
        best = min(search.scores, key=lambda n: search.scores[n].badness(self.metric))
        return QualityError(
            "QUALITY-BUDGET",
            f"auto-partial: {most} of {total} layers in float do not meet {self.budget}; the best "
            f"found is {search.scores[best].describe(self.metric)} with {best} layers in float",
            "allow more layers, relax the budget, or put smooth-quant or rotate before",
        )


@dataclass
class _Search:
    """Scores by number of layers left in float, each measured once."""

    meter: PlanMeter
    plan: QuantPlan
    ranked: list[str]
    ctx: Context
    scores: dict[int, Score] = field(default_factory=dict)

    def score(self, count: int) -> Score:
        if count not in self.scores:
            self.ctx.progress("auto-partial", len(self.scores), None)
            self.scores[count] = self.meter.measure(without(self.plan, self.ranked[:count], _WHY))
        return self.scores[count]


def _share(plan: QuantPlan, costs: dict[str, int]) -> float:
    """Share of the linear layers' multiplications that the plan quantizes."""
    total = sum(costs.values())
    return sum(cost for site, cost in costs.items() if site in plan.sites) / max(1, total)
