"""``assign-format``: for each layer the weight format with the least error at its output.

Every candidate rounds the layer's weight to nearest; with the second moment ``G`` of the layer's
input the squared error of its output is ``tr(D G D')``, ``D = Q(W) - W``, without running anything.
Formats are compared at equal effective bits (codes, scales and zero points together), or the
cheapest mix under a budget is taken. The idea of one family for each layer is MoFQ's (Zhang et al.,
arXiv 2305.12356).
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import PreconditionError, SpecError
from onnxq.formats import Granularity, parse_format
from onnxq.graph.match import Linear, analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.decide.set_format import planned, spell
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.lower.weights import rows_of
from onnxq.passes.naming import about
from onnxq.passes.plan import ANY_WEIGHT, SitePlan, WeightPlan
from onnxq.passes.targets import Target, opset_of
from onnxq.passes.weights.rounding import format_of
from onnxq.solvers.hessian import output_error
from onnxq.solvers.rtn import rtn

SAME_BITS = 0.3
"""Formats whose effective bits differ by no more than this compare as equal."""


@dataclass(frozen=True)
class Option:
    """One candidate for one layer.

    Attributes:
        name: of the format.
        weight: the plan that it would be.
        bits: of the whole weight, scales and zero points included.
        error: squared error of the output relative to the output.
    """

    name: str
    weight: WeightPlan
    bits: float
    error: float


@dataclass(frozen=True)
class AssignFormat(Pass):
    """Choose among formats, layer by layer.

    Args:
        formats: the candidates, with their blocks. Without a budget the first one sets the bits,
            and formats that need more are left out.
        bits: budget: mean bits of a weight, scales included; 0 for none.
        megabytes: budget: 10^6 bytes of all planned layers; 0 for none.
    """

    name: ClassVar[str] = "assign-format"
    summary: ClassVar[str] = "choose each layer's weight format by its output error and a budget"
    requires: ClassVar = (PLAN, STATISTICS)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0

    formats: tuple[str, ...] = ("int4g32", "nvfp4", "mxfp4", "nf4g32")
    bits: float = 0.0
    megabytes: float = 0.0

    def __post_init__(self) -> None:
        for name in self.formats:
            parse_format(name)
        if len(self.formats) < 2:
            raise SpecError("SPEC-EMPTY", "`assign-format` needs at least two formats")
        if min(self.bits, self.megabytes) < 0 or (self.bits and self.megabytes):
            raise SpecError(
                "SPEC-RANGE",
                f"bits={self.bits} megabytes={self.megabytes}: one budget, and not below 0",
            )

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """The second moment of every layer's input."""
        inputs = (str(layer.x.name) for layer in analyze(model).linears if layer.kind != "conv")
        return [StatRequest(name, "moment") for name in dict.fromkeys(inputs)]

    def opset_needed(self, target: Target) -> int:
        """That of the candidate that needs most."""
        found = (parse_format(name) for name in self.formats)
        return max(opset_of(target.form_of(fmt, fmt.block), fmt) for fmt in found)

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Measure all candidates, choose, and write the plan."""
        report = PassReport()
        plan, statistics = ctx.artifacts.get(PLAN), ctx.artifacts.get(STATISTICS)
        layers = {layer.name: layer for layer in analyze(model).linears}
        sites = []
        for site in plan.sites.values():
            if site.site not in layers or site.weight is None:
                continue
            if site.mode not in ANY_WEIGHT:
                report.skip(site.site, f"its activations are quantized ({site.mode})")
                continue
            sites.append(site)
        options: dict[str, list[Option]] = {}
        for done, site in enumerate(sites):
            ctx.progress(self.name, done, len(sites))
            options[site.site] = self._measure(layers[site.site], site, statistics, ctx)
        ctx.progress(self.name, len(sites), len(sites))
        sizes = {s.site: layers[s.site].in_features * layers[s.site].out_features for s in sites}
        chosen = self._choose(options, sizes)
        for site in sites:
            option = chosen[site.site]
            plan.add(_replaced(site, option.weight, self.name))
            report.change(site.site, spell(option.weight), _explain(options[site.site], option))
        if chosen:
            total = sum(o.bits for o in chosen.values())
            counts = Counter(o.name for o in chosen.values()).most_common()
            report.note(
                f"{total / sum(sizes.values()):.3f} bits a weight, {total / 8e6:.2f} MB: "
                + ", ".join(f"{count} {name}" for name, count in counts)
            )
        ctx.artifacts.put(PLAN, plan)
        return report

    def _measure(
        self, layer: Linear, site: SitePlan, statistics: Statistics, ctx: Context
    ) -> list[Option]:
        assert site.weight is not None
        rows = rows_of(layer)
        gram = statistics.moment(str(layer.x.name)).gram
        found = []
        for name in self.formats:
            weight = planned(name, site.weight)
            fmt = format_of(site, weight, ctx)
            with about(layer.name):
                values = rtn(rows, fmt, group=weight.block).values()
            granularity = (
                Granularity.block(1, weight.block) if weight.block else Granularity.per_channel(0)
            )
            bits = fmt.bits_per_element(rows.shape, granularity) * rows.size
            found.append(Option(name, weight, bits, output_error(rows, values, gram)))
        return found

    def _choose(self, options: dict[str, list[Option]], sizes: dict[str, int]) -> dict[str, Option]:
        if not (self.bits or self.megabytes):
            return {
                site: _best_at_equal_bits(found, sizes[site]) for site, found in options.items()
            }
        budget = self.bits * sum(sizes.values()) or self.megabytes * 8e6
        return _under_budget(options, budget)


def _best_at_equal_bits(options: list[Option], elements: int) -> Option:
    limit = options[0].bits + SAME_BITS * elements
    return min((o for o in options if o.bits <= limit), key=lambda o: o.error)


def _under_budget(options: dict[str, list[Option]], budget: float) -> dict[str, Option]:
    """Least sum of relative errors: each layer goes up its convex hull, the best slope first.

    Raises:
        PreconditionError: the smallest candidates do not fit.
    """
    hulls = {site: _hull(found) for site, found in options.items()}
    chosen = dict.fromkeys(hulls, 0)
    used = sum(hull[0].bits for hull in hulls.values())
    if used > budget:
        raise PreconditionError(
            "PASS-BUDGET",
            f"`assign-format`: the smallest candidates need {used / 8e6:.2f} MB, the budget is "
            f"{budget / 8e6:.2f} MB",
            "raise the budget, or add a candidate with fewer bits",
        )
    steps = [(-_slope(hull, 0), site) for site, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, site = heapq.heappop(steps)
        hull, at = hulls[site], chosen[site]
        more = hull[at + 1].bits - hull[at].bits
        if used + more > budget:
            continue
        used += more
        chosen[site] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_slope(hull, at + 1), site))
    return {site: hulls[site][at] for site, at in chosen.items()}


def _hull(options: list[Option]) -> list[Option]:
    """The lower convex hull of (bits, error), by rising bits; the rest is never a good choice."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bits, o.error)):
        if kept and option.error >= kept[-1].error:
            continue
        kept.append(option)
        while len(kept) > 2 and _slope(kept, len(kept) - 3) <= _slope(kept, len(kept) - 2):
            del kept[-2]
    return kept


def _slope(hull: list[Option], at: int) -> float:
    """Error that a bit more saves, from ``at`` to the next."""
    return (hull[at].error - hull[at + 1].error) / (hull[at + 1].bits - hull[at].bits)


def _replaced(site: SitePlan, weight: WeightPlan, by: str) -> SitePlan:
    fields: dict[str, Any] = {**vars(site), "weight": weight, "by": by}
    return SitePlan(**fields)


def _explain(options: list[Option], chosen: Option) -> str:
    """Output SQNR of each candidate, the chosen one first."""
    ordered = [chosen, *(o for o in options if o is not chosen)]
    return ", ".join(f"{o.name} {_decibels(o.error)}" for o in ordered)


def _decibels(error: float) -> str:
    return f"{-10 * np.log10(error):.1f} dB" if error > 0 else "exact"
