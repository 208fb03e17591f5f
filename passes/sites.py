"""What the nodes that a plan speaks of are called."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from onnxq.graph.match.values import node_label, value_name


def site_names(graph: ir.Graph) -> dict[ir.Node, str]:
    """One name for each node: its own, or its first output's where it has none or shares it.

    This is how :class:`onnxq.graph.match.Linear` is named too.
    """
    count = Counter(node.name for node in graph if node.name)
    return {
        node: value_name(node.outputs[0])
        if count[node.name or ""] > 1 and node.outputs
        else node_label(node)
        for node in graph
    }
