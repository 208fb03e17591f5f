"""What all passes that round weights share: which layers, which grid, what is reported.

A rounding pass reads the plan and the second moment ``X^T X`` of every layer's input, asks its
solver for codes and scales, and leaves them for the lowering pass; the graph is not touched.
Several may follow each other, each on its own layers; where they overlap, the later one counts.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.formats import Format, IntFormat, Params, parse_format
from onnxq.graph.match import Linear, analyze
from onnxq.passes.contract import Context, Key, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.lower.weights import grid_format
from onnxq.passes.naming import about
from onnxq.passes.plan import SitePlan, WeightPlan
from onnxq.passes.weights.rounded import RoundedWeight, RoundedWeights
from onnxq.solvers.grid import Solution
from onnxq.solvers.hessian import output_error
from onnxq.solvers.scale_search import mse_params

Array = npt.NDArray[Any]

SHRINK = tuple(1.0 - 0.03 * i for i in range(11))
"""Candidate factors on the range of a group."""


@dataclass(frozen=True)
class WeightRounding(Pass):
    """Base of the passes that round MatMul and Gemm weights with a solver.

    Args:
        layers: globs of the sites to round; all by default.
    """

    requires: ClassVar[tuple[Key[Any], ...]] = (PLAN, STATISTICS)
    uses: ClassVar = (ROUNDED,)
    provides: ClassVar = (ROUNDED,)
    tolerance: ClassVar[float | None] = 0.0

    layers: tuple[str, ...] = ()

    @abstractmethod
    def solve(self, rows: Array, gram: Array | None, fmt: Format, group: int) -> Solution:
        """Codes and scales for one layer.

        Args:
            rows: ``[N, K]`` the weight, one row an output channel.
            gram: ``[K, K]`` sum of ``x x^T`` over the calibration rows; None for solvers that ask
                for no statistics.
            fmt: the format, its scheme included.
            group: columns that share a scale; 0 for the whole row.
        """

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """The second moment of every layer's input."""
        if STATISTICS not in self.requires:
            return []
        inputs = (
            str(layer.x.name)
            for layer in analyze(model).linears
            if layer.kind != "conv" and self.wants(layer.name)
        )
        return [StatRequest(name, "moment") for name in dict.fromkeys(inputs)]

    def candidates(self, model: ir.Model) -> list[str]:
        """MatMul and Gemm layers."""
        return [
            layer.name
            for layer in analyze(model).linears
            if layer.kind != "conv" and self.wants(layer.name)
        ]

    def wants(self, site: str) -> bool:
        """Whether a glob matches ``site``."""
        return not self.layers or any(fnmatchcase(site, glob) for glob in self.layers)

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Round layer by layer."""
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        statistics = ctx.artifacts.get(STATISTICS) if STATISTICS in self.requires else None
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else RoundedWeights()
        layers = {layer.name: layer for layer in analyze(model).linears}
        sites = [s for s in plan.sites.values() if s.site in layers and self.wants(s.site)]
        for glob in self.layers:
            if not any(fnmatchcase(s, glob) for s in layers):
                report.skip(glob, "matches no layer")
        for done, site in enumerate(sites):
            ctx.progress(self.name, done, len(sites))
            layer = layers[site.site]
            if layer.kind == "conv" or site.weight is None:
                report.skip(site.site, "Conv is rounded to nearest")
                continue
            gram = None if statistics is None else statistics.moment(str(layer.x.name)).gram
            rows = rows_of(layer)
            fmt = format_of(site, site.weight, ctx)
            with about(site.site):
                weight = RoundedWeight.of(self.solve(rows, gram, fmt, site.weight.block))
            rounded.add(site.site, weight)
            report.change(site.site, "rounded", quality(rows, weight.values(), gram))
        ctx.progress(self.name, len(sites), len(sites))
        ctx.artifacts.put(ROUNDED, rounded)
        return report


def format_of(site: SitePlan, weight: WeightPlan, ctx: Context) -> Format:
    """The planned format; packed operators take signed scales, which gains up to 1 dB."""
    if site.mode == "per-token":
        return grid_format(weight)
    fmt = parse_format(weight.format)
    if not isinstance(fmt, IntFormat):
        return fmt
    fmt = dataclasses.replace(fmt, block=0)
    if not weight.symmetric:
        return dataclasses.replace(fmt, scheme="asym")
    full_range = site.mode == "weight-only" and ctx.target.matmul_nbits and weight.block
    return dataclasses.replace(fmt, scheme="full") if full_range else fmt


def searched_scales(rows: Array, gram: Array, fmt: Format, group: int) -> Params:
    """Scales of least squared error, each column weighted by the energy of its input."""
    importance = np.diag(gram).astype(np.float32)
    return mse_params(rows, fmt, group=group, norm=2, factors=SHRINK, importance=importance)


def rows_of(layer: Linear) -> Array:
    """The weight as ``[N, K]``, one row an output channel."""
    stored = layer.w
    return stored if layer.in_axis == 1 else np.ascontiguousarray(stored.T)


def quality(rows: Array, values: Array, gram: Array | None) -> str:
    """Output SQNR of the rounded layer on the calibration rows; that of the weight without any."""
    if gram is None:
        gram, what = np.eye(rows.shape[1]), "weight"
    else:
        what = "output"
    error = output_error(rows, values, gram)
    return f"{what} SQNR {-10 * np.log10(error):.1f} dB" if error > 0 else "exact"
