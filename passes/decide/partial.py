"""``partial``: leave chosen layers in float.

The simplest form of partial quantization (Wu et al., arXiv 2004.09602, section 5.1): the user
names layers by glob or operator type, and the plan drops them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_ir as ir

from onnxq.errors import SpecError
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN
from onnxq.passes.plan import QuantPlan, SitePlan
from onnxq.passes.sites import site_names


@dataclass(frozen=True)
class Partial(Pass):
    """Leave layers in float, by name or type.

    Args:
        layers: globs of site names, as ``assign`` lists them.
        op_types: operator types, for example ``Conv``.
    """

    name: ClassVar[str] = "partial"
    summary: ClassVar[str] = "leave the layers that match a glob or an operator type in float"
    requires: ClassVar = (PLAN,)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0

    layers: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers and not self.op_types:
            raise SpecError(
                "SPEC-EMPTY",
                "`partial` needs layers or op-types",
                'for example partial{layers=["*/layer.0/*"]}',
            )

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Drop the matching sites from the plan."""
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
        return report

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
