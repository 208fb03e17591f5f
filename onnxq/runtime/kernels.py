"""Which kernel runs each node of a model: the graph as ONNX Runtime runs it, read back."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from onnxq.custom_ops import DOMAIN
from onnxq.runtime.diagnosis import doctor
from onnxq.runtime.library import library_problem
from onnxq.runtime.sessions import session

if TYPE_CHECKING:
    import onnx

By = Literal["onnxq", "body", "onnxruntime"]

_INLINED: Final = re.compile(r"_inlfunc_([A-Za-z0-9]+)_")
_SHOWN: Final = ("bits", "group", "K", "block", "threshold")
_ACTIVATIONS = {
    0: "float activations",
    1: "int8 activations",
    2: "int8 activations by group",
}


@dataclass(frozen=True)
class NodeKernel:
    """What runs one node.

    Args:
        name: of the node, as the model or ONNX Runtime's optimizer called it.
        op: domain (but for ONNX's own) and operator, after fusion.
        by: ``onnxq``: our compiled kernel; ``body``: a standard node out of the body of one of our
            operators; ``onnxruntime``: its own kernel.
        detail: instruction set and attributes of our kernel, or the operator that a body is of.
    """

    name: str
    op: str
    by: By
    detail: str = ""


@dataclass(frozen=True)
class ModelKernels:
    """What runs the nodes of a model on the CPU.

    Args:
        nodes: in the order of the optimized graph, subgraphs included. Nodes whose results are
            constants are gone: ONNX Runtime computes them once, at load.
        why_bodies: why our kernels are not used, or None when they are.
    """

    nodes: tuple[NodeKernel, ...]
    why_bodies: str | None

    def counts(self) -> dict[tuple[str, By, str], int]:
        """How many nodes share operator, kind of kernel and detail, the most numerous first."""
        found: dict[tuple[str, By, str], int] = {}
        for node in self.nodes:
            key = (node.op, node.by, node.detail)
            found[key] = found.get(key, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def model_kernels(model: str | os.PathLike[str], *, library: bool | None = None) -> ModelKernels:
    """Load a model as `session` does and tell which kernel runs each node.

    Args:
        model: path of the model.
        library: as for `session`: None uses our kernels where they are, False the bodies.

    Raises:
        DataError, UnsupportedError: those of `session`.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="onnxq-kernels-") as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, library=library, threads=1, optimized=path)
        graph = onnx.load(path, load_external_data=False).graph
    level = doctor().isa or "none"
    nodes = tuple(_kernel(node, level) for node in _all_nodes(graph))
    return ModelKernels(nodes, _why_bodies(nodes, library))


def _why_bodies(nodes: tuple[NodeKernel, ...], library: bool | None) -> str | None:
    if library is False:
        return "asked for"
    used = {node.by for node in nodes}
    refused = "body" in used and "onnxq" not in used
    return library_problem() or ("the kernels do not take this model" if refused else None)


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                nodes += _all_nodes(inner)
    return nodes


def _kernel(node: onnx.NodeProto, level: str) -> NodeKernel:
    op = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
    if node.domain == DOMAIN:
        return NodeKernel(node.name, op, "onnxq", ", ".join([level, *_attributes(node)]))
    inlined = _INLINED.match(node.name)
    if inlined is not None:
        return NodeKernel(node.name, op, "body", f"of {inlined[1]}")
    return NodeKernel(node.name, op, "onnxruntime")


def _attributes(node: onnx.NodeProto) -> list[str]:
    import onnx

    found: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    shown = [f"{name} {found[name]:g}" for name in _SHOWN if name in found]
    if "int8_activations" in found:
        shown.append(_ACTIVATIONS.get(found["int8_activations"], "unknown activations"))
    return shown
