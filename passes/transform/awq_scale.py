"""``awq-scale``: protect the weight columns with large inputs before weights are rounded.

Rewrites ``x W`` to ``(x / s)(diag(s) W)`` with ``s = mean|x|^r`` (with ``duo`` divided by
``rms(w)^(1 - r)``), r searched for each site with the
format and group that the weights will have (:mod:`onnxq.solvers.awq`). ``1 / s`` is folded into the
norm, value layer or up projection that wrote ``x``
(:mod:`onnxq.passes.transform.scaling_sites`); where nothing can take it, the site is left alone: a
multiplication at run time would cost what weight-only quantization is to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.errors import SpecError
from onnxq.formats import Format, parse_format
from onnxq.graph.match import analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.decide.assign import Assign
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.fold_norm import FOLDED_NORMS
from onnxq.passes.transform.scaling_sites import ScalingSite, apply_scale, find_scaling_sites
from onnxq.solvers.awq import STEPS, search_awq

_PLACES = {"norm": "norm", "value": "value layer", "up": "up layer"}


@dataclass(frozen=True)
class AwqScale(Pass):
    """Scale weight columns by the size of their inputs, folded into what wrote the inputs.

    Args:
        weights: format that the search rounds to; ``auto``: that of the ``assign`` which follows,
            or int4.
        block: columns that share a scale in the search, 0 for whole rows; -1: as ``weights=auto``,
            or 32.
        duo: let the columns' own size count beside that of their inputs, as AutoAWQ does; for
            formats with few exponents (MXFP6, MXFP4).
        steps: values of r that are tried.
    """

    name: ClassVar[str] = "awq-scale"
    summary: ClassVar[str] = "scale weight columns by their inputs before rounding (AWQ)"
    requires: ClassVar = (STATISTICS,)
    invalidates: ClassVar = (STATISTICS, FOLDED_NORMS)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    weights: str = "auto"
    block: int = -1
    duo: bool = False
    steps: int = STEPS

    def __post_init__(self) -> None:
        if self.weights != "auto":
            parse_format(self.weights)
        if self.block < -1:
            raise SpecError("SPEC-RANGE", f"block={self.block} is below -1")
        if self.steps < 2:
            raise SpecError("SPEC-RANGE", f"steps={self.steps} is below 2")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Channel means and second moments of each site's activation."""
        names = [str(site.x.name) for site in _sites(model)[0]]
        return [StatRequest(name, kind) for name in names for kind in ("channel", "moment")]

    def candidates(self, model: ir.Model) -> list[str]:
        """The sites, by their first reader."""
        return [site.name for site in _sites(model)[0]]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Scale every site where the rounded layers come closer to the exact ones."""
        report = PassReport()
        statistics = ctx.artifacts.get(STATISTICS)
        fmt, group = self._target(ctx)
        sites, others = _sites(model)
        for site in others:
            report.skip(site.name, "nothing that writes the input can take 1/s")
        if not sites and not others:
            report.skip("the model", "it has no matrix product with a constant weight")
        for done, site in enumerate(sites):
            ctx.progress("awq-scale", done, len(sites))
            name = str(site.x.name)
            found = search_awq(
                statistics.channel(name).mean_abs,
                statistics.moment(name).gram,
                np.ascontiguousarray(site.weight().T),
                fmt,
                group,
                duo=self.duo,
                steps=self.steps,
                constrain=site.constrain,
            )
            if not found.changes:
                report.skip(site.name, "no scale lowers the error of the rounded layers")
            elif ctx.budget.take(site.name):
                apply_scale(model.graph, site, found.scale)
                what = f"r {found.ratio:g}, {found.gain_db:+.1f} dB"
                report.change(site.name, f"1/s in the {_PLACES[site.writer]}", what)
        ctx.progress("awq-scale", len(sites), len(sites))
        report.note(f"searched with {fmt}, {group or 'no'} columns a scale")
        return report

    def _target(self, ctx: Context) -> tuple[Format, int]:
        """Format and group of the weights, from the options or the ``assign`` that follows."""
        assign = next((p for p in ctx.upcoming if isinstance(p, Assign)), None)
        planned = "int4" if assign is None else assign.weights_on(ctx.target)
        fmt = parse_format(planned if self.weights == "auto" else self.weights)
        group = None if assign is None else assign.block
        if group is None:
            group = ctx.target.blocks_for(fmt, 0) or 0
        return fmt, group if self.block < 0 else self.block


def _sites(model: ir.Model) -> tuple[list[ScalingSite], list[ScalingSite]]:
    """Sites whose scale can be folded, and those where it cannot."""
    sites, _ = find_scaling_sites(analyze(model))
    return [s for s in sites if s.writer != "mul"], [s for s in sites if s.writer == "mul"]
