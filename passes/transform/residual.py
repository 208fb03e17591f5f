"""Residual streams: values of one width that are only added to each other and read by norms.

A stream is what a rotation of the residual (QuaRot's R1) has to turn as a whole::

    writers   embeddings, linear layers that end in the stream, constants added to it
    stream    Adds, Identity, Cast, Dropout, Reshapes that keep the last axis
    readers   norms, and linear layers that read the stream without a norm

Whatever else reads or writes a value of the stream is a blocker, and is named.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxq.graph.match import (
    Embedding,
    Linear,
    Norm,
    Structure,
    const_shape,
    is_const,
    is_op,
    is_pass_through,
    node_label,
    shape_entries,
)
from onnxq.graph.match.values import value_name

_SHAPE_READERS = ("Shape", "Size")


@dataclass
class ResidualStream:
    """One stream.

    Attributes:
        width: D.
        norms: that read it, in graph order.
        linears: that read it directly.
        writers: linear layers whose output it is.
        embeddings: tables whose rows it starts from.
        constants: (node, input index) of constants ``[..., D]`` added to it.
        blockers: reasons why it cannot be rewritten as a whole; empty when it can.
    """

    width: int
    norms: list[Norm] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)
    writers: list[Linear] = field(default_factory=list)
    embeddings: list[Embedding] = field(default_factory=list)
    constants: list[tuple[ir.Node, int]] = field(default_factory=list)
    blockers: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its first norm."""
        return f"residual stream of {self.norms[0].name}"


def find_residual_streams(structure: Structure) -> list[ResidualStream]:
    """All streams of a graph, each value in one of them, in the order of their first norm."""
    walk = _Walk(structure)
    streams: list[ResidualStream] = []
    seen: set[ir.Value] = set()
    for norm in structure.norms:
        if norm.x in seen:
            continue
        stream, values = walk.from_norm(norm)
        seen |= values
        streams.append(stream)
    return streams


class _Walk:
    """Follows one stream through a graph."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.norm_of_node = {node: norm for norm in structure.norms for node in norm.nodes}
        self.norm_of_output = {norm.output: norm for norm in structure.norms}
        self.embedding_of = {e.output: e for e in structure.embeddings}
        self.linear_of = {linear.output: linear for linear in structure.linears}

    def from_norm(self, norm: Norm) -> tuple[ResidualStream, set[ir.Value]]:
        stream = ResidualStream(norm.features)
        seen: set[ir.Value] = set()
        waiting = [v for v in (norm.x, norm.skip) if v is not None]
        norms: dict[Norm, None] = {}
        linears: dict[Linear, None] = {}
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.is_graph_output():
                stream.blockers.append(f"{value_name(value)!r} is a graph output")
            waiting.extend(self._write(value, stream))
            waiting.extend(self._read(value, stream, norms, linears))
        order = {node: i for i, node in enumerate(self.structure.graph)}
        stream.norms = sorted(norms, key=lambda n: order[n.root])
        stream.linears = sorted(linears, key=lambda n: order[n.node])
        stream.writers.sort(key=lambda w: order[w.node])
        if any(n.features != stream.width for n in stream.norms):
            stream.blockers.append("norms of different widths read it")
        return stream, seen

    def _write(self, value: ir.Value, stream: ResidualStream) -> Iterable[ir.Value]:
        """Note who writes ``value``; the values of the stream that it is made from."""
        node = value.producer()
        if node is None:
            stream.blockers.append(f"{value_name(value)!r} is an input or a constant")
            return []
        if value in self.linear_of and self.linear_of[value].kind != "conv":
            linear = self.linear_of[value]
            if linear.out_features != stream.width:
                stream.blockers.append(f"{linear.name} writes {linear.out_features} channels")
            stream.writers.append(linear)
            return []
        if value in self.embedding_of:
            stream.embeddings.append(self.embedding_of[value])
            return []
        norm = self.norm_of_node.get(node)
        if norm is not None and value is norm.sum_output:
            return [v for v in (norm.x, norm.skip) if v is not None]
        if value in self.norm_of_output:
            stream.blockers.append(
                f"the norm {self.norm_of_output[value].name} writes it (post-norm)"
            )
            return []
        if self._passes_rows(node, stream.width):
            return [v for v in node.inputs[:1] if v is not None]
        if is_op(node, "Add"):
            return self._addends(node, stream)
        stream.blockers.append(f"{node.op_type} {node_label(node)!r} writes it")
        return []

    def _read(
        self,
        value: ir.Value,
        stream: ResidualStream,
        norms: dict[Norm, None],
        linears: dict[Linear, None],
    ) -> Iterable[ir.Value]:
        """Note who reads ``value``; the values of the stream that are made from it."""
        more: list[ir.Value] = []
        for node in value.consumers():
            norm = self.norm_of_node.get(node)
            linear = self.structure.linear_at(node)
            if norm is not None and value in (norm.x, norm.skip):
                norms[norm] = None
                if norm.sum_output is not None:
                    more.append(norm.sum_output)
            elif linear is not None and linear.x is value and linear.kind != "conv":
                linears[linear] = None
            elif is_op(node, *_SHAPE_READERS):
                continue
            elif is_op(node, "Add") or self._passes_rows(node, stream.width):
                more.append(node.outputs[0])
            else:
                stream.blockers.append(f"{node.op_type} {node_label(node)!r} reads it")
        return more

    def _addends(self, node: ir.Node, stream: ResidualStream) -> list[ir.Value]:
        found: list[ir.Value] = []
        for index, addend in enumerate(node.inputs):
            if addend is None:
                continue
            if not is_const(addend):
                found.append(addend)
                continue
            shape = const_shape(addend) or ()
            if not shape or shape[-1] != stream.width:
                stream.blockers.append(
                    f"{node_label(node)!r} adds a constant of shape {list(shape)}"
                )
            elif (node, index) not in stream.constants:
                stream.constants.append((node, index))
        return found

    def _passes_rows(self, node: ir.Node, width: int) -> bool:
        """Whether rows of ``width`` come out of ``node`` as they go in."""
        if is_pass_through(node):
            return True
        if not is_op(node, "Reshape"):
            return False
        source, target = node.inputs[0], shape_entries(node.inputs[1])
        known = None if source is None else self.structure.channels_of(source)
        return bool(target and target[-1] == width and known in (None, width))
