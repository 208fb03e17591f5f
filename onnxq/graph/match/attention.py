"""Attention: softmax between two MatMuls, and the fused operators.

::

    scores  = MatMul(q, k)                      q: [B, H, S, D], k: [B, H, D, T]
    softmax_in = mask(scale * scores)           any order of Mul, Div, Add, Where, Cast, Reshape
    probs   = Softmax(softmax_in, axis=-1)      then Cast, Dropout or the guard against NaN
    context = MatMul(probs, v)                  v: [B, H, T, D]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxq.graph.match.values import (
    attr_int,
    attr_ints,
    const_scalar,
    consumers,
    is_const,
    is_op,
    is_pass_through,
    node_input,
    node_label,
    op_domain,
    producer,
    rank,
    reads_type_only,
    shape_entries,
    static_shape,
)

MaskStyle = Literal["add", "where"]

_MAX_STEPS = 16


@dataclass(frozen=True)
class Attention:
    """One softmax attention made of single operators.

    Attributes:
        name: of the Softmax node.
        q, k: what the QK^T MatMul reads (k already transposed), after any pre-scaling.
        v: what the PV MatMul reads.
        scores: output of the QK^T MatMul.
        mask: the addend, or the condition of a Where; the one nearest to the Softmax if there
            are several; None without a mask.
        mask_style: how the mask is applied; None without a mask.
        mask_add: the Add or Sub that applies it; None for a Where mask.
        mask_node: the Add, Sub or Where that applies it.
        addends: all values that are added to the scores (position bias, masks), nearest to the
            Softmax first.
        softmax: the Softmax node.
        softmax_in: what it reads.
        probs: what the PV MatMul reads from it.
        context: output of the PV MatMul.
        scale: product of all constant factors on q, k and the scores; None when one of them is
            not constant.
        nodes: from the QK^T MatMul to the PV MatMul, in graph order of the main path.
        num_heads: H where a shape or a Reshape tells it.
    """

    name: str
    q: ir.Value
    k: ir.Value
    v: ir.Value
    scores: ir.Value
    mask: ir.Value | None
    mask_style: MaskStyle | None
    mask_add: ir.Node | None
    mask_node: ir.Node | None
    addends: tuple[ir.Value, ...]
    softmax: ir.Node
    softmax_in: ir.Value
    probs: ir.Value
    context: ir.Value
    scale: float | None
    nodes: tuple[ir.Node, ...]
    num_heads: int | None

    kind: ClassVar[str] = "softmax"

    @property
    def qk_matmul(self) -> ir.Node:
        """The node that writes ``scores``."""
        return self.nodes[0]

    @property
    def pv_matmul(self) -> ir.Node:
        """The node that writes ``context``."""
        return self.nodes[-1]


@dataclass(frozen=True)
class FusedAttention:
    """One operator that is a whole attention; what happens inside cannot be seen or changed.

    Attributes:
        name: of the node.
        kind: ``Attention``, or ``com.microsoft.<type>``.
        node: the operator.
        q, k, v: its inputs; k and v are None where q holds all three (packed).
        mask: its mask or bias input, if any.
        context: its first output.
        num_heads, kv_heads: as its attributes say; None where it reads 4-D inputs.
    """

    name: str
    kind: str
    node: ir.Node
    q: ir.Value
    k: ir.Value | None
    v: ir.Value | None
    mask: ir.Value | None
    context: ir.Value
    num_heads: int | None
    kv_heads: int | None

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The operator."""
        return (self.node,)


@dataclass(frozen=True)
class _Fused:
    """Where a fused operator keeps what: indices of inputs (-1: none), names of attributes."""

    k: int
    v: int
    mask: int
    heads: str
    kv_heads: str


_FUSED: dict[tuple[str, str], _Fused] = {
    ("", "Attention"): _Fused(1, 2, 3, "q_num_heads", "kv_num_heads"),
    ("com.microsoft", "Attention"): _Fused(-1, -1, 3, "num_heads", "num_heads"),
    ("com.microsoft", "MultiHeadAttention"): _Fused(1, 2, 4, "num_heads", "num_heads"),
    ("com.microsoft", "GroupQueryAttention"): _Fused(1, 2, -1, "num_heads", "kv_num_heads"),
}


def match_fused_attention(node: ir.Node) -> FusedAttention | None:
    """The attention that is one operator; None for other nodes."""
    layout = _FUSED.get((op_domain(node), node.op_type))
    q = node_input(node, 0)
    if layout is None or q is None:
        return None
    domain = op_domain(node)
    return FusedAttention(
        name=node_label(node),
        kind=f"{domain}.{node.op_type}" if domain else node.op_type,
        node=node,
        q=q,
        k=node_input(node, layout.k) if layout.k > 0 else None,
        v=node_input(node, layout.v) if layout.v > 0 else None,
        mask=node_input(node, layout.mask) if layout.mask > 0 else None,
        context=node.outputs[0],
        num_heads=attr_int(node, layout.heads, 0) or None,
        kv_heads=attr_int(node, layout.kv_heads, 0) or None,
    )


# Decomposed -----------------------------------------------------------------------------------


@dataclass
class _Path:
    """From the Softmax up to the scores; lists run from the Softmax upwards."""

    nodes: list[ir.Node] = field(default_factory=list)
    masks: list[tuple[ir.Node, ir.Value]] = field(default_factory=list)
    scale: float | None = 1.0
    scores: ir.Node | None = None

    def extended(self, other: _Path) -> _Path:
        scale = None if self.scale is None or other.scale is None else self.scale * other.scale
        return _Path(self.nodes + other.nodes, self.masks + other.masks, scale, other.scores)


class _AmbiguousError(Exception):
    """Two MatMuls of activations are added before the Softmax."""


def match_attention(softmax: ir.Node, ir_version: int | None = None) -> Attention | str | None:
    """The attention around a Softmax node; a reason for a near miss; None for other nodes."""
    if not is_op(softmax, "Softmax") or softmax.inputs[0] is None:
        return None
    try:
        path = _walk_up(softmax.inputs[0], ir_version, 0)
    except _AmbiguousError:
        return "two products of activations are added before the Softmax"
    below = _walk_down(softmax)
    if path is None and isinstance(below, str):
        return None
    if path is None:
        return "the Softmax does not read a (scaled, masked) MatMul of two activations"
    if isinstance(below, str):
        return below
    assert path.scores is not None
    q, k = path.scores.inputs[0], path.scores.inputs[1]
    lower_nodes, probs, product = below
    v = product.inputs[1]
    assert q is not None
    assert k is not None
    assert v is not None
    if not _runs_over_last_axis(softmax, q, k):
        return f"Softmax runs over axis {attr_int(softmax, 'axis', -1)}, not the last"
    mask_node, mask = path.masks[0] if path.masks else (None, None)
    is_where = is_op(mask_node, "Where")
    return Attention(
        name=node_label(softmax),
        q=q,
        k=k,
        v=v,
        scores=path.scores.outputs[0],
        mask=mask,
        mask_style=None if mask is None else ("where" if is_where else "add"),
        mask_add=None if is_where else mask_node,
        mask_node=mask_node,
        addends=tuple(value for node, value in path.masks if not is_op(node, "Where")),
        softmax=softmax,
        softmax_in=softmax.inputs[0],
        probs=probs,
        context=product.outputs[0],
        scale=_total_scale(path.scale, q, k, ir_version),
        nodes=(path.scores, *reversed(path.nodes), softmax, *lower_nodes, product),
        num_heads=_num_heads(q, v, ir_version),
    )


def _walk_up(value: ir.Value, ir_version: int | None, steps: int) -> _Path | None:
    """From the Softmax's input to the MatMul of q and k; None if it is not one."""
    node = value.producer()
    if node is None or steps > _MAX_STEPS:
        return None
    first, second = node_input(node, 0), node_input(node, 1)
    if is_op(node, "MatMul"):
        if is_const(first, ir_version) or is_const(second, ir_version):
            return None
        return _Path(scores=node)
    if is_pass_through(node) or is_op(node, "Reshape", "Squeeze", "Unsqueeze", "Clip"):
        return _step(first, ir_version, steps, _Path([node]))
    if is_op(node, "Mul", "Div"):
        return _walk_scale(node, ir_version, steps)
    if is_op(node, "Add", "Sub", "Max"):
        return _walk_two(node, (first, second), ir_version, steps)
    if is_op(node, "Where"):
        return _walk_two(node, (second, node_input(node, 2)), ir_version, steps)
    return None


def _step(above: ir.Value | None, ir_version: int | None, steps: int, here: _Path) -> _Path | None:
    rest = None if above is None else _walk_up(above, ir_version, steps + 1)
    return None if rest is None else here.extended(rest)


def _walk_scale(node: ir.Node, ir_version: int | None, steps: int) -> _Path | None:
    """Through a Mul or Div by a scale."""
    for at in (0, 1) if is_op(node, "Mul") else (0,):
        factor = const_scalar(node_input(node, 1 - at), ir_version)
        if factor is not None and is_op(node, "Div"):
            factor = 1.0 / factor if factor else None
        rest = _step(node_input(node, at), ir_version, steps, _Path([node], [], factor))
        if rest is not None:
            return rest
    return None


def _walk_two(
    node: ir.Node,
    operands: tuple[ir.Value | None, ir.Value | None],
    ir_version: int | None,
    steps: int,
) -> _Path | None:
    """Through an Add, Sub, Max or Where: one operand holds the scores, the other masks them."""
    found: list[_Path] = []
    for at in (0,) if is_op(node, "Sub") else (0, 1):
        other = operands[1 - at]
        mask = node_input(node, 0) if is_op(node, "Where") else other
        masks = [] if is_op(node, "Max") or mask is None else [(node, mask)]
        path = _step(operands[at], ir_version, steps, _Path([node], masks))
        if path is not None:
            found.append(path)
    if len(found) > 1:
        raise _AmbiguousError
    return found[0] if found else None


def _walk_down(softmax: ir.Node) -> tuple[list[ir.Node], ir.Value, ir.Node] | str:
    """From the Softmax to the PV MatMul: (nodes between, probs, MatMul), or a reason."""
    nodes: list[ir.Node] = []
    value = softmax.outputs[0]
    for _ in range(_MAX_STEPS):
        guard = _zero_guard(value)
        if guard is not None:
            nodes.extend(guard)
            value = guard[-1].outputs[0]
            continue
        readers = [n for n in consumers(value) if not reads_type_only(n, value)]
        node = readers[0] if len(readers) == 1 and not value.is_graph_output() else None
        if node is None:
            return "the probabilities are an output or read by several nodes"
        if is_op(node, "MatMul"):
            if node_input(node, 0) is not value:
                return "the probabilities are the right operand of MatMul"
            if is_const(node_input(node, 1)):
                return "the probabilities are multiplied by a constant"
            return nodes, value, node
        if not (is_pass_through(node) or is_op(node, "Reshape")):
            return f"the probabilities are read by {node.op_type}, not by MatMul"
        nodes.append(node)
        value = node.outputs[0]
    return "no MatMul reads the probabilities"


def _zero_guard(value: ir.Value) -> tuple[ir.Node, ...] | None:
    """``Where(row is masked throughout, 0, p)``, with its IsNaN test if that reads ``p``."""
    if value.is_graph_output():
        return None
    readers = [n for n in consumers(value) if not reads_type_only(n, value)]
    select = next((n for n in readers if is_op(n, "Where")), None)
    if select is None or node_input(select, 2) is not value or not _is_zero(select.inputs[1]):
        return None
    tests = [n for n in readers if is_op(n, "IsNaN") and n.outputs[0] is select.inputs[0]]
    return (*tests, select) if len(tests) + 1 == len(readers) else None


def _is_zero(value: ir.Value | None) -> bool:
    while (node := producer(value, "Cast", "CastLike")) is not None:
        value = node.inputs[0]
    return const_scalar(value) == 0


def _runs_over_last_axis(softmax: ir.Node, q: ir.Value, k: ir.Value) -> bool:
    graph = softmax.graph
    opset = None if graph is None else graph.opset_imports.get("")
    default = 1 if opset is not None and opset < 13 else -1
    axis = attr_int(softmax, "axis", default)
    if axis == -1:
        return True
    known = next((r for r in (rank(softmax.inputs[0]), _rank(q), _rank(k)) if r), None)
    return known is not None and axis == known - 1


def _rank(value: ir.Value) -> int | None:
    """The rank from the value's shape, or from the Transpose or Reshape that wrote it."""
    known = rank(value)
    if known is not None:
        return known
    node = producer(value, "Transpose", "Reshape", "Mul", "Div")
    if node is None or node.inputs[0] is None:
        return None
    if is_op(node, "Transpose"):
        perm = attr_ints(node, "perm")
        return None if perm is None else len(perm)
    if is_op(node, "Reshape"):
        target = shape_entries(node_input(node, 1))
        return None if target is None else len(target)
    return _rank(node.inputs[0])


def _total_scale(
    scale: float | None, q: ir.Value, k: ir.Value, ir_version: int | None
) -> float | None:
    """The scale after the product, times the constant factors on q and on k."""
    for start in (q, k):
        value: ir.Value | None = start
        for _ in range(_MAX_STEPS):
            node = producer(value)
            if node is None or scale is None:
                break
            if is_op(node, "Mul", "Div"):
                numbers = [const_scalar(v, ir_version) for v in node.inputs[:2]]
                at = 1 if numbers[1] is not None else 0
                factor = numbers[at]
                if factor is None:
                    if not any(is_const(v, ir_version) for v in node.inputs):
                        return None
                    break
                if at == 0 and is_op(node, "Div"):
                    break
                scale = scale * factor if is_op(node, "Mul") else scale / factor
                value = node.inputs[1 - at]
            elif is_pass_through(node) or is_op(node, "Transpose", "Reshape"):
                value = node.inputs[0]
            else:
                break
    return scale


def _heads(value: ir.Value, ir_version: int | None) -> int | None:
    """H of ``[B, H, S, D]`` from the shape, or from the Reshape that split the heads."""
    for _ in range(_MAX_STEPS):
        shape = static_shape(value)
        if shape is not None and len(shape) == 4 and shape[1] is not None:
            return shape[1]
        node = value.producer()
        if node is None or node.inputs[0] is None:
            return None
        if is_op(node, "Reshape"):
            return _heads_of_reshape(node, 1)
        if is_op(node, "Transpose"):
            split = producer(node.inputs[0], "Reshape")
            if split is None or attr_ints(node, "perm") not in ((0, 2, 1, 3), (0, 2, 3, 1)):
                return None
            return _heads_of_reshape(split, 2)
        is_scaled = is_op(node, "Mul", "Div") and const_scalar(node_input(node, 1), ir_version)
        if not (is_scaled or is_pass_through(node)):
            return None
        value = node.inputs[0]
    return None


def _heads_of_reshape(node: ir.Node, at: int) -> int | None:
    target = shape_entries(node_input(node, 1))
    heads = target[at] if target is not None and len(target) == 4 else None
    return heads if heads is not None and heads > 0 else None


def _num_heads(q: ir.Value, v: ir.Value, ir_version: int | None) -> int | None:
    """Heads of q, or those of v where it has more than one (one may be broadcast)."""
    heads = _heads(q, ir_version)
    if heads is not None:
        return heads
    of_v = _heads(v, ir_version)
    return of_v if of_v is not None and of_v > 1 else None


def find_attentions(
    graph: ir.Graph, ir_version: int | None = None
) -> tuple[tuple[Attention, ...], tuple[FusedAttention, ...], tuple[tuple[str, str, str], ...]]:
    """All attentions of ``graph``, the fused ones, and (what, node, reason) of near misses."""
    found: list[Attention] = []
    fused: list[FusedAttention] = []
    rejected: list[tuple[str, str, str]] = []
    for node in graph:
        operator = match_fused_attention(node)
        if operator is not None:
            fused.append(operator)
            continue
        match = match_attention(node, ir_version)
        if isinstance(match, str):
            rejected.append(("attention", node_label(node), match))
        elif match is not None:
            found.append(match)
    return tuple(found), tuple(fused), tuple(rejected)
