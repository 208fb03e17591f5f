"""What the lowering to integers knows of float nodes: what only moves numbers, what is refused."""

from __future__ import annotations

import onnx_ir as ir

from onnxq.errors import UnsupportedError
from onnxq.graph.match.values import is_op, node_label

MOVES = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Slice", "Gather",
    "Expand", "Split", "Dropout",
)  # fmt: skip
"""Operators that only move numbers: they run on integers as they are."""


def source_of(value: ir.Value) -> ir.Value:
    """What ``value`` was moved from."""
    node = value.producer()
    while node is not None and is_op(node, *MOVES) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def no_integer_form(node: ir.Node, kind: str = "") -> UnsupportedError:
    """The refusal of a node that integers cannot do."""
    what = f"{node.op_type} ({kind})" if kind else node.op_type
    return UnsupportedError(
        "UNSUPPORTED-INTEGER-FORM",
        f"`integer-only`: {what} `{node_label(node)}` has no integer form",
        "quantize with `qdq`, which leaves such operators in float",
    )
