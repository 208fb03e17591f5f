"""``partial``: leave layers in float, chosen by name or by a budget of accuracy.

Partial quantization (Wu et al., arXiv 2004.09602, section 5.1). The user names layers by glob or
operator type; or gives a budget, and the fewest layers that it takes are found: ranked by what
``sensitivity`` measured, searched by :mod:`onnxq.passes.decide.budget`. With both, the named layers
are left in float first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxq.errors import SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import Context, Key, Pass, PassReport
from onnxq.passes.decide.budget import Budget, FloatSearch
from onnxq.passes.decide.measure import PlanMeter, multiplications, without
from onnxq.passes.decide.sensitivity import SENSITIVITY, Sensitivities, take_samples
from onnxq.passes.keys import PLAN, ROUNDED
from onnxq.passes.plan import QuantPlan, SitePlan
from onnxq.passes.sites import site_names

_WHY = "partial: sensitive"


@dataclass(frozen=True)
class Partial(Pass):
    """Leave layers in float, by name, by type, or as many as a budget takes.

    Args:
        layers: globs of site names, as ``assign`` lists them.
        op_types: operator types, for example ``Conv``.
        min_sqnr: budget: least SQNR of every output in dB.
        max_kl: budget: largest mean KL divergence of the softmax of logits, in nats.
        max_drop: budget: largest increase of next-token perplexity in percent.
        max_layers: most layers to leave in float for a budget; -1: any number.
        order: leave layers in float by damage a multiplication, the most first (``compute``: least
            compute in float), or by damage (``layers``: fewest layers).
        samples: to run for each trial.
    """

    name: ClassVar[str] = "partial"
    summary: ClassVar[str] = "leave layers in float, by name or the fewest that meet a budget"
    requires: ClassVar = (PLAN,)
    uses: ClassVar = (SENSITIVITY, ROUNDED)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0

    layers: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()
    min_sqnr: float | None = None
    max_kl: float | None = None
    max_drop: float | None = None
    max_layers: int = -1
    order: Literal["layers", "compute"] = "compute"
    samples: int = 2

    def __post_init__(self) -> None:
        if not self.layers and not self.op_types and self.budget is None:
            raise SpecError(
                "SPEC-EMPTY",
                "`partial` needs layers, op-types or a budget",
                'for example partial{layers=["*/layer.0/*"]} or partial{max-drop=1}',
            )
        if self.samples < 1 or self.max_layers < -1:
            raise SpecError("SPEC-RANGE", "samples is at least 1, max-layers at least -1")

    @property
    def budget(self) -> Budget | None:
        """The budget, if one is given."""
        return Budget.of(self.min_sqnr, self.max_kl, self.max_drop)

    def needs(self) -> tuple[Key[Any], ...]:
        """A budget needs to know which layers hurt."""
        return (PLAN, SENSITIVITY) if self.budget is not None else (PLAN,)

    def wants_data(self) -> bool:
        """A budget is measured on samples."""
        return self.budget is not None

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Drop the matching sites from the plan, then as many as the budget takes.

        Raises:
            QualityError: ``QUALITY-BUDGET``: the budget cannot be met.
        """
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        types = {name: node.op_type for node, name in site_names(model.graph).items()}
        self._report_misses(plan, types, report)
        for site in list(plan.sites.values()):
            why = self._match(site, types)
            if why is not None:
                plan.leave_float(site.site, why)
                report.change(site.site, "stays float", why)
        self._drop_starved(plan, report)
        if self.budget is not None:
            ctx.artifacts.put(PLAN, self._meet(self.budget, model, plan, ctx, report))
        return report

    def _meet(
        self, budget: Budget, model: ir.Model, plan: QuantPlan, ctx: Context, report: PassReport
    ) -> QuantPlan:
        """``plan`` without the layers that ``budget`` takes."""
        costs = {linear.name: multiplications(linear) for linear in analyze(model).linears}
        ranked = self._rank(ctx.artifacts.get(SENSITIVITY), plan, costs)
        if not ranked:
            report.skip("the plan", "has no layer that a budget could leave in float")
            return plan
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else None
        samples = take_samples(ctx, self.samples)
        with PlanMeter(model, ctx, samples, budget.metric, rounded) as meter:
            search = FloatSearch(meter, plan, ranked, costs, budget, _WHY, ctx.progress)
            most = len(ranked) if self.max_layers < 0 else min(len(ranked), self.max_layers)
            floats = search.find(most)
        for site in floats:
            report.change(site, "stays float", str(budget))
        found = search.trials[frozenset(floats)]
        if not floats:
            report.change("all layers", "stay quantized", f"{budget} is met")
        report.note(
            f"{len(floats)} layers in float: {found.describe(budget.metric)}, "
            f"{search.share(floats):.1%} of the linear layers' multiplications quantized"
        )
        if len(search.trials) > 1 and math.isfinite(budget.value(found)):
            report.curves.append(search.curve(floats))
        return without(plan, floats, _WHY)

    def _rank(self, found: Sensitivities, plan: QuantPlan, costs: dict[str, int]) -> list[str]:
        """Candidates, the first to leave in float first."""

        def damage(site: str) -> float:
            bad = found.scores[site].badness(found.metric)
            return bad / max(1, costs.get(site, 1)) if self.order == "compute" else bad

        known = [site for site in plan.sites if site in found.scores]
        return sorted(known, key=lambda site: -damage(site))

    def _match(self, site: SitePlan, types: dict[str, str]) -> str | None:
        for glob in self.layers:
            if fnmatchcase(site.site, glob):
                return f"layers={glob}"
        if types.get(site.site) in self.op_types:
            return f"op-types={types[site.site]}"
        return None

    def _drop_starved(self, plan: QuantPlan, report: PassReport) -> None:
        """Operators between integer kernels fall back to float when a neighbour did."""
        while True:
            coded = {s.output for s in plan.sites.values() if s.output}
            starved = [
                s for s in plan.sites.values() if s.kind == "op" and not coded.issuperset(s.inputs)
            ]
            if not starved:
                return
            for site in starved:
                plan.leave_float(site.site, "a neighbour stays float")
                report.change(site.site, "stays float", "a neighbour stays float")

    def _report_misses(self, plan: QuantPlan, types: dict[str, str], report: PassReport) -> None:
        for glob in self.layers:
            if not any(fnmatchcase(site, glob) for site in plan.sites):
                report.skip(glob, "matches no planned layer")
        planned = {types.get(site) for site in plan.sites}
        for op_type in self.op_types:
            if op_type not in planned:
                report.skip(op_type, "matches no planned layer")
