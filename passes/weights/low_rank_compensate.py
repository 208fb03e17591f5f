"""``low-rank-compensate``: give back part of what rounding took, in a thin float branch.

Solver and source: :mod:`onnxq.solvers.low_rank` (EoRA, arXiv 2410.21271): the best branch of a
width in the norm of the layer's inputs, from the error of the weight as it was rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.errors import SpecError
from onnxq.graph.edit import Names
from onnxq.graph.match import Linear, analyze, value_dtype
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.lower.weights import rows_of, to_nearest
from onnxq.passes.naming import about
from onnxq.passes.transform.low_rank_split import add_branch
from onnxq.passes.weights.rounded import RoundedWeights
from onnxq.passes.weights.rounding import format_of
from onnxq.solvers.hessian import output_error
from onnxq.solvers.low_rank import low_rank_compensate


@dataclass(frozen=True)
class LowRankCompensate(Pass):
    """Add a thin float branch to layers whose weights are rounded.

    Args:
        rank: r, width of the branch.
        layers: globs of the layers; all by default.
    """

    name: ClassVar[str] = "low-rank-compensate"
    summary: ClassVar[str] = "add a thin float branch that undoes rounding errors (EoRA)"
    requires: ClassVar = (PLAN, STATISTICS)
    uses: ClassVar = (ROUNDED,)
    provides: ClassVar = (ROUNDED,)
    tolerance: ClassVar[float | None] = None

    rank: int = 32
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError("SPEC-RANGE", f"rank={self.rank} is below 1")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """The second moment of every layer's input."""
        layers = (x for x in analyze(model).linears if x.kind != "conv" and self._wants(x))
        return [StatRequest(n, "moment") for n in dict.fromkeys(str(x.x.name) for x in layers)]

    def candidates(self, model: ir.Model) -> list[str]:
        """MatMul and Gemm layers."""
        return [x.name for x in analyze(model).linears if x.kind != "conv" and self._wants(x)]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Add the branches, layer by layer."""
        report = PassReport()
        plan, statistics = ctx.artifacts.get(PLAN), ctx.artifacts.get(STATISTICS)
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else RoundedWeights()
        names = Names(model.graph)
        layers = {layer.name: layer for layer in analyze(model).linears}
        sites = [s for s in plan.sites.values() if s.site in layers and self._wants(layers[s.site])]
        for done, site in enumerate(sites):
            ctx.progress(self.name, done, len(sites))
            layer = layers[site.site]
            reason = self._reason_against(layer)
            if site.mode != "weight-only" or site.weight is None:
                reason = f"its activations are quantized ({site.mode})"
            if reason is not None:
                report.skip(site.site, reason)
                continue
            if not ctx.budget.take(site.site):
                continue
            assert site.weight is not None
            rows, gram = rows_of(layer), statistics.moment(str(layer.x.name)).gram
            with about(site.site):
                found = rounded.get(site.site)
                if found is None:
                    found = to_nearest(rows, format_of(site, site.weight, ctx), site.weight)
                    rounded.add(site.site, found)  # the very codes that the branch is for
                values = found.values()
                up, down = low_rank_compensate(rows, values, gram, self.rank)
            dtype = (value_dtype(layer.weight) or ir.DataType.FLOAT).numpy()
            left, right = (np.ascontiguousarray(a.T).astype(dtype) for a in (down, up))
            add_branch(model, layer, left, right, names)
            before = output_error(rows, values, gram)
            after = output_error(rows, values + up @ down, gram)
            report.change(site.site, f"rank {len(down)}", f"{_db(before)} to {_db(after)}")
        ctx.progress(self.name, len(sites), len(sites))
        ctx.artifacts.put(ROUNDED, rounded)
        return report

    def _wants(self, layer: Linear) -> bool:
        return not self.layers or any(fnmatchcase(layer.name, glob) for glob in self.layers)

    def _reason_against(self, layer: Linear) -> str | None:
        k, n = layer.in_features, layer.out_features
        if 2 * self.rank > min(k, n):
            return f"a branch of rank {self.rank} is not thin beside {k} x {n}"
        if layer.alpha != 1.0 or layer.beta != 1.0:
            return "Gemm with alpha or beta other than 1"
        return None


def _db(error: float) -> str:
    return f"output SQNR {-10 * np.log10(error):.1f} dB" if error > 0 else "exact"
