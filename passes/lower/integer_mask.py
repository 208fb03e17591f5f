"""Attention masks as integers: 0 where a position counts, far below every score where it does not.

Exporters build masks from the integer ``attention_mask`` by float arithmetic that yields only 0 and
one large negative number: ``(1 - mask) * -10000``, ``Where(mask, 0, -3.4e38)``, and so on. The
same nodes are built again on int32, with every large negative constant replaced by one number.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxq.errors import UnsupportedError
from onnxq.graph.match.values import const_array, is_op, node_label, value_name
from onnxq.passes.lower.integer_forms import Emitter

_LARGE = 1000.0
"""A constant this far below zero masks; scores of a trained model do not come near."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
_ARITHMETIC = ("Add", "Sub", "Mul", "Where", "Max", "Min", "Equal", "Less", "Greater", "Not")
_MOVES = (
    "Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Slice", "Gather", "Identity",
    "Flatten", "Tile", "Concat",
)  # fmt: skip
_LOGIC = ("And", "Or", "Not")
_SHAPES = ("Shape", "Size")


class MaskLowering:
    """Builds masks again on integers; each value once.

    Args:
        emitter: whose constants and names are used; nodes go right behind the originals.
        masked: what is added to a score to mask it.
    """

    def __init__(self, emitter: Emitter, masked: int) -> None:
        self._emitter = emitter
        self._masked = masked
        self._done: dict[ir.Value, ir.Value] = {}

    def lower(self, mask: ir.Value) -> ir.Value:
        """The int32 addend that stands for the float addend ``mask``.

        Raises:
            UnsupportedError: ``UNSUPPORTED-INTEGER-FORM``, it is no mask: it holds other numbers,
                or comes from an operator that masks are not made with.
        """
        return self._lower(mask)

    def lower_condition(self, node: ir.Node, scores_at: int) -> ir.Value:
        """The addend that stands for ``Where(condition, ...)`` around the scores."""
        condition = node.inputs[0]
        assert condition is not None
        other = const_array(node.inputs[3 - scores_at])
        if other is None or (np.asarray(other, np.float64) > -_LARGE).any():
            raise _no_mask(node, "it puts numbers in the place of scores that do not mask")
        lowered = self._lower(condition)
        keep = self._emitter.constant(np.array(0, np.int32), "keep")
        drop = self._emitter.constant(np.array(self._masked, np.int32), "masked")
        branches = [keep, drop] if scores_at == 1 else [drop, keep]
        return self._behind(node, "Where", [lowered, *branches], {})

    def _lower(self, value: ir.Value) -> ir.Value:
        if value not in self._done:
            self._done[value] = self._made(value)
        return self._done[value]

    def _made(self, value: ir.Value) -> ir.Value:
        array = const_array(value)
        if array is not None:
            return self._constant(value, array) if value.dtype in _FLOATS else value
        node = value.producer()
        if node is None:
            if value.dtype in _FLOATS:
                raise UnsupportedError(
                    "UNSUPPORTED-INTEGER-FORM",
                    f"the mask `{value_name(value)}` is a float input of the model",
                    "export the model with an integer or boolean mask",
                )
            return value
        if is_op(node, *_SHAPES):
            return value
        if is_op(node, "Cast"):
            return self._cast(node, value)
        if is_op(node, *_ARITHMETIC, *_MOVES, *_LOGIC):
            return self._clone(node, value)
        if value.dtype in _FLOATS or value.dtype is None:
            raise _no_mask(node, "masks are not made with it")
        return value

    def _constant(self, value: ir.Value, array: np.ndarray) -> ir.Value:
        wide = np.asarray(array, np.float64)
        masked = wide <= -_LARGE
        if (~masked & ((wide != np.rint(wide)) | (np.abs(wide) > _LARGE))).any():
            raise UnsupportedError(
                "UNSUPPORTED-INTEGER-FORM",
                f"`{value_name(value)}` is added to attention scores and is no mask",
                "only masks of 0 and one large negative number have an integer form",
            )
        codes = np.where(masked, self._masked, wide).astype(np.int32)
        return self._emitter.constant(codes, "mask")

    def _cast(self, node: ir.Node, value: ir.Value) -> ir.Value:
        source = node.inputs[0]
        assert source is not None
        given = self._lower(source)
        if value.dtype not in _FLOATS:
            if given is source:
                return value
            return self._behind(node, "Cast", [given], {"to": int(value.dtype or 0)})
        if source.dtype in _FLOATS:
            return given
        # Numbers from outside may be anything; a mask counts them as false and true.
        if _from_input(source):
            given = self._behind(node, "Cast", [given], {"to": int(ir.DataType.BOOL)})
        return self._behind(node, "Cast", [given], {"to": int(ir.DataType.INT32)})

    def _clone(self, node: ir.Node, value: ir.Value) -> ir.Value:
        inputs = [None if v is None else self._lower(v) for v in node.inputs]
        if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
            return value
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return self._behind(node, node.op_type, inputs, attributes)

    def _behind(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, object],
    ) -> ir.Value:
        """A node in front of the original: what it reads stands before that too."""
        self._emitter.at(node, node_label(node))
        made = self._emitter.standard(op_type, inputs, attributes)
        return made.outputs[0]


def _from_input(value: ir.Value) -> bool:
    """Whether ``value`` is a graph input that was only moved."""
    node = value.producer()
    while node is not None and is_op(node, *_MOVES) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value.is_graph_input()


def _no_mask(node: ir.Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        "UNSUPPORTED-INTEGER-FORM",
        f"{node.op_type} `{node_label(node)}` in a mask has no integer form: {why}",
        "only masks of 0 and one large negative number have one",
    )
