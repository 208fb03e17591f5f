"""All matches of one graph, and how they hang together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import onnx_ir as ir

from onnxq.graph.match.activations import Activation, find_activations
from onnxq.graph.match.attention import Attention, FusedAttention, find_attentions
from onnxq.graph.match.blocks import (
    Embedding,
    GatedMlp,
    ResidualAdd,
    find_embeddings,
    find_gated_mlps,
    find_residual_adds,
)
from onnxq.graph.match.heads import SHAPE_READERS, ValueToOutput, value_to_output
from onnxq.graph.match.linears import Linear, find_linears
from onnxq.graph.match.norms import Norm, find_norms
from onnxq.graph.match.values import (
    behind,
    is_op,
    is_pass_through,
    last_dim,
    pass_through_readers,
    shape_entries,
)


class Rejected(NamedTuple):
    """A near miss: what it nearly was, the node at which the search began, and why it is none."""

    what: str
    node: str
    reason: str


@dataclass(frozen=True, eq=False)
class Structure:
    """What :func:`analyze` found in one graph; every tuple is in graph order."""

    graph: ir.Graph
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    activations: tuple[Activation, ...]
    attentions: tuple[Attention, ...]
    fused_attentions: tuple[FusedAttention, ...]
    embeddings: tuple[Embedding, ...]
    residual_adds: tuple[ResidualAdd, ...]
    gated_mlps: tuple[GatedMlp, ...]
    rejected: tuple[Rejected, ...]

    @cached_property
    def _linear_of_node(self) -> dict[ir.Node, Linear]:
        return {linear.node: linear for linear in self.linears}

    @cached_property
    def _linear_of_output(self) -> dict[ir.Value, Linear]:
        return {linear.output: linear for linear in self.linears}

    @cached_property
    def _activation_of_output(self) -> dict[ir.Value, Activation]:
        return {activation.output: activation for activation in self.activations}

    @cached_property
    def _norm_of_output(self) -> dict[ir.Value, Norm]:
        return {norm.output: norm for norm in self.norms}

    def linear_at(self, node: ir.Node) -> Linear | None:
        """The linear layer whose MatMul, Gemm or Conv is ``node``."""
        return self._linear_of_node.get(node)

    def channels_of(self, value: ir.Value) -> int | None:
        """The size of the last axis, from the shape or from the match that wrote ``value``."""
        known = last_dim(value)
        if known is not None:
            return known
        if (norm := self.norm_of(value)) is not None:
            return norm.features
        linear = self.linear_of(value)
        if linear is not None and linear.kind != "conv":
            return linear.out_features
        activation = self.activation_of(value)
        return None if activation is None else self.channels_of(activation.x)

    def _readers(self, value: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
        """(node, value it reads), through pass-throughs and Reshapes that keep the last axis."""
        channels = self.channels_of(value)
        for node, read in pass_through_readers(value):
            if is_op(node, "Reshape") and node.inputs[0] is read:
                target = shape_entries(node.inputs[1])
                if channels is not None and target and target[-1] == channels:
                    yield from self._readers(node.outputs[0])
                    continue
            yield node, read

    def readers_of(self, value: ir.Value) -> tuple[Linear, ...]:
        """The linear layers whose ``x`` is ``value``, with its channels where they were.

        Looks through Identity, float Casts, Dropout, and Reshapes that keep the last axis.
        """
        found: dict[Linear, None] = {}
        for node, read in self._readers(value):
            linear = self._linear_of_node.get(node)
            if linear is not None and linear.x is read:
                found[linear] = None
        return tuple(found)

    def other_readers_of(self, value: ir.Value) -> tuple[ir.Node, ...]:
        """The nodes that read what is in ``value`` and are not among :meth:`readers_of`.

        Shape and Size are left out: they see the shape only. Whether ``value`` is also a graph
        output is not said here; ask :meth:`is_output`.
        """
        found: dict[ir.Node, None] = {}
        for node, read in self._readers(value):
            linear = self._linear_of_node.get(node)
            is_reader = linear is not None and linear.x is read
            if not is_reader and not is_op(node, *SHAPE_READERS):
                found[node] = None
        return tuple(found)

    def is_output(self, value: ir.Value) -> bool:
        """Whether ``value``, or what pass-through nodes make of it, is a graph output."""
        return value.is_graph_output() or any(
            self.is_output(node.outputs[0])
            for node in value.consumers()
            if is_pass_through(node) and node.inputs[0] is value
        )

    def norm_of(self, value: ir.Value) -> Norm | None:
        """The norm that wrote ``value``, directly or through pass-through nodes."""
        return self._norm_of_output.get(value) or self._norm_of_output.get(behind(value))

    def linear_of(self, value: ir.Value) -> Linear | None:
        """The linear layer that wrote ``value``, directly or through pass-through nodes."""
        return self._linear_of_output.get(value) or self._linear_of_output.get(behind(value))

    def activation_of(self, value: ir.Value) -> Activation | None:
        """The activation that wrote ``value``, directly or through pass-through nodes."""
        by_output = self._activation_of_output
        return by_output.get(value) or by_output.get(behind(value))

    def v_to_o(self, attention: Attention | FusedAttention) -> ValueToOutput | str:
        """The way of each channel from the value layer to the output layer, or why none."""
        return value_to_output(attention, self.linears)


def analyze(model: ir.Model | ir.Graph) -> Structure:
    """Match everything in the main graph of ``model`` (or in the given graph itself).

    Given a graph alone, the IR version is unknown, and initializers that are also graph inputs
    count as overridable (see :func:`onnxq.graph.match.const_tensor`).
    """
    if isinstance(model, ir.Model):
        return _analyze(model.graph, model.ir_version)
    return _analyze(model, None)


def analyze_all(model: ir.Model) -> Iterator[Structure]:
    """:func:`analyze` for the main graph, then for each body of If, Loop and Scan in it."""
    yield _analyze(model.graph, model.ir_version)
    for graph in model.graph.subgraphs():
        yield _analyze(graph, model.ir_version)


def _analyze(graph: ir.Graph, ir_version: int | None) -> Structure:
    linears, linear_rejects = find_linears(graph, ir_version)
    norms, norm_rejects = find_norms(graph, ir_version)
    activations, activation_rejects = find_activations(graph, ir_version)
    attentions, fused, attention_rejects = find_attentions(graph, ir_version)
    gated_mlps, gated_rejects = find_gated_mlps(linears, activations)
    inner = [node for norm in norms for node in norm.nodes]
    inner += [node for activation in activations for node in activation.nodes]
    inner += [node for attention in attentions for node in attention.nodes]
    inner += [linear.bias_add for linear in linears if linear.bias_add is not None]
    rejects = (
        *linear_rejects,
        *norm_rejects,
        *activation_rejects,
        *attention_rejects,
        *gated_rejects,
    )
    return Structure(
        graph=graph,
        linears=linears,
        norms=norms,
        activations=activations,
        attentions=attentions,
        fused_attentions=fused,
        embeddings=find_embeddings(graph, ir_version),
        residual_adds=find_residual_adds(graph, inner, ir_version),
        gated_mlps=gated_mlps,
        rejected=tuple(Rejected(*reject) for reject in rejects),
    )
