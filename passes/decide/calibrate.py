"""``calibrate``: one sweep over the calibration samples for all passes that follow.

Each later pass says which statistics of which values it wants (``Pass.requests``); they are
collected together, up to and including the first pass that invalidates them. How a clipping range
is read off the statistics is decided here too, so that every format and pass uses one rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxq.calibration.collect import collect
from onnxq.calibration.ranges import choose_range
from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import SpecError
from onnxq.formats import IntFormat
from onnxq.passes.contract import Context, Key, Pass, PassReport
from onnxq.passes.keys import STATISTICS

Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]


@dataclass(frozen=True)
class RangeRule:
    """How a clipping range is read off the statistics of one value.

    Args:
        method: min-max and moving average need ranges, the others histograms.
        percentile: share of elements kept, in percent, for ``percentile``.
        margin: factor on both ends, for values that the calibration samples did not show.
    """

    method: Method
    percentile: float
    margin: float

    def range_of(
        self, statistics: Statistics, value: str, fmt: IntFormat, *, symmetric: bool
    ) -> tuple[float, float]:
        """The range of ``value`` that codes of ``fmt`` should cover."""
        needs_range = self.method in ("minmax", "moving-average")
        stat = statistics.range(value) if needs_range else statistics.histogram(value)
        lo, hi = choose_range(
            stat, self.method, fmt, symmetric=symmetric, percentile=self.percentile
        )
        return lo * self.margin, hi * self.margin

    def to_storage(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The rule as JSON."""
        return dataclasses.asdict(self), {}

    @classmethod
    def from_storage(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> RangeRule:
        """The inverse of :meth:`to_storage`."""
        return cls(**header)


RANGE_RULE: Key[RangeRule] = Key("range-rule", RangeRule, "how ranges are read off statistics")


@dataclass(frozen=True)
class Calibrate(Pass):
    """Run the calibration samples through the model and keep what later passes ask for.

    Args:
        method: how activation ranges are chosen; every method streams.
        percentile: share of elements inside the range, in percent, for ``method=percentile``.
        margin: factor on the ends of every range; calibration sets are small, and a value
            outside of the range costs more than a slightly coarser step.
    """

    name: ClassVar[str] = "calibrate"
    summary: ClassVar[str] = "collect activation statistics in one sweep for all later passes"
    provides: ClassVar = (STATISTICS, RANGE_RULE)
    tolerance: ClassVar[float | None] = 0.0
    needs_data: ClassVar[bool] = True

    method: Method = "minmax"
    percentile: float = 99.99
    margin: float = 1.05

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise SpecError(
                "SPEC-RANGE", f"percentile={self.percentile} is not above 50 and at most 100"
            )
        if not 0.1 <= self.margin <= 10.0:
            raise SpecError("SPEC-RANGE", f"margin={self.margin} is not between 0.1 and 10")

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Sweep once and store the statistics."""
        report = PassReport()
        wanted = self._wanted(model, ctx.upcoming)
        if ctx.data is None or not wanted:
            ctx.artifacts.put(STATISTICS, Statistics())
            ctx.artifacts.put(RANGE_RULE, self._rule())
            report.note("no later pass asks for statistics")
            return report
        statistics = collect(model, wanted, ctx.data, threads=ctx.threads, progress=ctx.progress)
        ctx.artifacts.put(STATISTICS, statistics)
        ctx.artifacts.put(RANGE_RULE, self._rule())
        for request in wanted:
            report.change(request.value, f"{request.kind} statistics")
        report.note(f"{len(ctx.data)} samples from {ctx.data.source}")
        return report

    def _rule(self) -> RangeRule:
        return RangeRule(self.method, self.percentile, self.margin)

    def _wanted(self, model: ir.Model, upcoming: Sequence[Pass]) -> list[StatRequest]:
        """Requests of all passes up to the one that makes these statistics stale."""
        wanted: dict[StatRequest, None] = {}
        for later in upcoming:
            for request in later.requests(model):
                wanted[self._as_needed(request)] = None
            if STATISTICS in later.invalidates or STATISTICS in later.provides:
                break
        return list(wanted)

    def _as_needed(self, request: StatRequest) -> StatRequest:
        """A clipping range by a histogram method needs a histogram."""
        if request.kind == "range" and self.method not in ("minmax", "moving-average"):
            return dataclasses.replace(request, kind="histogram")
        return request
