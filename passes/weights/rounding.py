"""What all passes that round weights share: which layers, which grid, what is reported.

A rounding pass reads the plan and the second moment ``X^T X`` of every layer's input, asks its
solver for codes and scales, and leaves them for the lowering pass; the graph is not touched.
Several may follow each other, each on its own layers; where they overlap, the later one counts.
"""

from __future__ import annotations

import dataclasses
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.formats import Format, IntFormat, MxFormat, Params, parse_format
from onnxq.graph.match import Linear, analyze
from onnxq.passes.contract import Context, Key, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.lower.weights import grid_format, rows_of
from onnxq.passes.plan import SitePlan, WeightPlan
from onnxq.passes.weights.rounded import RoundedWeight, RoundedWeights
from onnxq.passes.weights.tasks import LayerTask, Moments, round_layer, round_task
from onnxq.passes.work import WeightRef, run_tasks
from onnxq.solvers.grid import Solution
from onnxq.solvers.scale_search import mse_params

Array = npt.NDArray[Any]

SHRINK = tuple(1.0 - 0.03 * i for i in range(11))
"""Candidate factors on the range of a group."""

DEEP_SHRINK = tuple(1.0 - 0.05 * i for i in range(13))
"""The same below 4 bits."""


@dataclass(frozen=True)
class WeightRounding(Pass):
    """Base of the passes that round MatMul and Gemm weights with a solver.

    Args:
        layers: globs of the sites to round; all by default.
        cache: folder in which finished layers are kept by a hash of what they depend on; a run
            that meets them again takes them from there.
    """

    requires: ClassVar[tuple[Key[Any], ...]] = (PLAN, STATISTICS)
    uses: ClassVar = (ROUNDED,)
    provides: ClassVar = (ROUNDED,)
    tolerance: ClassVar[float | None] = 0.0

    layers: tuple[str, ...] = ()
    cache: str = ""

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
        chosen = []
        for site in sites:
            if layers[site.site].kind == "conv" or site.weight is None:
                report.skip(site.site, "Conv is rounded to nearest")
                continue
            chosen.append(site)
        ctx.progress(self.name, 0, len(chosen))
        for done, (site, found) in enumerate(self._round(chosen, layers, statistics, ctx)):
            ctx.progress(self.name, done + 1, len(chosen))
            rounded.add(site.site, found[0])
            report.change(site.site, "rounded", found[1])
        ctx.artifacts.put(ROUNDED, rounded)
        return report

    def round_rows(self, rows: Array, moments: Moments | None, fmt: Format, group: int) -> Solution:
        """As :meth:`solve`, for tasks."""
        return self.solve(rows, None if moments is None else moments.gram, fmt, group)

    def _round(
        self,
        sites: Sequence[SitePlan],
        layers: Mapping[str, Linear],
        statistics: Statistics | None,
        ctx: Context,
    ) -> Iterator[tuple[SitePlan, tuple[RoundedWeight, str]]]:
        """The rounded weights of ``sites``, in order, through the executor if there is one."""

        def moments_of(site: SitePlan) -> Moments | None:
            x = str(layers[site.site].x.name)
            return None if statistics is None else Moments(statistics.moment(x).gram)

        def settings(site: SitePlan) -> tuple[Format, int]:
            assert site.weight is not None
            return format_of(site, site.weight, ctx), site.weight.block

        if ctx.executor is None:
            for site in sites:
                rows, moments = rows_of(layers[site.site]), moments_of(site)
                yield (
                    site,
                    round_layer(self, site.site, rows, moments, *settings(site), self.cache),
                )
            return
        with tempfile.TemporaryDirectory(prefix="onnxq-tasks-") as folder:
            scratch = Path(folder)
            paths: dict[str, str] = {}
            tasks = []
            for number, site in enumerate(sites):
                layer = layers[site.site]
                x = str(layer.x.name)
                if x not in paths:
                    moments = moments_of(site)
                    path = scratch / f"moments-{number}"
                    paths[x] = "" if moments is None else moments.save(path)
                weight = WeightRef.of(layer, scratch, number)
                tasks.append(
                    LayerTask(self, site.site, weight, paths[x], *settings(site), self.cache)
                )
            yield from zip(sites, run_tasks(ctx.executor, round_task, tasks), strict=True)


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
    # DequantizeLinear takes positive scales only.
    signed_scales = (
        site.mode == "weight-only"
        and bool(weight.block)
        and ctx.target.form_of(fmt, weight.block) in ("MatMulNBits", "function")
    )
    return dataclasses.replace(fmt, scheme="full") if signed_scales else fmt


MX_ROOM = (1.0, 2.0)
"""For powers of two. Halving clips the extremes, and columns grow while they take up errors: with
GPTQ it costs 0.3 dB of the output at 4, 6 and 8 bits."""


def searched_scales(rows: Array, gram: Array, fmt: Format, group: int) -> Params:
    """Scales of least squared error, each column weighted by the energy of its input.

    Below 4 bits ranges shrink much more; searching so far gains 0.3 dB at 2 bits.
    """
    factors = SHRINK if fmt.bits >= 4 else DEEP_SHRINK
    if isinstance(fmt, MxFormat):
        factors = MX_ROOM
    importance = np.diag(gram).astype(np.float32)
    return mse_params(rows, fmt, group=group, norm=2, factors=factors, importance=importance)
