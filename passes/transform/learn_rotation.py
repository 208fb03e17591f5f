"""``learn-rotation``: rotations of the residual stream and the values, learned from activations.

What ``rotate`` does with a random Hadamard matrix, with one that was turned on from it until the
activations that the quantized layers read are as flat as it goes (KurTail's objective; the
mathematics is in :mod:`onnxq.solvers.learn_rotation`). R1 learns from what all norms of the stream
hand on, each R2 from what its heads hand to the output layer. All is folded into weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
import scipy.linalg

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import Statistics
from onnxq.errors import SpecError
from onnxq.graph.match import Structure, ValueToOutput, analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.fold_norm import FOLDED_NORMS
from onnxq.passes.transform.loss_rotation import LossOptions, turn_by_loss
from onnxq.passes.transform.residual import ResidualStream, find_residual_streams
from onnxq.passes.transform.rotate import (
    attentions_of,
    rotate_stream,
    rotate_values,
    why_no_blocks,
    why_not_rotatable,
)
from onnxq.solvers.hadamard import fixing_ones, random_rotation
from onnxq.solvers.learn_rotation import (
    Float32,
    Float64,
    LearnedRotation,
    learn_rotation,
    normalized,
)


@dataclass(frozen=True)
class LearnRotation(Pass):
    """Learn the rotations of the residual stream and of the heads' values.

    Args:
        r1: learn and rotate the residual stream.
        r2: learn and rotate the values of each head.
        objective: what is made small: ``kurtosis`` of rows, as far as 1.8 (KurTail); the squared
            ``range`` of rows or blocks, which is that of the step of their grid; or the ``loss`` of
            next tokens with rounded activations (SpinQuant), which needs torch.
        bits: of the integers that activations are rounded to while learning by the loss.
        steps: gradient steps for each rotation.
        rows: rows of each activation that is learned from.
        block: channels that are rotated together, by a block-diagonal matrix; 0 for all of the
            stream or head. Formats with a scale a block want a multiple of their block.
        seed: of the random Hadamard matrices to start from; -1 for the run's seed.
    """

    name: ClassVar[str] = "learn-rotation"
    summary: ClassVar[str] = "rotate the residual stream and values by rotations learned on data"
    requires: ClassVar = (FOLDED_NORMS, STATISTICS)
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    r1: bool = True
    r2: bool = True
    objective: Literal["kurtosis", "range", "loss"] = "kurtosis"
    bits: int = 4
    steps: int = 100
    rows: int = 128
    block: int = 0
    seed: int = -1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1:
            raise SpecError("SPEC-RANGE", f"steps={self.steps} rows={self.rows}: at least 1 each")
        if self.block < 0 or self.block == 1:
            raise SpecError("SPEC-RANGE", f"block={self.block}: blocks have two channels at least")
        if not 2 <= self.bits <= 8:
            raise SpecError("SPEC-RANGE", f"bits={self.bits} is not between 2 and 8")

    def wants_data(self) -> bool:
        """The loss is taken on samples; the other objectives need statistics alone."""
        return self.objective == "loss"

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Rows of what the norms and the heads hand on."""
        structure = analyze(model)
        names: list[str] = []
        if self.objective == "loss":
            return []
        if self.r1:
            for stream in find_residual_streams(structure):
                if why_not_rotatable(structure, stream) is None:
                    names += [str(norm.output.name) for norm in stream.norms]
        if self.r2:
            names += [str(way.output.x.name) for way in _ways(structure).values()]
        return [StatRequest(name, "rows", limit=self.rows) for name in dict.fromkeys(names)]

    def candidates(self, model: ir.Model) -> list[str]:
        """Residual streams and attentions."""
        structure = analyze(model)
        streams = [s.name for s in find_residual_streams(structure)] if self.r1 else []
        return streams + ([a.name for a in attentions_of(structure)] if self.r2 else [])

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Learn from the original activations, then rotate: R1 and R2 do not disturb each other."""
        report = PassReport()
        statistics = ctx.artifacts.get(STATISTICS)
        rng = np.random.default_rng(ctx.seed if self.seed < 0 else self.seed)
        if self.objective == "loss":
            options = LossOptions(self.r1, self.r2, self.steps, self.rows, self.block, self.bits)
            turn_by_loss(options, model, ctx, rng, report)
            return report
        if self.r1:
            self._rotate_streams(model, ctx, rng, statistics, report)
        if self.r2:
            self._rotate_values(model, ctx, rng, statistics, report)
        return report

    def _rotate_streams(
        self,
        model: ir.Model,
        ctx: Context,
        rng: np.random.Generator,
        statistics: Statistics,
        report: PassReport,
    ) -> None:
        structure = analyze(model)
        streams = find_residual_streams(structure)
        if not streams:
            report.skip("residual stream", "R1: the graph has no norms")
        for stream in streams:
            reason = why_not_rotatable(structure, stream)
            reason = reason or why_no_blocks(stream.width, self.block)
            if reason is not None:
                report.skip(stream.name, f"R1: {reason}")
            elif ctx.budget.take(stream.name):
                ctx.progress(self.name, 0, None)
                learned = self._learn_stream(stream, statistics, rng)
                rotate_stream(structure, stream, learned.matrix)
                order = self.block or stream.width
                report.change(
                    stream.name, f"R1: learned, order {order}", _gain(self.objective, learned.parts)
                )
                structure = analyze(model)

    def _learn_stream(
        self, stream: ResidualStream, statistics: Statistics, rng: np.random.Generator
    ) -> _Learned:
        centred = any(norm.kind == "layernorm" for norm in stream.norms)
        rows = [normalized(statistics.rows(str(norm.output.name)).rows) for norm in stream.norms]
        return self._learn(np.concatenate(rows), rng, keep_ones=centred)

    def _learn(self, rows: Float32, rng: np.random.Generator, *, keep_ones: bool) -> _Learned:
        """A rotation of rows ``[n, D]``, each block from its own channels."""
        size = self.block or rows.shape[1]
        parts = []
        for at in range(0, rows.shape[1], size):
            start = random_rotation(size, rng).matrix
            start = fixing_ones(start) if keep_ones else start
            own = rows[:, at : at + size]
            parts.append(
                learn_rotation(
                    own,
                    start,
                    steps=self.steps,
                    keep_ones=keep_ones,
                    objective="range" if self.objective == "range" else "kurtosis",
                )
            )
        return _Learned(scipy.linalg.block_diag(*(part.matrix for part in parts)), parts)

    def _rotate_values(
        self,
        model: ir.Model,
        ctx: Context,
        rng: np.random.Generator,
        statistics: Statistics,
        report: PassReport,
    ) -> None:
        structure = analyze(model)
        names = [attention.name for attention in attentions_of(structure)]
        if not names:
            report.skip("attention", "R2: the graph has no attention")
        for done, name in enumerate(names):
            ctx.progress(self.name, done, len(names))
            way = structure.v_to_o(next(a for a in attentions_of(structure) if a.name == name))
            if isinstance(way, str):
                report.skip(name, f"R2: {way}")
                continue
            reason = why_no_blocks(way.head_dim, self.block)
            if reason is not None:
                report.skip(name, f"R2: {reason}")
                continue
            if not ctx.budget.take(name):
                continue
            learned = self._learn_heads(way, statistics, rng)
            rotate_values(way, [each.matrix for each in learned])
            report.change(
                name,
                f"R2: {len(learned)} learned of order {self.block or way.head_dim}",
                _gain(self.objective, [part for each in learned for part in each.parts]),
            )
            if way.value.is_weight_shared or way.output.is_weight_shared:
                structure = analyze(model)

    def _learn_heads(
        self, way: ValueToOutput, statistics: Statistics, rng: np.random.Generator
    ) -> list[_Learned]:
        """One rotation a value head, from the channels of all heads that repeat it."""
        rows = statistics.rows(str(way.output.x.name)).rows
        heads = rows.reshape(len(rows), way.num_heads, way.head_dim)
        kinds: dict[tuple[int, ...], list[Float32]] = {}
        channels = np.asarray(way.channel_map).reshape(way.num_heads, way.head_dim)
        for number, own in enumerate(channels):
            kinds.setdefault(tuple(int(c) for c in own), []).append(heads[:, number])
        return [
            self._learn(np.concatenate(parts), rng, keep_ones=False) for parts in kinds.values()
        ]


@dataclass(frozen=True, eq=False)
class _Learned:
    """A block-diagonal rotation ``[D, D]`` and its blocks."""

    matrix: Float64
    parts: list[LearnedRotation]


def _ways(structure: Structure) -> dict[str, ValueToOutput]:
    """Attentions whose values can be rotated."""
    found = {a.name: structure.v_to_o(a) for a in attentions_of(structure)}
    return {name: way for name, way in found.items() if not isinstance(way, str)}


def _gain(objective: str, learned: list[LearnedRotation]) -> str:
    before = float(np.mean([each.before for each in learned]))
    after = float(np.mean([each.after for each in learned]))
    if objective == "kurtosis":
        return f"distance of the kurtosis from 1.8: {before:.3f}, then {after:.3f}"
    return f"mean squared range: {before:.3g}, then {after:.3g}"
