"""Tell cheaply whether a pass touched what a model computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


class Snapshot:
    """Which objects a model consists of.

    Two equal snapshots of one model mean that no node, edge, attribute or weight was exchanged
    between them. References are held, so that no object's identity is used again meanwhile.
    Tensors are taken as immutable, as they are everywhere in onnxq.
    """

    def __init__(self, model: ir.Model) -> None:
        self._parts = list(_parts(model))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot) or len(self._parts) != len(other._parts):
            return False
        return all(
            a is b or (isinstance(a, str) and a == b)
            for a, b in zip(self._parts, other._parts, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


def _parts(model: ir.Model) -> Iterator[object]:
    yield from (f"{domain}={version}" for domain, version in sorted(model.opset_imports.items()))
    for root in (model.graph, *(f.graph for f in model.functions.values())):
        for graph in (root, *root.subgraphs()):
            yield from graph.inputs
            yield from graph.outputs
            yield from (v.name or "" for v in (*graph.inputs, *graph.outputs))
            for value in graph.initializers.values():
                yield value
                yield value.const_value
            for node in graph:
                yield node
                yield f"{node.domain}:{node.op_type}:{node.overload}"
                yield from node.inputs
                yield from node.outputs
                yield from node.attributes.values()
