"""``reassemble-channels``: write large MLP channels as several smaller ones.

Where one channel of a gated MLP's product is hundreds of times larger than the rest, it is computed
t times, a t-th of it each (QLLM's channel disassembly, arXiv 2310.08041)::

    gate <- gate[:, index]      up <- up[:, index] / t[index]      down <- down[index, :]

The function stays, no node is added, the inner width grows by a few per cent. QLLM's other half,
merging similar channels until the width is that of before, needs sums of products that no layer
computes; a rotation (``smooth-rot``) keeps the width at less error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.errors import SpecError
from onnxq.graph.match import GatedMlp, Structure, analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.folding import put_weight, weight64
from onnxq.solvers.disassemble import choose_parts


@dataclass(frozen=True)
class ReassembleChannels(Pass):
    """Split large inner channels of gated MLPs.

    Args:
        ratio: share of the inner width that may be added.
        multiple: the new width is a multiple of it, as kernels and blocks want it.
    """

    name: ClassVar[str] = "reassemble-channels"
    summary: ClassVar[str] = "write large MLP channels as several smaller ones"
    requires: ClassVar = (STATISTICS,)
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    ratio: float = 0.05
    multiple: int = 32

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0 or self.multiple < 1:
            raise SpecError(
                "SPEC-RANGE",
                f"ratio={self.ratio} multiple={self.multiple}: above 0 up to 1, and 1 at least",
            )

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """The largest magnitude of each inner channel."""
        return [StatRequest(str(m.down.x.name), "channel") for m in analyze(model).gated_mlps]

    def candidates(self, model: ir.Model) -> list[str]:
        """Closing layers of gated MLPs."""
        return [mlp.down.name for mlp in analyze(model).gated_mlps]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Widen every gated MLP that allows it."""
        report = PassReport()
        structure = analyze(model)
        statistics = ctx.artifacts.get(STATISTICS)
        if not structure.gated_mlps:
            report.skip("the model", "it has no gated MLP")
        for mlp in structure.gated_mlps:
            reason = _why_not(structure, mlp)
            width = mlp.down.in_features
            extra = self._extra(width)
            if reason is None and extra < 1:
                reason = f"{self.ratio:g} of {width} channels reach no multiple of {self.multiple}"
            if reason is not None:
                report.skip(mlp.down.name, reason)
                continue
            channel = statistics.channel(str(mlp.down.x.name))
            amax = np.maximum(np.abs(channel.lo), np.abs(channel.hi))
            amax = np.where(channel.count > 0, amax, 0.0)
            parts = choose_parts(amax, extra)
            if parts.sum() == width:
                report.skip(mlp.down.name, "all channels were zero on the calibration data")
            elif ctx.budget.take(mlp.down.name):
                _widen(mlp, parts)
                report.change(
                    mlp.down.name,
                    f"{width} channels as {int(parts.sum())}",
                    f"largest magnitude {amax.max():.4g}, then {(amax / parts).max():.4g}",
                )
        return report

    def _extra(self, width: int) -> int:
        """Channels to add: the largest number in the budget that ends at a multiple."""
        return int(width * (1 + self.ratio)) // self.multiple * self.multiple - width


def _why_not(structure: Structure, mlp: GatedMlp) -> str | None:
    product = mlp.mul.outputs[0]
    inner = (mlp.gate.output, mlp.up.output, mlp.act.output, product)
    if any(value.is_graph_output() for value in inner):
        return "an inner value is an output of the model"
    if mlp.down.x is not product or structure.other_readers_of(product):
        return "something else reads the gated product"
    if len(structure.readers_of(product)) != 1 or len(mlp.up.output.uses()) != 1:
        return "something else reads the gated product or the up layer"
    if any(node not in (mlp.mul, *mlp.act.nodes) for node in mlp.gate.output.consumers()):
        return "something else reads the gate layer"
    for linear in (mlp.gate, mlp.up, mlp.down):
        if linear.is_weight_shared:
            return f"the weight of {linear.name} has other readers"
    if mlp.gate.bias is not None or mlp.up.bias is not None:
        return "the gate or the up layer has a bias"
    return None


def _widen(mlp: GatedMlp, parts: np.ndarray) -> None:
    index = np.repeat(np.arange(len(parts)), parts)
    put_weight(mlp.gate, weight64(mlp.gate)[:, index])
    put_weight(mlp.up, weight64(mlp.up)[:, index] / parts[index])
    put_weight(mlp.down, weight64(mlp.down)[index])
    for node in (mlp.gate.node, mlp.up.node, mlp.mul, *mlp.act.nodes):
        for value in node.outputs:
            value.shape = None
