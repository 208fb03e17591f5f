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

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


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
        "use the recipe `w8a8` or the pass `qdq`, which leave such operators in float",
    )


def refuse_decoder(graph: ir.Graph) -> None:
    """Say of a decoder that it is one, rather than which of its operators came first.

    Raises:
        UnsupportedError: ``UNSUPPORTED-INTEGER-DECODER``, it rotates by positions (RotaryEmbedding,
            or the half of x that is negated and concatenated), or reads a cache.
    """
    inputs = set(graph.inputs)
    for node in graph:
        what = ""
        if node.op_type == "RotaryEmbedding":
            what = "rotary embedding"
        elif is_op(node, "Concat"):
            if any(is_op(v.producer(), "Neg") for v in node.inputs if v is not None):
                what = "rotary embedding"
            elif any(v in inputs and v.dtype in _FLOATS for v in node.inputs if v is not None):
                what = "cache of keys and values"
        if what:
            raise UnsupportedError(
                "UNSUPPORTED-INTEGER-DECODER",
                f"`integer-only`: the model is a decoder: {what} at {node.op_type} "
                f"`{node_label(node)}`; only encoders have an integer form",
                "use the recipe `w8a8-llm` or `w4`, which leave attention in float",
            )
