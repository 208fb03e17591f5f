"""``shift-scale``: centre activation channels and shrink those that reach too far.

Rewrites ``x W + b`` to ``((x - z) / s)(diag(s) W) + (b + z W)`` (Outlier Suppression+,
arXiv 2304.09145); how z and s are found is in :mod:`onnxq.solvers.shift_scale`::

    norm         gamma <- gamma / s,  beta <- (beta - z) / s      shift and scale
    value, up    W <- W diag(1/s),  b <- b / s                    scale only

An RMSNorm has no beta, so it takes the scale only, and so do sites of other writers. Sites are
those of :mod:`onnxq.passes.transform.scaling_sites` that leave no multiplication behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import SpecError
from onnxq.formats import IntFormat
from onnxq.graph.match import analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.fold_norm import FOLDED_NORMS
from onnxq.passes.transform.folding import (
    Float64,
    bias64,
    norm_vector,
    put_bias,
    put_norm_vector,
    weight64,
)
from onnxq.passes.transform.scaling_sites import ScalingSite, apply_scale, find_scaling_sites
from onnxq.solvers.shift_scale import ShiftScale as Found
from onnxq.solvers.shift_scale import search_shift_scale

_UINT8 = IntFormat(8, signed=False)
_INT8 = IntFormat(8, signed=True)


@dataclass(frozen=True)
class ShiftScale(Pass):
    """Shift and scale activation channels, folded into norms and layers.

    Args:
        shift: also shift, where a beta can take it.
        min_gain_db: least gain for which a site is changed.
        rows: rows of each activation kept for the search.
    """

    name: ClassVar[str] = "shift-scale"
    summary: ClassVar[str] = "centre and shrink activation channels (Outlier Suppression+)"
    requires: ClassVar = (STATISTICS,)
    invalidates: ClassVar = (STATISTICS, FOLDED_NORMS)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    shift: bool = True
    min_gain_db: float = 0.1
    rows: int = 1024

    def __post_init__(self) -> None:
        if self.rows < 16:
            raise SpecError("SPEC-RANGE", f"rows={self.rows} is too few to search on; 16 at least")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Channel extremes and rows of each site's activation."""
        wanted: list[StatRequest] = []
        for site in _sites(model)[0]:
            wanted.append(StatRequest(str(site.x.name), "channel"))
            wanted.append(StatRequest(str(site.x.name), "rows", limit=self.rows))
        return wanted

    def candidates(self, model: ir.Model) -> list[str]:
        """The sites, by their first reader."""
        return [site.name for site in _sites(model)[0]]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Change every site for which it pays."""
        report = PassReport()
        statistics = ctx.artifacts.get(STATISTICS)
        sites, others = _sites(model)
        for site in others:
            report.skip(site.name, "nothing that writes the input can take 1/s")
        if not sites and not others:
            report.skip("the model", "it has no matrix product with a constant weight")
        names = [site.name for site in sites]
        for done, name in enumerate(names):
            ctx.progress("shift-scale", done, len(names))
            site = next(s for s in sites if s.name == name)
            found = self._search(site, statistics)
            if found.is_idle or found.gain_db < self.min_gain_db:
                report.skip(site.name, f"gain below {self.min_gain_db:g} dB on unseen rows")
            elif ctx.budget.take(site.name):
                _apply(model, site, found)
                what = "shift and scale" if found.shift.any() else "scale"
                report.change(site.name, f"{what} in the {site.writer}", f"{found.gain_db:+.1f} dB")
                sites, _ = _sites(model)
        ctx.progress("shift-scale", len(names), len(names))
        return report

    def _search(self, site: ScalingSite, statistics: Statistics) -> Found:
        name = str(site.x.name)
        channel = statistics.channel(name)
        return search_shift_scale(
            statistics.rows(name).rows,
            channel.lo,
            channel.hi,
            site.weight(),
            may_shift=self.shift and site.norm is not None and site.norm.beta is not None,
            activation=_UINT8,
            weight_format=_INT8,
        )


def _sites(model: ir.Model) -> tuple[list[ScalingSite], list[ScalingSite]]:
    """Sites that leave nothing behind, and the others."""
    sites, _ = find_scaling_sites(analyze(model))
    return [s for s in sites if s.writer != "mul"], [s for s in sites if s.writer == "mul"]


def _apply(model: ir.Model, site: ScalingSite, found: Found) -> None:
    """Shift, then scale: ``b + z W`` with the weights as they are, and beta - z."""
    if found.shift.any():
        _shift(site, found.shift)
        # Constants that others read too were copied, and readers may have a new Add.
        site = next(s for s in _sites(model)[0] if s.x is site.x)
    apply_scale(model.graph, site, site.constrain(found.scale.astype(np.float32)))


def _shift(site: ScalingSite, shift: Float64) -> None:
    assert site.norm is not None
    beta = norm_vector(site.norm.beta)
    assert beta is not None
    assert site.norm.beta is not None
    put_norm_vector(site.norm, site.norm.beta, beta - shift)
    for reader in site.readers:
        moved = reader.alpha * (shift @ weight64(reader))
        bias = bias64(reader)
        put_bias(reader, moved if bias is None else bias + moved)
