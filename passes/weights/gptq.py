"""``gptq``: round weights so that the layer's output, not the weight, stays close.

Solver and source: :mod:`onnxq.solvers.gptq` (arXiv 2210.17323). The Hessian ``X^T X`` is taken on
the model as it is at the last ``calibrate``; grids are fixed before rounding starts, so that the
order of the columns leaves no trace in the packed weight.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.errors import InternalError, SpecError
from onnxq.graph.match import Linear, analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.lower.weights import integer_format
from onnxq.passes.plan import SitePlan
from onnxq.passes.weights.rounded import RoundedWeight, RoundedWeights
from onnxq.solvers.gptq import gptq
from onnxq.solvers.grid import Solution
from onnxq.solvers.hessian import output_error
from onnxq.solvers.scale_search import mse_params

Array = npt.NDArray[Any]

SHRINK = tuple(1.0 - 0.03 * i for i in range(11))
"""Candidate factors on the range of a group."""


@dataclass(frozen=True)
class Gptq(Pass):
    """Round the planned weights of MatMul and Gemm layers with GPTQ.

    Args:
        damping: share of the mean diagonal that is added to the Hessian's diagonal; more for
            fewer calibration rows.
        act_order: round the columns with the largest activations first.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "round weights with GPTQ: later columns make up for each error"
    requires: ClassVar = (PLAN, STATISTICS)
    provides: ClassVar = (ROUNDED,)
    tolerance: ClassVar[float | None] = 0.0

    damping: float = 0.05
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise SpecError("SPEC-RANGE", f"damping={self.damping} is not above 0 and at most 1")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """The second moment of every layer's input."""
        inputs = (str(layer.x.name) for layer in analyze(model).linears if layer.kind != "conv")
        return [StatRequest(name, "moment") for name in dict.fromkeys(inputs)]

    def candidates(self, model: ir.Model) -> list[str]:
        """MatMul and Gemm layers."""
        return [layer.name for layer in analyze(model).linears if layer.kind != "conv"]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Round layer by layer; the graph is left alone, lowering takes the codes."""
        report = PassReport()
        plan, statistics = ctx.artifacts.get(PLAN), ctx.artifacts.get(STATISTICS)
        rounded = RoundedWeights()
        layers = {layer.name: layer for layer in analyze(model).linears}
        sites = [s for s in plan.sites.values() if s.site in layers]
        for done, site in enumerate(sites):
            ctx.progress("gptq", done, len(sites))
            layer = layers[site.site]
            if layer.kind == "conv":
                report.skip(site.site, "Conv is rounded to nearest")
                continue
            moment = statistics.moment(str(layer.x.name))
            full_range = site.mode == "weight-only" and ctx.target.matmul_nbits
            solution = self._round(layer, site, moment.gram, full_range=full_range)
            rounded.add(site.site, RoundedWeight.of(solution))
            report.change(site.site, "rounded", _gain(layer, solution, moment.gram))
        ctx.progress("gptq", len(sites), len(sites))
        ctx.artifacts.put(ROUNDED, rounded)
        return report

    def _round(self, layer: Linear, site: SitePlan, gram: Array, *, full_range: bool) -> Solution:
        if site.weight is None:
            raise InternalError("PLAN-WEIGHT", f"{site.site} has no weight plan")
        rows = rows_of(layer)
        fmt = integer_format(site.weight.format)
        if full_range and site.weight.symmetric and site.weight.block:
            fmt = dataclasses.replace(fmt, scheme="full")
        elif not site.weight.symmetric:
            fmt = dataclasses.replace(fmt, scheme="asym")
        group = site.weight.block
        importance = np.diag(gram).astype(np.float32)
        params = mse_params(
            rows, fmt, group=group, norm=2, factors=SHRINK, importance=importance
        )
        return gptq(
            rows,
            gram,
            fmt,
            group=group,
            act_order=self.act_order,
            params=params,
            damp=self.damping,
        )


def rows_of(layer: Linear) -> Array:
    """The weight as ``[N, K]``, one row an output channel."""
    stored = layer.w
    return stored if layer.in_axis == 1 else np.ascontiguousarray(stored.T)


def _gain(layer: Linear, solution: Solution, gram: Array) -> str:
    """Output SQNR of the rounded layer on the calibration rows."""
    error = output_error(rows_of(layer), solution.values(), gram)
    return f"output SQNR {-10 * np.log10(error):.1f} dB" if error > 0 else "exact"
