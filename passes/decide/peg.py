"""``peg``: per-embedding-group ranges for the inputs of linear layers.

A few channels of a transformer's residual stream are many times as large as the others, always the
same ones. The channels of an input are sorted by their calibrated range and cut into K groups of
equal size, each with a scale and zero point of its own; the product becomes K integer products,
which share the weight's scales and are summed (Bondarenko et al., arXiv 2109.12948, section 4.3).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import ChannelStat
from onnxq.errors import SpecError
from onnxq.graph.match import Linear, analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.plan import InputPart, QuantPlan, SitePlan, ValuePlan

Places = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Peg(Pass):
    """Give groups of input channels ranges of their own.

    Args:
        groups: K.
        spread: least ratio of the whole range to the median range of the groups; with less, one
            range serves a layer well enough.
        margin: factor on the ends of a group's range, never beyond the whole range: the extremes
            of a few channels over a few samples are soon passed, and clipping costs more than a
            coarser step.
        permute: sort channels by range before they are cut into groups; else neighbours share one.
    """

    name: ClassVar[str] = "peg"
    summary: ClassVar[str] = "a range for each group of input channels, sorted by range"
    requires: ClassVar = (PLAN, STATISTICS)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0

    groups: int = 6
    spread: float = 4.0
    margin: float = 2.0
    permute: bool = True

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise SpecError("SPEC-RANGE", f"groups={self.groups} is below 2", "6 is usual")
        if self.margin < 1:
            raise SpecError("SPEC-RANGE", f"margin={self.margin} is below 1", "2 is usual")
        if self.spread < 1:
            raise SpecError("SPEC-RANGE", f"spread={self.spread} is below 1", "4 is usual")

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
            site = splittable(linear, plan, report, modes=("static",))
            if site is None:
                continue
            value = plan.values[site.inputs[0]]
            stat = statistics.channel(str(linear.x.name), axis=-1)
            groups = self._groups(stat)
            if len(groups) < self.groups:
                report.skip(linear.name, "it has fewer input channels than groups")
                continue
            parts = tuple(static_part(group, stat, value, self.margin) for group in groups)
            median = float(np.median([part.hi - part.lo for part in parts]))
            spread = (value.hi - value.lo) / median if median else np.inf
            if spread < self.spread:
                report.skip(linear.name, "the ranges of its channels are alike")
                continue
            plan.add(dataclasses.replace(site, parts=parts, by=self.name))
            report.change(linear.name, f"{len(parts)} groups", f"ranges differ {spread:.1f} times")
        ctx.artifacts.put(PLAN, plan)
        return report

    def _groups(self, stat: ChannelStat) -> list[Places]:
        """Channels of each group in rising order, K groups whose sizes differ by one at most."""
        order = np.argsort(spans(stat), kind="stable") if self.permute else np.arange(len(stat.lo))
        pieces = np.array_split(order, self.groups)
        return [np.sort(piece) for piece in pieces if len(piece)]


def channel_requests(model: ir.Model) -> list[StatRequest]:
    """Statistics of the input channels of matrix products."""
    linears = analyze(model).linears
    names = dict.fromkeys(str(x.x.name) for x in linears if x.kind == "matmul")
    return [StatRequest(name, "channel", axis=-1) for name in names]


def splittable(
    linear: Linear, plan: QuantPlan, report: PassReport, modes: tuple[str, ...]
) -> SitePlan | None:
    """The plan of ``linear`` if its input can be split; else its reason goes into the report."""
    site = plan.sites.get(linear.name)
    if site is None:
        report.skip(linear.name, "it is not in the plan")
    elif linear.kind != "matmul":
        report.skip(linear.name, f"{linear.kind}: only matrix products are split")
    elif site.mode not in modes:
        report.skip(linear.name, f"mode {site.mode} has no fixed range to split")
    elif site.parts:
        report.skip(linear.name, "its input is split already")
    else:
        return site
    return None


def spans(stat: ChannelStat) -> npt.NDArray[np.float64]:
    """Range of each channel, zero where nothing was seen."""
    seen = stat.count > 0
    return np.where(seen, np.maximum(stat.hi, 0) - np.minimum(stat.lo, 0), 0.0)


def static_part(columns: Places, stat: ChannelStat, value: ValuePlan, margin: float) -> InputPart:
    """Columns with their own range, times ``margin``, never wider than that of the whole value."""
    seen = columns[stat.count[columns] > 0]
    lo = float(stat.lo[seen].min()) if len(seen) else 0.0
    hi = float(stat.hi[seen].max()) if len(seen) else 0.0
    return InputPart(
        tuple(int(c) for c in columns),
        value.format,
        max(margin * min(lo, 0.0), value.lo),
        min(margin * max(hi, 0.0), value.hi),
        value.symmetric,
    )
