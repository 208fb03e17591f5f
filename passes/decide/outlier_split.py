"""``outlier-split``: multiply the few input columns that hold outliers in float (LLM.int8()).

Columns whose calibrated magnitude reaches a threshold are taken out of the rounded input: the scale
of the others is no longer set by them, and they are multiplied by their rows of the weight in float
(Dettmers et al., arXiv 2208.07339). Here the columns are fixed when the model is made; ``pack``
looks for them in every call, with a threshold of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import ChannelStat
from onnxq.errors import SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.decide.peg import Places, channel_requests, splittable, static_part
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.plan import InputPart, QuantPlan, SitePlan


@dataclass(frozen=True)
class OutlierSplit(Pass):
    """Leave outlier columns in float.

    Args:
        threshold: magnitude from which on a column holds outliers.
        relative: the threshold counts medians of the columns' magnitudes, not ones.
        margin: factor on the ends of the range of the other columns, never beyond the whole range.
        max_share: most columns that are left in float, as a share; the largest are.
    """

    name: ClassVar[str] = "outlier-split"
    summary: ClassVar[str] = "multiply input columns that hold outliers in float (LLM.int8())"
    requires: ClassVar = (PLAN, STATISTICS)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0

    threshold: float = 6.0
    relative: bool = False
    max_share: float = 0.02
    margin: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.threshold < np.inf:
            raise SpecError("SPEC-RANGE", f"threshold={self.threshold} is no magnitude", "try 6")
        if self.margin < 1:
            raise SpecError("SPEC-RANGE", f"margin={self.margin} is below 1", "1.2 is usual")
        if not 0 < self.max_share < 1:
            raise SpecError("SPEC-RANGE", f"max-share={self.max_share} is not between 0 and 1")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Ranges of the input channels of matrix products."""
        return channel_requests(model)

    def candidates(self, model: ir.Model) -> list[str]:
        """Matrix products."""
        return [linear.name for linear in analyze(model).linears if linear.kind == "matmul"]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Split the inputs of layers in the plan."""
        report = PassReport()
        plan, statistics = ctx.artifacts.get(PLAN), ctx.artifacts.get(STATISTICS)
        if not plan.sites:
            report.skip("the plan", "has no layer to split")
        for linear in analyze(model).linears:
            site = splittable(linear, plan, report, modes=("static", "dynamic"))
            if site is None:
                continue
            stat = statistics.channel(str(linear.x.name), axis=-1)
            outliers, limit = self._outliers(stat)
            if not len(outliers):
                report.skip(linear.name, "no column reaches the threshold")
                continue
            plan.add(dataclasses.replace(site, parts=self._parts(site, plan, stat, outliers)))
            cut = "" if len(outliers) == limit else f" of {limit} that reach the threshold"
            report.change(linear.name, f"{len(outliers)} columns in float{cut}")
        ctx.artifacts.put(PLAN, plan)
        return report

    def _outliers(self, stat: ChannelStat) -> tuple[Places, int]:
        """The columns to leave in float, rising, and how many reach the threshold."""
        size = np.where(stat.count > 0, np.maximum(stat.hi, -stat.lo), 0.0)
        limit = self.threshold * (float(np.median(size)) if self.relative else 1.0)
        found = np.flatnonzero(size >= limit) if limit > 0 else np.zeros(0, np.intp)
        most = max(1, int(self.max_share * len(size)))
        largest = found[np.argsort(-size[found], kind="stable")][:most]
        return np.sort(largest), len(found)

    def _parts(
        self, site: SitePlan, plan: QuantPlan, stat: ChannelStat, outliers: Places
    ) -> tuple[InputPart, ...]:
        rest = np.setdiff1d(np.arange(len(stat.lo)), outliers)
        columns = tuple(int(c) for c in outliers)
        if site.mode == "static":
            inner = static_part(rest, stat, plan.values[site.inputs[0]], self.margin)
        else:
            inner = InputPart(tuple(int(c) for c in rest), "uint8")
        return (inner, InputPart(columns, "float"))
