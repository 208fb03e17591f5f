"""``rotate``: turn activations so that no channel sticks out, with nothing added to the graph.

R1 turns the whole residual stream by an orthogonal R ``[D, D]``. A norm without gamma and beta
commutes with it, so every writer and reader takes it up (x rows, W ``[K, N]``)::

    embedding E <- E R        writer W <- W R, b <- b R        reader W <- R' W

An RMSNorm allows any R. A LayerNorm subtracts the mean over channels; it allows those R that map
the vector of ones to itself, and such a one is taken.

R2 turns the values of each head by its own R_h ``[d, d]``: attention mixes tokens, not channels, so
the value layer takes ``R_h`` and the output layer ``R_h'`` at the channels where that head arrives,
repeated heads (GQA) alike.

R is a randomized Hadamard matrix (QuaRot, arXiv 2404.00456), of any order that one can be
constructed for (576 = 36 * 16), else a random orthogonal matrix, which the report says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import scipy.linalg

from onnxq.errors import SpecError
from onnxq.graph.edit import replace_const
from onnxq.graph.match import (
    Attention,
    FusedAttention,
    Linear,
    Structure,
    ValueToOutput,
    analyze,
)
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.fold_norm import FOLDED_NORMS, is_plain, why_not_foldable
from onnxq.passes.transform.folding import (
    Float64,
    bias64,
    put_bias,
    put_weight,
    stored64,
    weight64,
)
from onnxq.passes.transform.residual import ResidualStream, find_residual_streams
from onnxq.solvers.hadamard import Rotation, RotationKind, fixing_ones, random_rotation


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate the residual stream and the heads' values, folded into the weights.

    Args:
        r1: rotate the residual stream.
        r2: rotate the values of each head.
        kind: ``hadamard`` where the size has one, or ``orthogonal`` (Haar-random) throughout.
        block: channels that are rotated together, by a block-diagonal matrix; 0 for all of the
            stream or head. Formats with a scale a block want a multiple of their block.
        seed: of the random signs; -1 for the run's seed.
    """

    name: ClassVar[str] = "rotate"
    summary: ClassVar[str] = "rotate the residual stream and values, folded into the weights"
    requires: ClassVar = (FOLDED_NORMS,)
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    r1: bool = True
    r2: bool = True
    kind: RotationKind = "hadamard"
    block: int = 0
    seed: int = -1

    def __post_init__(self) -> None:
        if self.block < 0 or self.block == 1:
            raise SpecError("SPEC-RANGE", f"block={self.block}: blocks have two channels at least")

    def candidates(self, model: ir.Model) -> list[str]:
        """Residual streams and attentions."""
        structure = analyze(model)
        streams = [s.name for s in find_residual_streams(structure)] if self.r1 else []
        heads = [a.name for a in attentions_of(structure)]
        return streams + (heads if self.r2 else [])

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Rotate every residual stream and every attention that allows it."""
        report = PassReport()
        rng = np.random.default_rng(ctx.seed if self.seed < 0 else self.seed)
        if self.r1:
            self._rotate_streams(model, ctx, rng, report)
        if self.r2:
            self._rotate_values(model, ctx, rng, report)
        return report

    def _rotate_streams(
        self, model: ir.Model, ctx: Context, rng: np.random.Generator, report: PassReport
    ) -> None:
        structure = analyze(model)
        streams = find_residual_streams(structure)
        if not streams:
            report.skip("residual stream", "R1: the graph has no norms")
        for stream in streams:
            reason = why_not_rotatable(structure, stream) or why_no_blocks(stream.width, self.block)
            if reason is not None:
                report.skip(stream.name, f"R1: {reason}")
                continue
            if not ctx.budget.take(stream.name):
                continue
            rotation = self._draw(stream.width, rng)
            matrix = rotation.matrix
            if any(norm.kind == "layernorm" for norm in stream.norms):
                matrix = fixing_ones(matrix)
            count = rotate_stream(structure, stream, matrix)
            report.change(
                stream.name,
                f"R1: {self._describe(rotation)}",
                f"into {count} weights, none at run time",
            )
            structure = analyze(model)

    def _rotate_values(
        self, model: ir.Model, ctx: Context, rng: np.random.Generator, report: PassReport
    ) -> None:
        structure = analyze(model)
        names = [attention.name for attention in attentions_of(structure)]
        if not names:
            report.skip("attention", "R2: the graph has no attention")
        for name in names:
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
            heads = [self._draw(way.head_dim, rng) for _ in range(way.kv_heads)]
            rotate_values(way, [head.matrix for head in heads])
            report.change(
                name,
                f"R2: {self._describe(heads[0])}, {way.kv_heads} heads",
                "into the v and o weights",
            )
            if way.value.is_weight_shared or way.output.is_weight_shared:
                structure = analyze(model)

    def _draw(self, width: int, rng: np.random.Generator) -> Rotation:
        """One rotation of ``width`` channels, block by block if asked for."""
        size = self.block or width
        blocks = [random_rotation(size, rng, prefer=self.kind) for _ in range(width // size)]
        if len(blocks) == 1:
            return blocks[0]
        return Rotation(scipy.linalg.block_diag(*(b.matrix for b in blocks)), blocks[0].kind)

    def _describe(self, rotation: Rotation) -> str:
        size = self.block or len(rotation.matrix)
        blocks = f", {len(rotation.matrix) // size} blocks" if size < len(rotation.matrix) else ""
        if rotation.kind == "hadamard":
            return f"randomized Hadamard of order {size}{blocks}"
        return f"random orthogonal of order {size}{blocks}"


def attentions_of(structure: Structure) -> list[Attention | FusedAttention]:
    """All attentions of a graph, in whatever spelling."""
    return [*structure.attentions, *structure.fused_attentions]


def why_no_blocks(width: int, block: int) -> str | None:
    """Why ``width`` channels cannot be rotated ``block`` at a time; None if they can."""
    if block and width % block:
        return f"its {width} channels are not divided by block={block}"
    return None


# R1 -------------------------------------------------------------------------------------------


def why_not_rotatable(structure: Structure, stream: ResidualStream) -> str | None:
    """Why R1 cannot turn ``stream``; None if it can."""
    if stream.blockers:
        return stream.blockers[0]
    for norm in stream.norms:
        if not is_plain(norm):
            return f"gamma or beta of {norm.name} is not folded; put `fold-norm` right before"
        reason = why_not_foldable(structure, norm)
        if reason is not None:
            return f"{norm.name}: {reason}"
    return None


def rotate_stream(structure: Structure, stream: ResidualStream, matrix: Float64) -> int:
    """Fold ``matrix [D, D]`` into all that writes and reads ``stream``; how many constants."""
    before: dict[Linear, None] = dict.fromkeys(stream.linears)
    for norm in stream.norms:
        before.update(dict.fromkeys(structure.readers_of(norm.output)))
    after = dict.fromkeys(stream.writers)
    for linear in dict.fromkeys((*before, *after)):
        weight = weight64(linear)
        if linear in before:
            weight = matrix.T @ weight
        if linear in after:
            weight = weight @ matrix
        put_weight(linear, weight)
        bias = bias64(linear)
        if linear in after and bias is not None:
            put_bias(linear, bias @ matrix)
    for embedding in stream.embeddings:
        _rotate_rows(embedding.node, 0, matrix)
    for node, index in stream.constants:
        _rotate_rows(node, index, matrix)
    return len(before) + len(after) + len(stream.embeddings) + len(stream.constants)


def _rotate_rows(node: ir.Node, index: int, matrix: Float64) -> None:
    value = node.inputs[index]
    assert value is not None
    assert value.dtype is not None
    rows = stored64(value) @ matrix
    replace_const(node, index, rows.astype(value.dtype.numpy()))


# R2 -------------------------------------------------------------------------------------------


def rotate_values(way: ValueToOutput, matrices: list[Float64]) -> None:
    """Fold one ``[d, d]`` matrix a value head into the value and the output layer."""
    heads = np.asarray(way.channel_map).reshape(way.num_heads, way.head_dim)
    kinds: dict[tuple[int, ...], int] = {}
    values, outputs = weight64(way.value).copy(), weight64(way.output).copy()
    bias = bias64(way.value)
    for number, channels in enumerate(heads):
        key = tuple(int(c) for c in channels)
        is_new = key not in kinds
        matrix = matrices[kinds.setdefault(key, len(kinds))]
        rows = slice(number * way.head_dim, (number + 1) * way.head_dim)
        outputs[rows] = matrix.T @ outputs[rows]
        if is_new:
            values[:, channels] = values[:, channels] @ matrix
            if bias is not None:
                bias[channels] = bias[channels] @ matrix
    put_weight(way.value, values)
    put_weight(way.output, outputs)
    if bias is not None:
        put_bias(way.value, bias)
