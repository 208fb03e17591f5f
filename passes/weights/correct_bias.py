"""``correct-bias``: give back the mean error that rounding its weight brings to each output.

Rewrites the bias of every planned layer with one to ``b + (W - W_q) E[x]``, so that the mean output
of the layer with the rounded weight W_q is that of the float layer. E[x] is the mean input of each
channel over the calibration samples; the sum runs over a Conv's kernel as well, as if no input
were padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.formats import IntFormat, dequantize, parse_format
from onnxq.graph.edit import set_bias
from onnxq.graph.match import Linear, analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.lower.weights import quantize_weight
from onnxq.passes.plan import WeightPlan
from onnxq.passes.weights.rounded import RoundedWeights
from onnxq.solvers.bias_correction import bias_correction

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Correct biases for the rounding of weights."""

    name: ClassVar[str] = "correct-bias"
    summary: ClassVar[str] = "add to each bias the mean error that rounding the weight brings"
    requires: ClassVar = (PLAN, STATISTICS)
    uses: ClassVar = (ROUNDED,)
    tolerance: ClassVar[float | None] = None

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Means of the inputs of layers with a bias."""
        return [_request(linear) for linear in analyze(model).linears if linear.b is not None]

    def candidates(self, model: ir.Model) -> list[str]:
        """Linear layers."""
        return [linear.name for linear in analyze(model).linears]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Correct every bias."""
        report = PassReport()
        plan, statistics = ctx.artifacts.get(PLAN), ctx.artifacts.get(STATISTICS)
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else RoundedWeights()
        if not plan.sites:
            report.skip("the plan", "has no layer whose bias could be corrected")
        for linear in analyze(model).linears:
            site = plan.sites.get(linear.name)
            bias = linear.b
            if site is None or site.weight is None:
                report.skip(linear.name, "stays float")
            elif bias is None:
                report.skip(linear.name, "has no bias")
            elif not isinstance(parse_format(site.weight.format), IntFormat) or site.weight.block:
                report.skip(linear.name, "its weight is not in integers with a scale a channel")
            elif ctx.budget.take(linear.name):
                delta = self._error(linear, site.weight, statistics, rounded)
                set_bias(linear, bias + delta)
                report.change(linear.name, "bias corrected", f"up to {np.abs(delta).max():.3g}")
        return report

    def _error(
        self, linear: Linear, weight: WeightPlan, statistics: Statistics, rounded: RoundedWeights
    ) -> Float:
        """``(W - W_q) E[x]``, ``[N]``."""
        exact = linear.w
        solved = rounded.get(linear.name)
        if solved is None:
            found = quantize_weight(exact, weight, in_axis=linear.in_axis, out_axis=linear.out_axis)
            coded = dequantize(found.codes, found.scale, found.zero_point, found.axis)
            rows, coded_rows = _rows(linear, exact), _rows(linear, coded)
        else:
            rows, coded_rows = _rows(linear, exact), solved.values()
        wanted = _request(linear)
        stat = statistics.channel(wanted.value, axis=wanted.axis)
        mean = np.where(stat.count > 0, stat.sum / np.maximum(stat.count, 1), 0.0)
        return _by_group(linear, rows, coded_rows, mean)


def _request(linear: Linear) -> StatRequest:
    return StatRequest(str(linear.x.name), "channel", axis=1 if linear.kind == "conv" else -1)


def _rows(linear: Linear, weight: Float) -> Float:
    """``[N, K]``: one row an output channel, a Conv's kernel summed up."""
    moved = np.moveaxis(weight, linear.out_axis, 0)
    if linear.kind != "conv":
        return np.ascontiguousarray(moved)
    return np.asarray(moved.reshape(*moved.shape[:2], -1).sum(axis=2, dtype=np.float64), np.float32)


def _by_group(linear: Linear, rows: Float, coded: Float, mean: npt.NDArray[np.float64]) -> Float:
    """Each group of output channels with the mean of the channels that it reads."""
    groups = linear.groups
    return np.concatenate(
        [
            bias_correction(w, w_hat, part)
            for w, w_hat, part in zip(
                np.split(rows, groups), np.split(coded, groups), np.split(mean, groups), strict=True
            )
        ]
    )
