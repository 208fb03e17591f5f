"""Embeddings, residual adds and gated MLPs: what the linear layers are assembled into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxq.graph.match.activations import Activation
from onnxq.graph.match.linears import Linear
from onnxq.graph.match.values import (
    FLOAT_TYPES,
    attr_int,
    behind,
    const_shape,
    is_const,
    is_op,
    node_input,
    node_label,
    op_domain,
    other_input,
    pass_through_readers,
    producer,
    static_shape,
    through_identity,
    value_dtype,
)


@dataclass(frozen=True)
class Embedding:
    """``output[..., D] = table[indices]``.

    Attributes:
        name: of the node.
        node: the Gather.
        table: constant, ``[rows, D]`` float.
        indices: integers of any shape.
        output: ``[*indices, D]``.
    """

    name: str
    node: ir.Node
    table: ir.Value
    indices: ir.Value
    output: ir.Value

    @property
    def is_table_shared(self) -> bool:
        """Whether something else reads the table too (a tied output layer, say)."""
        return len(self.table.uses()) > 1 or self.table.is_graph_output()


@dataclass(frozen=True)
class ResidualAdd:
    """``output = skip + branch``, where ``branch`` is computed from ``skip``."""

    name: str
    node: ir.Node
    skip: ir.Value
    branch: ir.Value
    output: ir.Value


@dataclass(frozen=True)
class GatedMlp:
    """``down(act(gate(x)) * up(x))``; ``mul`` is the product's node."""

    name: str
    gate: Linear
    up: Linear
    act: Activation
    mul: ir.Node
    down: Linear


def find_embeddings(graph: ir.Graph, ir_version: int | None = None) -> tuple[Embedding, ...]:
    """All Gathers of rows from a constant float table of rank 2."""
    found = []
    for node in graph:
        if not is_op(node, "Gather") or attr_int(node, "axis", 0) != 0:
            continue
        table, indices = node_input(node, 0), node_input(node, 1)
        shape = const_shape(table, ir_version)
        if table is None or indices is None or shape is None or len(shape) != 2:
            continue
        table = through_identity(table)
        if value_dtype(table) not in FLOAT_TYPES:
            continue
        found.append(Embedding(node_label(node), node, table, indices, node.outputs[0]))
    return tuple(found)


# Residual adds --------------------------------------------------------------------------------

#: These read the shape, or numbers that are no signal; a path through them is not a branch.
_NOT_DATA = frozenset({"Shape", "Size", "ConstantOfShape", "Range", "NonZero"})


def find_residual_adds(
    graph: ir.Graph, inner: Iterable[ir.Node], ir_version: int | None = None
) -> tuple[ResidualAdd, ...]:
    """All Adds of a value and something computed from it.

    Args:
        graph: where to look.
        inner: nodes of other matches (activations, norms, biases), whose Adds are no residuals.
        ir_version: of the model, see :func:`onnxq.graph.match.const_tensor`.
    """
    position = {node: index for index, node in enumerate(graph)}
    skipped = frozenset(inner)
    found = []
    for node in graph:
        if node in skipped or not is_op(node, "Add"):
            continue
        first, second = node_input(node, 0), node_input(node, 1)
        if first is None or second is None or not _may_be_residual(first, second, ir_version):
            continue
        for skip, branch in ((first, second), (second, first)):
            if _derives_from(branch, skip, position):
                output = node.outputs[0]
                found.append(ResidualAdd(node_label(node), node, skip, branch, output))
                break
    return tuple(found)


def _may_be_residual(first: ir.Value, second: ir.Value, ir_version: int | None) -> bool:
    """Whether two addends are activations of one shape, as far as known."""
    if first is second or is_const(first, ir_version) or is_const(second, ir_version):
        return False
    if any(value_dtype(v) not in (*FLOAT_TYPES, None) for v in (first, second)):
        return False
    a, b = static_shape(first), static_shape(second)
    if a is None or b is None:
        return True
    if len(a) != len(b):
        return False
    return all(x == y or x is None or y is None for x, y in zip(a, b, strict=True))


def _derives_from(value: ir.Value, source: ir.Value, position: Mapping[ir.Node, int]) -> bool:
    """Whether data flow leads from ``source`` to ``value``; looks no further back than it."""
    origin = behind(source)
    writer = origin.producer()
    oldest = -1 if writer is None else position.get(writer, -1)
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current is source or current is origin:
            return True
        if current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is None or position.get(node, -1) <= oldest:
            continue
        if op_domain(node) == "" and node.op_type in _NOT_DATA:
            continue
        stack.extend(v for v in node.inputs if v is not None)
    return False


# Gated MLPs -----------------------------------------------------------------------------------


def find_gated_mlps(
    linears: Iterable[Linear], activations: Iterable[Activation]
) -> tuple[tuple[GatedMlp, ...], tuple[tuple[str, str, str], ...]]:
    """All gated MLPs, and (what, node, reason) of near misses."""
    all_linears = tuple(linears)
    by_output = {linear.output: linear for linear in all_linears}
    by_node = {linear.node: linear for linear in all_linears}
    found: list[GatedMlp] = []
    rejected: list[tuple[str, str, str]] = []
    for act in activations:
        for mul, read in pass_through_readers(act.output):
            if not is_op(mul, "Mul"):
                continue
            match = _match_gated_mlp(act, mul, read, by_output, by_node)
            if isinstance(match, str):
                rejected.append(("gated-mlp", node_label(mul), match))
            elif match is not None:
                found.append(match)
    return tuple(found), tuple(rejected)


def _match_gated_mlp(
    act: Activation,
    mul: ir.Node,
    read: ir.Value,
    by_output: Mapping[ir.Value, Linear],
    by_node: Mapping[ir.Node, Linear],
) -> GatedMlp | str | None:
    other = other_input(mul, read)
    if other is None or is_const(other) or other is read:
        return None
    readers = list(pass_through_readers(mul.outputs[0]))
    downs = [by_node[node] for node, _ in readers if node in by_node]
    if not downs:
        return None
    if len(readers) != 1 or mul.outputs[0].is_graph_output():
        return "the product is read by more than one linear layer"
    gate, up = by_output.get(behind(act.x)), by_output.get(behind(other))
    if gate is None or up is None:
        split = producer(behind(other), "Split", "Slice")
        if split is not None and split.inputs[0] is not None:
            return "gate and up are one linear layer that is split"
        return None
    if behind(gate.x) is not behind(up.x):
        return "gate and up read different values"
    return GatedMlp(node_label(mul), gate, up, act, mul, downs[0])
