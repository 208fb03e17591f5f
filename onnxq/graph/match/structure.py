"""All matches of one graph, and how they hang together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import onnx_ir as ir

from onnxq.graph.match.linears import Linear, find_linears
from onnxq.graph.match.norms import Norm, find_norms
from onnxq.graph.match.values import behind, pass_through_readers


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
    rejected: tuple[Rejected, ...]

    @cached_property
    def _linear_of_node(self) -> dict[ir.Node, Linear]:
        return {linear.node: linear for linear in self.linears}

    @cached_property
    def _norm_of_output(self) -> dict[ir.Value, Norm]:
        return {norm.output: norm for norm in self.norms}

    def linear_at(self, node: ir.Node) -> Linear | None:
        """The linear layer whose MatMul, Gemm or Conv is ``node``."""
        return self._linear_of_node.get(node)

    def readers_of(self, value: ir.Value) -> tuple[Linear, ...]:
        """The linear layers whose ``x`` is ``value``, directly or through pass-through nodes."""
        found: dict[Linear, None] = {}
        for node, read in pass_through_readers(value):
            linear = self._linear_of_node.get(node)
            if linear is not None and linear.x is read:
                found[linear] = None
        return tuple(found)

    def other_readers_of(self, value: ir.Value) -> tuple[ir.Node, ...]:
        """The nodes that read ``value`` and are not among :meth:`readers_of`."""
        found: dict[ir.Node, None] = {}
        for node, read in pass_through_readers(value):
            linear = self._linear_of_node.get(node)
            if linear is None or linear.x is not read:
                found[node] = None
        return tuple(found)

    def norm_of(self, value: ir.Value) -> Norm | None:
        """The norm that wrote ``value``, directly or through pass-through nodes."""
        return self._norm_of_output.get(value) or self._norm_of_output.get(behind(value))


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
    rejected = tuple(Rejected(*r) for r in (*linear_rejects, *norm_rejects))
    return Structure(graph=graph, linears=linears, norms=norms, rejected=rejected)
