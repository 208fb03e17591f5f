"""``online-hadamard``: rotate activations at run time where no layer can take the rotation up.

R4 in front of the layer that closes an MLP: its input comes out of a product or an activation
function, so the rotation has to be computed; its inverse goes into the weight (x rows)::

    down(x) = x W = (x R) (R' W)

R3 on queries and keys behind the rotary embedding, R ``[d, d]`` the same for all heads::

    q k' = (q R) (k R)'

R is a Hadamard matrix divided by the root of its order: of the whole width n, or of ``block``
channels at a time. The whole width is computed as a Kronecker product of two factors,
``n = K M``, in ``n (K + M)`` multiplications a token instead of ``n^2``::

    x -> [.., K, M] -> times H_M -> swap axes -> times H_K -> [.., n]

The channels come out in the order of the swapped axes; the weight's rows follow. The rotation is a
node of domain ``com.onnxq`` whose body, standard operators, is a function in the model: so it runs
anywhere, and no later pass takes it for a layer to be quantized.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np
import onnx_ir as ir

from onnxq.custom_ops import DOMAIN, domain_version
from onnxq.errors import SpecError
from onnxq.graph.edit import Names, add_initializer, insert_after, insert_before
from onnxq.graph.match import (
    Attention,
    Linear,
    Structure,
    analyze,
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

ROTATE_BLOCKS: Final = "RotateBlocks"
ROTATE_KRONECKER: Final = "RotateKronecker"
_MIN_IR_VERSION = 8
_MIN_OPSET = 13
_MAX_STEPS = 12


@dataclass(frozen=True)
class OnlineHadamard(Pass):
    """Insert Hadamard rotations at run time, their inverse folded into the weights.

    Args:
        sites: ``down``: inputs of the layers that close an MLP (R4); ``qk``: queries and keys
            behind the rotary embedding (R3).
        block: channels that are rotated together at ``down``; 0 for the whole width. Formats
            with a scale a block want a multiple of their block.
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
        if model.opset_imports.get("", 0) < _MIN_OPSET:
            report.skip("the model", f"needs opset {_MIN_OPSET}; put `canonicalize` first")
            return report
        structure = analyze(model)
        builder = _Builder(model, structure)
        if "down" in self.sites:
            self._rotate_downs(structure, builder, ctx, report)
        if "qk" in self.sites:
            for attention in structure.attentions:
                _rotate_qk(attention, builder, ctx, report)
        return report

    def _rotate_downs(
        self, structure: Structure, builder: _Builder, ctx: Context, report: PassReport
    ) -> None:
        downs = closing_layers(structure)
        if not downs:
            report.skip("down", "the graph has no MLP whose closing layer could be told")
        for down in downs:
            n = down.in_features
            reason = _why_no_hadamard(n, self.block)
            if reason is not None:
                report.skip(down.name, reason)
            elif ctx.budget.take(down.name):
                plan = RotationPlan.of(n, self.block)
                put_weight(down, plan.matrix().T @ weight64(down))
                rotated = builder.rotate(down.x, plan)
                _read_instead(down.node, down.x, rotated)
                share = 100 * plan.cost / (n * down.out_features)
                report.change(
                    down.name, f"R4: {plan}", f"+{share:.1f}% of the layer's multiplications"
                )


def closing_layers(structure: Structure) -> list[Linear]:
    """Layers that read an activation function or a gated product, in graph order."""
    gated = {mlp.down for mlp in structure.gated_mlps}
    return [
        linear
        for linear in structure.linears
        if linear in gated
        or (linear.kind != "conv" and structure.activation_of(linear.x) is not None)
    ]


def _why_no_hadamard(n: int, block: int) -> str | None:
    if block and n % block:
        return f"its {n} inputs are not divided by block={block}"
    if not has_hadamard(block or n):
        return f"no Hadamard matrix of order {n} can be constructed; give a block"
    return None


@dataclass(frozen=True)
class RotationPlan:
    """How n channels are rotated.

    Args:
        channels: n.
        inner: M, the order of the factor that is applied to neighbouring channels.
        outer: K, the order of the other factor; 0: blocks of M are rotated one by one.
    """

    channels: int
    inner: int
    outer: int

    @classmethod
    def of(cls, n: int, block: int) -> RotationPlan:
        """Blocks, or the cheapest two factors of the whole width."""
        if block:
            return cls(n, block, 0)
        core, doublings = hadamard_factors(n)
        pairs = [(core << i, 1 << (doublings - i)) for i in range(doublings + 1)]
        outer, inner = min(pairs, key=sum)
        return cls(n, n, 0) if min(outer, inner) == 1 else cls(n, inner, outer)

    @property
    def cost(self) -> int:
        """Multiplications a row."""
        return self.channels * (self.inner + self.outer)

    def factor(self, order: int) -> Float64:
        """``H / sqrt(order)``."""
        return np.asarray(hadamard_matrix(order) / np.sqrt(order), np.float64)

    def matrix(self) -> Float64:
        """R ``[n, n]`` with ``y = x R`` for a row x."""
        if not self.outer:
            blocks = self.channels // self.inner
            return np.asarray(np.kron(np.eye(blocks), self.factor(self.inner)), np.float64)
        whole = np.kron(self.factor(self.outer), self.factor(self.inner))
        swapped = np.arange(self.channels).reshape(self.outer, self.inner).T.reshape(-1)
        return np.asarray(whole[:, swapped], np.float64)

    def __str__(self) -> str:
        if self.outer:
            return f"Hadamard of order {self.channels} = {self.outer} x {self.inner}"
        return f"Hadamard of order {self.inner}"


def _rotate_qk(attention: Attention, builder: _Builder, ctx: Context, report: PassReport) -> None:
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
    plan = RotationPlan(size, size, 0)
    rotated = builder.rotate(keys, plan)
    _read_instead(transpose, keys, rotated)
    _read_instead(attention.qk_matmul, attention.q, builder.rotate(attention.q, plan))
    report.change(attention.name, f"R3: {plan}", "queries and keys")


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


class _Builder:
    """Inserts rotations; factors of one order and type are stored once."""

    def __init__(self, model: ir.Model, structure: Structure) -> None:
        self._model = model
        # Inner values often come without a type; linear layers compute in that of their weights.
        weights = (value_dtype(linear.weight) for linear in structure.linears)
        self._dtype = (next(weights, None) or ir.DataType.FLOAT).numpy()
        self._names = Names(model.graph)
        self._factors: dict[tuple[int, np.dtype[np.generic]], ir.Value] = {}

    def rotate(self, x: ir.Value, plan: RotationPlan) -> ir.Value:
        """``x R``, computed right after ``x``."""
        op_type = ROTATE_KRONECKER if plan.outer else ROTATE_BLOCKS
        self._attach(op_type)
        dtype = self._dtype if x.dtype is None else x.dtype.numpy()
        orders = [plan.inner, plan.outer] if plan.outer else [plan.inner]
        factors = [self._factor(order, plan, dtype) for order in orders]
        base = self._names.fresh(f"{value_name(x)}_rotated")
        node = ir.Node(DOMAIN, op_type, [x, *factors], num_outputs=1, name=base)
        out = node.outputs[0]
        out.name, out.type, out.shape = base, x.type, x.shape
        if x.producer() is None:
            insert_before(next(iter(x.consumers())), node)
        else:
            insert_after(x, node)
        return out

    def _factor(self, order: int, plan: RotationPlan, dtype: np.dtype[np.generic]) -> ir.Value:
        key = (order, dtype)
        if key not in self._factors:
            name = self._names.fresh(f"hadamard_{order}")
            array = plan.factor(order).astype(dtype)
            self._factors[key] = add_initializer(self._model.graph, name, array)
        return self._factors[key]

    def _attach(self, op_type: str) -> None:
        model = self._model
        identifier = (DOMAIN, op_type, "")
        if identifier in model.functions:
            return
        model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
        model.opset_imports[DOMAIN] = domain_version()
        model.functions[identifier] = _function(op_type, model.opset_imports[""])


def _function(op_type: str, opset: int) -> ir.Function:
    """The body: ``RotateBlocks(x, inner)`` or ``RotateKronecker(x, inner, outer)``."""
    has_outer = op_type == ROTATE_KRONECKER
    inputs = [ir.Value(name=n) for n in ("x", "inner", *(["outer"] if has_outer else []))]
    x, inner = inputs[:2]
    nodes: list[ir.Node] = []

    def op(kind: str, args: Iterable[ir.Value], **attributes: object) -> ir.Value:
        node = ir.node(kind, list(args), attributes)  # type: ignore[arg-type]
        node.outputs[0].name = f"v{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    def ints(*numbers: int) -> ir.Value:
        return op("Constant", [], value_ints=list(numbers))

    def size_of(matrix: ir.Value) -> ir.Value:
        return op("Slice", [op("Shape", [matrix]), ints(0), ints(1)])

    shape = op("Shape", [x])
    if has_outer:
        outer = inputs[2]
        split = op("Concat", [ints(-1), size_of(outer), size_of(inner)], axis=0)
        rows = op("MatMul", [op("Reshape", [x, split]), inner])
        turned = op("MatMul", [op("Transpose", [rows], perm=[0, 2, 1]), outer])
    else:
        split = op("Concat", [ints(-1), size_of(inner)], axis=0)
        turned = op("MatMul", [op("Reshape", [x, split]), inner])
    result = op("Reshape", [turned, shape])
    graph = ir.Graph(inputs, [result], nodes=nodes, opset_imports={"": opset}, name=op_type)
    return ir.Function(DOMAIN, op_type, graph=graph, attributes=[])
