"""``smooth-quant``: even out the channels of activations, at the weights' expense.

Rewrites ``x W`` to ``(x / s) (diag(s) W)`` with ``s_j = amax_j^alpha / wmax_j^(1 - alpha)``
(SmoothQuant, arXiv 2211.10438). ``1 / s`` is folded into the norm, value layer or up projection
that wrote ``x`` where the algebra allows; elsewhere one Mul remains, and only where it pays.
The rule for ``s`` and the search for alpha are in :mod:`onnxq.solvers.smooth`; the sites in
:mod:`onnxq.passes.transform.scaling_sites`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import SpecError
from onnxq.formats import IntFormat
from onnxq.graph.match import analyze
from onnxq.passes.contract import Budget, Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.fold_norm import FOLDED_NORMS
from onnxq.passes.transform.scaling_sites import (
    Float,
    ScalingSite,
    apply_scale,
    find_scaling_sites,
)
from onnxq.solvers.smooth import MIN_ROWS, search_smoothing, smoothing_scale

_UINT8 = IntFormat(8, signed=False)
_INT8 = IntFormat(8, signed=True)


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Move the range of activation channels into the weights that read them.

    Args:
        alpha: share of the range that moves, 0 to 1, or ``auto``: searched for each site.
        mul: where ``1 / s`` cannot be folded, leave a Mul if it lowers the error of the quantized
            product by ``min-gain-db`` at least; ``none`` never leaves one.
        min_gain_db: see ``mul``; needs ``alpha=auto``.
        rows: rows of each activation kept for the search.
    """

    name: ClassVar[str] = "smooth-quant"
    summary: ClassVar[str] = "even out activation channels, folded into norms and weights"
    requires: ClassVar = (STATISTICS,)
    invalidates: ClassVar = (STATISTICS, FOLDED_NORMS)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    alpha: float | Literal["auto"] = "auto"
    mul: Literal["gain", "none"] = "gain"
    min_gain_db: float = 3.5
    rows: int = 1024

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0.0 <= self.alpha <= 1.0:
            raise SpecError("SPEC-RANGE", f"alpha={self.alpha} is not between 0 and 1")
        if self.rows < 16:
            raise SpecError("SPEC-RANGE", f"rows={self.rows} is too few to search on; 16 at least")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Channel ranges of each site's activation, and rows of it for the search."""
        sites, _ = find_scaling_sites(analyze(model))
        wanted: list[StatRequest] = []
        for site in sites:
            wanted.append(StatRequest(str(site.x.name), "channel"))
            if self.alpha == "auto":
                wanted.append(StatRequest(str(site.x.name), "rows", limit=self.rows))
        return wanted

    def candidates(self, model: ir.Model) -> list[str]:
        """The sites, by their first reader."""
        return [site.name for site in find_scaling_sites(analyze(model))[0]]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Scale every site for which it pays."""
        report = PassReport()
        statistics = ctx.artifacts.get(STATISTICS)
        sites, skipped = find_scaling_sites(analyze(model))
        report.skipped.extend(skipped)
        if not sites and not skipped:
            report.skip("the model", "it has no matrix product with a constant weight")
        for done, site in enumerate(sites):
            ctx.progress("smooth-quant", done, len(sites))
            self._smooth(model.graph, site, statistics, report, ctx.budget)
        ctx.progress("smooth-quant", len(sites), len(sites))
        return report

    def _smooth(
        self,
        graph: ir.Graph,
        site: ScalingSite,
        statistics: Statistics,
        report: PassReport,
        budget: Budget,
    ) -> None:
        if site.writer == "mul" and self.mul == "none":
            report.skip(site.name, "1/s cannot be folded, and mul=none")
            return
        scale, what = self._choose(site, statistics)
        if scale is None:
            report.skip(site.name, what)
            return
        if not budget.take(site.name):
            return
        apply_scale(graph, site, site.constrain(scale))
        places = {"norm": "norm", "value": "value layer", "up": "up layer", "mul": "a Mul"}
        report.change(site.name, f"1/s in {places[site.writer]}", what)

    def _choose(self, site: ScalingSite, statistics: Statistics) -> tuple[Float | None, str]:
        """The scale and how it came about, or None and why there is none."""
        name = str(site.x.name)
        channel = statistics.channel(name)
        largest = np.maximum(np.abs(channel.lo), np.abs(channel.hi))
        amax = np.where(channel.count > 0, largest, 0.0).astype(np.float32)
        weight = site.weight()
        if self.alpha != "auto":
            wmax = np.abs(weight).max(axis=1)
            return smoothing_scale(amax, wmax, self.alpha), f"alpha {self.alpha:g}"
        rows = statistics.rows(name).rows
        if len(rows) < MIN_ROWS:
            return None, f"{len(rows)} calibration rows are too few to search on"
        found = search_smoothing(rows, amax, weight, _UINT8, _INT8)
        if found.alpha is None:
            return None, "no alpha lowers the error on unseen rows"
        if site.writer == "mul" and found.gain_db < self.min_gain_db:
            return None, f"a Mul would gain {found.gain_db:.1f} dB, less than {self.min_gain_db:g}"
        return found.scale, f"alpha {found.alpha:g}, {found.gain_db:+.1f} dB"
