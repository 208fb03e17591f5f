"""``clip-activation``: bound what activation functions hand on.

A GELU or ReLU that fires at 60 once in a thousand tokens sets the scale for all of them. Bounded at
alpha, small values keep their codes::

    y = min(f(x), alpha)

alpha is a fixed number (10: "GELU10", Wu et al., arXiv 2004.09602), or comes from the statistics by
the range rule of ``calibrate``, in place of PACT's trained values (arXiv 1805.06085). The function
changes where the bound bites, so ranges are taken again behind the pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import SpecError
from onnxq.formats import IntFormat
from onnxq.graph.edit import Names, add_initializer, insert_after
from onnxq.graph.match import Structure, analyze, value_dtype
from onnxq.graph.match.activations import Activation
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.decide.calibrate import RANGE_RULE
from onnxq.passes.keys import PLAN, STATISTICS

CLIPPED = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "hard_swish", "mish")
"""Activation functions without an upper bound of their own."""

_UINT8 = IntFormat(8, signed=False)
_MIN_OPSET = 8


@dataclass(frozen=True)
class ClipActivation(Pass):
    """Bound the outputs of activation functions from above.

    Args:
        limit: the bound; 0 takes it from the statistics by the method of ``calibrate``.
        layers: globs of the activation functions; all by default.
    """

    name: ClassVar[str] = "clip-activation"
    summary: ClassVar[str] = "bound what GELU, ReLU and SiLU hand on (GELU10, PACT)"
    requires: ClassVar = (STATISTICS, RANGE_RULE)
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = None

    limit: float = 0.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.limit < float("inf"):
            raise SpecError("SPEC-RANGE", f"limit={self.limit} is no bound above 0")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """The range of each output; a histogram where the method of ``calibrate`` wants one."""
        return [StatRequest(str(a.output.name), "range") for a in self._chosen(analyze(model))]

    def candidates(self, model: ir.Model) -> list[str]:
        """Activation functions without an upper bound."""
        return [activation.name for activation in self._chosen(analyze(model))]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Bound each output that goes beyond its limit."""
        report = PassReport()
        structure = analyze(model)
        statistics = ctx.artifacts.get(STATISTICS)
        rule = ctx.artifacts.get(RANGE_RULE)
        chosen = self._chosen(structure)
        if not chosen:
            report.skip("the model", "no activation function without an upper bound is asked for")
        if model.opset_imports.get("", 0) < _MIN_OPSET:
            report.skip(
                "the model", "Min with broadcasting needs opset 8; put `canonicalize` first"
            )
            return report
        names = Names(model.graph)
        for activation in chosen:
            name = str(activation.output.name)
            highest = _highest(statistics, name)
            if activation.output.is_graph_output():
                report.skip(activation.name, "it is an output of the model")
                continue
            limit = self.limit or rule.range_of(statistics, name, _UINT8, symmetric=False)[1]
            if highest <= limit:
                report.skip(activation.name, f"its largest value is {highest:.4g}: nothing to clip")
            elif ctx.budget.take(activation.name):
                _clip(model.graph, activation, limit, names)
                report.change(
                    activation.name,
                    f"{activation.kind} at most {limit:.4g}",
                    f"largest before: {highest:.4g}",
                )
        return report

    def _chosen(self, structure: Structure) -> list[Activation]:
        return [
            activation
            for activation in structure.activations
            if activation.kind in CLIPPED
            and (not self.layers or any(fnmatchcase(activation.name, g) for g in self.layers))
        ]


def _highest(statistics: Statistics, name: str) -> float:
    if StatRequest(name, "range") in statistics:
        return float(statistics.range(name).hi)
    return float(statistics.histogram(name).hi)


def _clip(graph: ir.Graph, activation: Activation, limit: float, names: Names) -> None:
    value = activation.output
    dtype = value_dtype(value) or ir.DataType.FLOAT
    bound = add_initializer(
        graph,
        names.fresh(f"{activation.name}_limit"),
        np.array(limit, np.float64).astype(dtype.numpy()),
    )
    readers = list(value.uses())
    node = ir.node("Min", [value, bound], name=names.fresh(f"{activation.name}_clip"))
    out = node.outputs[0]
    out.name, out.type, out.shape = names.fresh(f"{value.name}_clipped"), value.type, value.shape
    insert_after(value, node)
    for usage in readers:
        usage.node.replace_input_with(usage.idx, out)
