"""``smooth-rot``: even out the inputs of layers that close a gated MLP, then rotate them.

A rotation alone spreads one massive channel over all: every channel then lies at one of a few large
values, and the step of the grid with them. A scale in front of it, folded into the up layer, takes
the channel down first (SmoothRot, arXiv 2506.05413)::

    down(x) = x W = ((x / s) R) (R' diag(s) W)        up <- up diag(1 / s)

The scale is searched for each site by the error behind the rotation; see
:func:`onnxq.solvers.smooth.search_rotated_smoothing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import SpecError
from onnxq.formats import IntFormat
from onnxq.graph.match import Structure, analyze
from onnxq.passes.contract import Context, Pass, PassReport, Skip
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.online_hadamard import (
    HadamardBuilder,
    rotate_input,
    why_no_hadamard,
    why_not_here,
)
from onnxq.passes.transform.scaling_sites import ScalingSite, apply_scale, find_scaling_sites
from onnxq.solvers.hadamard import has_hadamard, transform
from onnxq.solvers.smooth import MIN_ROWS, RotatedSmoothing, search_rotated_smoothing


@dataclass(frozen=True)
class SmoothRot(Pass):
    """Scale, then rotate at run time, the inputs of layers that close a gated MLP.

    Args:
        bits: of the integers, activations and weights alike, whose error is made small.
        block: channels that are rotated together; 0 for the whole width.
        rows: rows of each activation kept for the search.
    """

    name: ClassVar[str] = "smooth-rot"
    summary: ClassVar[str] = "scale MLP inner activations into the up layer, then rotate them"
    requires: ClassVar = (STATISTICS,)
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    bits: int = 4
    block: int = 0
    rows: int = 384

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError("SPEC-RANGE", f"bits={self.bits} is not between 2 and 8")
        if self.rows < 16:
            raise SpecError("SPEC-RANGE", f"rows={self.rows} is too few to search on; 16 at least")
        if self.block and not has_hadamard(self.block):
            raise SpecError(
                "SPEC-RANGE",
                f"block={self.block}: no Hadamard matrix of that order can be constructed",
                "powers of two always can",
            )

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Rows of what each closing layer reads."""
        sites, _ = _sites(analyze(model))
        return [StatRequest(str(site.x.name), "rows", limit=self.rows) for site in sites]

    def candidates(self, model: ir.Model) -> list[str]:
        """Layers that close a gated MLP."""
        return [site.name for site in _sites(analyze(model))[0]]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Scale and rotate every site that allows it."""
        report = PassReport()
        reason = why_not_here(model)
        if reason is not None:
            report.skip("the model", reason)
            return report
        structure = analyze(model)
        sites, skipped = _sites(structure)
        report.skipped.extend(skipped)
        if not sites and not skipped:
            report.skip("down", "the graph has no gated MLP; `online-hadamard` rotates others")
        statistics = ctx.artifacts.get(STATISTICS)
        builder = HadamardBuilder(model, structure)
        for done, site in enumerate(sites):
            ctx.progress(self.name, done, len(sites))
            reason = why_no_hadamard(site.channels, self.block)
            if reason is not None:
                report.skip(site.name, reason)
            elif ctx.budget.take(site.name):
                found = self._search(site, statistics)
                apply_scale(model.graph, site, found.scale)
                order = self.block or site.channels
                rotate_input(site.readers[0], order, builder)
                report.change(site.name, f"R4: Hadamard of order {order}", _describe(found))
        ctx.progress(self.name, len(sites), len(sites))
        return report

    def _search(self, site: ScalingSite, statistics: Statistics) -> RotatedSmoothing:
        fmt = IntFormat(self.bits)
        rows = statistics.rows(str(site.x.name)).rows
        return search_rotated_smoothing(
            rows, site.weight(), lambda x: transform(x, self.block), fmt, fmt
        )


def _sites(structure: Structure) -> tuple[list[ScalingSite], list[Skip]]:
    """Sites whose scale goes into the up layer, and why other MLPs are none."""
    sites, skipped = find_scaling_sites(structure)
    closing = {mlp.down.name for mlp in structure.gated_mlps}
    return (
        [site for site in sites if site.writer == "up"],
        [skip for skip in skipped if skip.site in closing],
    )


def _describe(found: RotatedSmoothing) -> str:
    if found.alpha is None:
        return "best unscaled" if found.measure else f"unscaled: fewer than {MIN_ROWS} rows"
    return f"alpha {found.alpha:g} of {found.measure}, {found.gain_db:+.1f} dB"
