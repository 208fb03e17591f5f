"""``online-hadamard``: rotate activations at run time where no layer can take the rotation up.

R4 in front of the layer that closes an MLP: its input comes out of a product or an activation
function, so the rotation has to be computed; its inverse goes into the weight (x rows)::

    down(x) = x W = (x R) (R' W)

R3 on queries and keys behind the rotary embedding, R ``[d, d]`` the same for all heads::

    q k' = (q R) (k R)'

R is a Hadamard matrix divided by the root of its order: of the whole width n, or of ``block``
channels at a time. It is one node, ``com.onnxq::Hadamard``: a fast transform in ``n log n``
additions where the kernels are registered, its body of standard operators where they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np
import onnx_ir as ir

from onnxq import custom_ops
from onnxq.errors import SpecError
from onnxq.graph.edit import Names, add_initializer, insert_after, insert_before
from onnxq.graph.match import (
    Attention,
    Linear,
    Structure,
    analyze,
    is_const,
    is_op,
    last_dim,
    shape_entries,
    value_dtype,
)
from onnxq.graph.match.values import attr_ints, value_name
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.folding import Float64, put_weight, weight64
from onnxq.solvers.hadamard import hadamard_factors, hadamard_matrix, has_hadamard

Site = Literal["down", "qk"]

OP: Final = "Hadamard"
_LARGEST_CORE = 256
"""That the operator takes."""
_MAX_STEPS = 12


LEAST = 4
"""Smallest block that is chosen by itself: smaller ones spread nothing."""


@dataclass(frozen=True)
class OnlineHadamard(Pass):
    """Insert Hadamard rotations at run time, their inverse folded into the weights.

    Args:
        sites: ``down``: inputs of the layers that close an MLP (R4); ``qk``: queries and keys
            behind the rotary embedding (R3).
        block: channels that are rotated together at ``down``; 0 for the whole width or, where no
            Hadamard matrix of that order can be constructed, for its largest divisor that has one.
            Formats with a scale a block want a multiple of their block.
    """

    name: ClassVar[str] = "online-hadamard"
    summary: ClassVar[str] = "rotate MLP inner activations or queries and keys at run time"
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    sites: tuple[Site, ...] = ("down",)
    block: int = 0

    def __post_init__(self) -> None:
        if not self.sites:
            raise SpecError("SPEC-EMPTY", "`online-hadamard` needs sites", "down, qk, or both")
        if self.block and not has_hadamard(self.block):
            raise SpecError(
                "SPEC-RANGE",
                f"block={self.block}: no Hadamard matrix of that order can be constructed",
                "powers of two always can",
            )

    def candidates(self, model: ir.Model) -> list[str]:
        """Closing MLP layers and attentions."""
        structure = analyze(model)
        downs = [d.name for d in closing_layers(structure)] if "down" in self.sites else []
        return downs + ([a.name for a in structure.attentions] if "qk" in self.sites else [])

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Rotate at every site that allows it."""
        report = PassReport()
        reason = why_not_here(model)
        if reason is not None:
            report.skip("the model", reason)
            return report
        structure = analyze(model)
        builder = HadamardBuilder(model, structure)
        if "down" in self.sites:
            self._rotate_downs(structure, builder, ctx, report)
        if "qk" in self.sites:
            for attention in structure.attentions:
                _rotate_qk(attention, builder, ctx, report)
        return report

    def _rotate_downs(
        self, structure: Structure, builder: HadamardBuilder, ctx: Context, report: PassReport
    ) -> None:
        downs = closing_layers(structure)
        if not downs:
            report.skip("down", "the graph has no MLP whose closing layer could be told")
        for down in downs:
            n = down.in_features
            block = self.block or _fitting_block(n)
            reason = why_no_hadamard(n, block)
            if reason is not None:
                report.skip(down.name, reason)
            elif ctx.budget.take(down.name):
                order = block or n
                rotate_input(down, order, builder)
                share = 100 * _additions(order) / down.out_features
                report.change(
                    down.name,
                    f"R4: Hadamard of order {order}",
                    f"additions for {share:.1f}% of the layer's multiplications",
                )


def why_not_here(model: ir.Model) -> str | None:
    """Why no rotation can be inserted into ``model``; None if it can."""
    needed = custom_ops.get(OP).min_opset
    if model.opset_imports.get("", 0) < needed:
        return f"needs opset {needed}; put `canonicalize{{opset={needed}}}` first"
    return None


def rotate_input(linear: Linear, order: int, builder: HadamardBuilder) -> None:
    """``x W -> (x R) (R' W)`` with Hadamard blocks of ``order``."""
    put_weight(linear, _rotated_rows(weight64(linear), order))
    _read_instead(linear.node, linear.x, builder.rotate(linear.x, order))


def closing_layers(structure: Structure) -> list[Linear]:
    """Layers that read an activation function or a gated product, in graph order."""
    gated = {mlp.down for mlp in structure.gated_mlps}
    return [
        linear
        for linear in structure.linears
        if linear in gated
        or (linear.kind != "conv" and structure.activation_of(_before_scale(linear.x)) is not None)
    ]


def _before_scale(value: ir.Value) -> ir.Value:
    """What a constant factor, as ``smooth-quant`` leaves one, is applied to."""
    node = value.producer()
    if node is not None and is_op(node, "Mul"):
        for factor, other in (node.inputs, node.inputs[::-1]):
            if factor is not None and other is not None and is_const(factor):
                return other
    return value


def why_no_hadamard(n: int, block: int) -> str | None:
    """Why ``n`` channels cannot be rotated, ``block`` at a time; None if they can."""
    if block and n % block:
        return f"its {n} inputs are not divided by block={block}"
    if not has_hadamard(block or n):
        return f"no Hadamard matrix of order {n} can be constructed; give a block"
    core, _ = hadamard_factors(block or n)
    if core > _LARGEST_CORE:
        return f"a Hadamard matrix of order {n} has a core of {core}, above {_LARGEST_CORE}"
    return None


def _fitting_block(n: int) -> int:
    """0 for the whole width; else its largest divisor that can be rotated, 0 if there is none."""
    if why_no_hadamard(n, 0) is None:
        return 0
    divisors = (d for d in range(n // 2, LEAST - 1, -1) if n % d == 0)
    return next((d for d in divisors if why_no_hadamard(n, d) is None), 0)


def _additions(order: int) -> int:
    """Of the fast transform, for each channel."""
    core, doublings = hadamard_factors(order)
    return core - 1 + doublings


def _rotated_rows(weight: Float64, order: int) -> Float64:
    """``R' W`` for ``W [K, N]``, R of Hadamard blocks of ``order``."""
    inverse = hadamard_matrix(order).T / np.sqrt(order)
    blocks = weight.reshape(-1, order, weight.shape[1])
    return np.asarray((inverse @ blocks).reshape(weight.shape), np.float64)


def _rotate_qk(
    attention: Attention, builder: HadamardBuilder, ctx: Context, report: PassReport
) -> None:
    transpose = attention.k.producer()
    keys = None if transpose is None else transpose.inputs[0]
    if transpose is None or keys is None or not _swaps_last_two(transpose):
        report.skip(attention.name, "R3: the keys are not transposed right before the product")
        return
    size = _channels(attention.q) or _channels(keys)
    if size is None:
        report.skip(attention.name, "R3: the head size is not known from any shape")
        return
    if len(transpose.outputs[0].uses()) > 1:
        report.skip(attention.name, "R3: the transposed keys have other readers")
        return
    if not has_hadamard(size):
        report.skip(attention.name, f"R3: no Hadamard matrix of order {size} can be constructed")
        return
    if not ctx.budget.take(attention.name):
        return
    _read_instead(transpose, keys, builder.rotate(keys, size))
    _read_instead(attention.qk_matmul, attention.q, builder.rotate(attention.q, size))
    report.change(attention.name, f"R3: Hadamard of order {size}", "queries and keys")


def _channels(value: ir.Value | None) -> int | None:
    """The last axis, from a shape or from the Reshape behind element-wise nodes."""
    for _ in range(_MAX_STEPS):
        if value is None:
            return None
        known, node = last_dim(value), value.producer()
        if known is not None or node is None:
            return known
        if is_op(node, "Reshape"):
            entries = shape_entries(node.inputs[1])
            last = entries[-1] if entries else None
            return last if last is not None and last > 0 else None
        perm = attr_ints(node, "perm")
        keeps_last = perm is not None and perm[-1] == len(perm) - 1
        if not (is_op(node, "Add", "Mul", "Identity", "Cast") or keeps_last):
            return None
        value = node.inputs[0]
    return None


def _swaps_last_two(node: ir.Node) -> bool:
    if not is_op(node, "Transpose"):
        return False
    perm = attr_ints(node, "perm")
    if perm is None or len(perm) < 2:
        return False
    rank = len(perm)
    return perm == (*range(rank - 2), rank - 1, rank - 2)


def _read_instead(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for index, read in enumerate(node.inputs):
        if read is old:
            node.replace_input_with(index, new)


class HadamardBuilder:
    """Inserts rotations; cores of one order are stored once."""

    def __init__(self, model: ir.Model, structure: Structure) -> None:
        self._model = model
        # Inner values often come without a type; linear layers compute in that of their weights.
        weights = (value_dtype(linear.weight) for linear in structure.linears)
        self._dtype = next(weights, None) or ir.DataType.FLOAT
        self._names = Names(model.graph)
        self._cores: dict[int, ir.Value] = {}

    def rotate(self, x: ir.Value, order: int) -> ir.Value:
        """``x R``, computed right after ``x``, in float32 where the operator has no such type."""
        custom_ops.attach(self._model, OP)
        core, _ = hadamard_factors(order)
        base = self._names.fresh(f"{value_name(x)}_rotated")
        dtype = x.dtype or self._dtype
        kept = dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        nodes = [] if kept else [self._cast(x, ir.DataType.FLOAT)]
        nodes.append(
            custom_ops.make_node(
                OP,
                [nodes[0].outputs[0] if nodes else x, self._core(core)],
                {"block": order, "scale": float(np.float32(1 / np.sqrt(order)))},
                name=base,
            )
        )
        if not kept:
            nodes[-1].outputs[0].name = self._names.fresh(f"{base}_float")
            nodes.append(self._cast(nodes[-1].outputs[0], dtype))
        out = nodes[-1].outputs[0]
        out.name, out.type, out.shape = base, x.type, x.shape
        if x.producer() is None:
            insert_before(next(iter(x.consumers())), nodes)
        else:
            insert_after(x, nodes)
        return out

    def _cast(self, x: ir.Value, to: ir.DataType) -> ir.Node:
        name = self._names.fresh(f"{value_name(x)}_Cast")
        node = ir.node("Cast", [x], {"to": to}, name=name)
        node.outputs[0].name = self._names.fresh(f"{name}_output")
        node.outputs[0].type = ir.TensorType(to)
        return node

    def _core(self, order: int) -> ir.Value:
        if order not in self._cores:
            name = self._names.fresh(f"hadamard_core_{order}")
            core = hadamard_matrix(order).astype(np.float32)
            self._cores[order] = add_initializer(self._model.graph, name, core)
        return self._cores[order]
