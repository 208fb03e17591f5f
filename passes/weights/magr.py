"""``magr``: make the largest weights smaller where the inputs do not notice.

Solver and source: :mod:`onnxq.solvers.magr` (Zhang et al., arXiv 2406.00800). For 3 bits and fewer:
a smaller range has finer steps. The weights that it leaves are rounded by a later pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.errors import SpecError
from onnxq.graph.match import Linear, analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import ROUNDED, STATISTICS
from onnxq.passes.lower.weights import rows_of
from onnxq.passes.naming import about
from onnxq.passes.transform.folding import put_weight
from onnxq.solvers.hessian import output_error
from onnxq.solvers.magr import STEPS, magr


@dataclass(frozen=True)
class MagR(Pass):
    """Shrink the extremes of MatMul and Gemm weights.

    Args:
        alpha: strength; 0.001 in front of GPTQ, up to 0.03 in front of rounding to nearest.
        steps: proximal gradient steps.
        layers: globs of the layers; all by default.
    """

    name: ClassVar[str] = "magr"
    summary: ClassVar[str] = "shrink the largest weights where the inputs do not notice (MagR)"
    requires: ClassVar = (STATISTICS,)
    forbids: ClassVar = (ROUNDED,)
    tolerance: ClassVar[float | None] = None

    alpha: float = 0.001
    steps: int = STEPS
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0 or self.steps < 1:
            raise SpecError(
                "SPEC-RANGE",
                f"alpha={self.alpha} steps={self.steps}: alpha is above 0 and at most 1, steps "
                "are at least 1",
            )

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """The second moment of every layer's input."""
        names = (str(layer.x.name) for layer in self._chosen(model))
        return [StatRequest(name, "moment") for name in dict.fromkeys(names)]

    def candidates(self, model: ir.Model) -> list[str]:
        """MatMul and Gemm layers."""
        return [layer.name for layer in self._chosen(model)]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Shrink layer by layer."""
        report = PassReport()
        statistics = ctx.artifacts.get(STATISTICS)
        chosen = self._chosen(model)
        for done, layer in enumerate(chosen):
            ctx.progress(self.name, done, len(chosen))
            if layer.is_weight_shared:
                report.skip(layer.name, "its weight has other readers, with other inputs")
                continue
            if not ctx.budget.take(layer.name):
                continue
            rows = rows_of(layer)
            gram = statistics.moment(str(layer.x.name)).gram
            with about(layer.name):
                smaller = magr(rows, gram, alpha=self.alpha, steps=self.steps)
            put_weight(layer, smaller.T.astype(np.float64))
            before, after = np.abs(rows).max(initial=0), np.abs(smaller).max(initial=0)
            error = output_error(rows, smaller, gram)
            quality = f"output SQNR {-10 * np.log10(error):.1f} dB" if error > 0 else "exact"
            report.change(layer.name, f"largest weight {before:.3g} to {after:.3g}", quality)
        ctx.progress(self.name, len(chosen), len(chosen))
        return report

    def _chosen(self, model: ir.Model) -> list[Linear]:
        return [
            layer
            for layer in analyze(model).linears
            if layer.kind != "conv"
            and (not self.layers or any(fnmatchcase(layer.name, g) for g in self.layers))
        ]
