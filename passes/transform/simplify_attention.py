"""``simplify-attention``: take work out of every softmax attention that its algebra makes idle.

Softmax is blind to what is added to all scores of a query, and its rows sum to one::

    q . (k_t + b_k)        = q . k_t + c(q)            1. the key bias cancels: drop it
    sum_t p_t (v_t + b_v)  = sum_t p_t v_t + b_v       2. b_o' = b_o + W_o^T b_v

3. ``Where(IsNaN(p), 0, p)``, which torch writes behind a softmax for rows that are masked with
   -inf throughout, goes when all masks are finite: finite scores cannot give NaN. In float16 a
   score added to the lowest number may overflow, so there the guard stays.

1 applies when only changes of shape and constant factors lie between the key layer and the scores
(rotary embeddings move the bias by position) and what masks write over scores is -1e3 or less; 2
when the value layer's channels can be followed to the output layer and no guard of kind 3 is left,
which would zero rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.graph.edit import remove_dead, replace_value, set_bias
from onnxq.graph.match import Attention, Linear, Structure, analyze, const_array, is_op
from onnxq.graph.match.values import const_scalar, producer, value_dtype
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.fold_norm import FOLDED_NORMS

_SHAPE_OPS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")
_MAX_STEPS = 12

OUT = -1e3
"""Scores that are overwritten with this or less have probability 0 in float32."""


@dataclass(frozen=True)
class SimplifyAttention(Pass):
    """Drop key biases and idle guards, move value biases into the output layer."""

    name: ClassVar[str] = "simplify-attention"
    summary: ClassVar[str] = "drop key biases and idle NaN guards; move value biases on"
    invalidates: ClassVar = (STATISTICS, FOLDED_NORMS)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4
    may_match_nothing: ClassVar[bool] = True

    def candidates(self, model: ir.Model) -> list[str]:
        """The softmax attentions."""
        return [attention.name for attention in analyze(model).attentions]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Simplify every attention of the main graph."""
        report = PassReport()
        for attention in analyze(model).attentions:
            _drop_guard(attention, model.ir_version, report)
        remove_dead(model.graph)
        structure = analyze(model)
        for attention in structure.attentions:
            _fold_value_bias(structure, attention, report)
        structure = analyze(model)
        for attention in structure.attentions:
            _drop_key_bias(structure, attention, model.ir_version, report)
        remove_dead(model.graph)
        return report


def _guard_of(attention: Attention) -> ir.Node | None:
    """The Where behind the softmax that sets rows of probabilities to zero, if there is one."""
    after = attention.nodes[attention.nodes.index(attention.softmax) :]
    return next((node for node in after if is_op(node, "Where")), None)


def _masks_of(attention: Attention, guard: ir.Node) -> list[ir.Value | None]:
    """What is added to the scores or written over them."""
    return [*attention.addends, *_fills_of(attention, guard)]


def _fills_of(attention: Attention, guard: ir.Node | None = None) -> list[ir.Value | None]:
    """What is written over the scores: the other branch of a Where, the other side of a Max."""
    path = {value for node in attention.nodes for value in node.outputs}
    before = attention.nodes[: attention.nodes.index(attention.softmax)]
    return [
        value
        for node in before
        if is_op(node, "Where", "Max") and node is not guard
        for value in node.inputs[1 if is_op(node, "Where") else 0 :]
        if value not in path
    ]


def _is_out(value: ir.Value | None, ir_version: int) -> bool:
    """Whether scores of ``value`` get no weight beside others: constants of ``OUT`` or less.

    A fill in the range of the scores keeps its place among them only if they are not shifted.
    """
    array = const_array(value, ir_version)
    if array is not None:
        return bool((array.astype(np.float64) <= OUT).all())
    node = None if value is None else value.producer()
    if node is not None and is_op(node, *_SHAPE_OPS, "Expand", "Slice"):
        return _is_out(node.inputs[0], ir_version)
    return False


def _drop_guard(attention: Attention, ir_version: int, report: PassReport) -> None:
    guard = _guard_of(attention)
    if guard is None:
        return
    if producer(guard.inputs[0], "IsNaN") is None:
        report.skip(attention.name, "the Where behind the softmax does not test for NaN")
        return
    dtype = attention.softmax_in.dtype or value_dtype(guard.inputs[1])
    if dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        report.skip(attention.name, "guard against NaN: the scores may overflow in their type")
        return
    if not all(_is_finite(mask, ir_version) for mask in _masks_of(attention, guard)):
        report.skip(attention.name, "guard against NaN: the mask may be infinite")
        return
    replace_value(guard.outputs[0], attention.softmax.outputs[0])
    report.change(attention.name, "idle guard against NaN removed")


def _is_finite(value: ir.Value | None, ir_version: int) -> bool:
    """Whether every element is finite whatever the inputs: constants, chosen and reshaped."""
    if value is None:
        return False
    array = const_array(value, ir_version)
    if array is not None:
        return bool(np.isfinite(array.astype(np.float64)).all())
    node = value.producer()
    if is_op(node, "Where") and node is not None:
        return _is_finite(node.inputs[1], ir_version) and _is_finite(node.inputs[2], ir_version)
    if is_op(node, *_SHAPE_OPS, "Expand", "Slice") and node is not None:
        return _is_finite(node.inputs[0], ir_version)
    return False


def _is_private(value: ir.Value) -> bool:
    """Whether one node reads the elements of ``value`` (not just its shape), and no user."""
    readers = [node for node in value.consumers() if not is_op(node, "Shape", "Size")]
    return len(readers) == 1 and not value.is_graph_output()


def _drop_key_bias(
    structure: Structure, attention: Attention, ir_version: int, report: PassReport
) -> None:
    key = _writer_of(structure, attention.k)
    if key is None:
        report.skip(
            attention.name,
            "key bias: keys are moved by position, read elsewhere, or not from one linear layer",
        )
        return
    if not all(_is_out(fill, ir_version) for fill in _fills_of(attention)):
        report.skip(
            attention.name,
            f"key bias: scores are written over with numbers that may be above {OUT:g}",
        )
        return
    if key.bias_add is None:
        report.skip(key.name, "key bias: there is none, or it is inside the product")
        return
    replace_value(key.bias_add.outputs[0], key.node.outputs[0])
    report.change(key.name, "key bias dropped: softmax cancels it")


def _fold_value_bias(structure: Structure, attention: Attention, report: PassReport) -> None:
    way = structure.v_to_o(attention)
    if isinstance(way, str):
        report.skip(attention.name, f"value bias: {way}")
        return
    bias = way.value.b
    if bias is None or way.value.bias_add is None:
        report.skip(way.value.name, "value bias: there is none, or it is inside the product")
        return
    if _guard_of(attention) is not None:
        report.skip(way.value.name, "value bias: fully masked rows are set to zero")
        return
    if not _is_private(way.value.output):
        report.skip(way.value.name, "value bias: the value layer has other readers")
        return
    output = way.output
    weight = output.w if output.in_axis == 0 else output.w.T
    arriving = bias.astype(np.float64)[np.asarray(way.channel_map)] @ weight.astype(np.float64)
    old = output.b
    set_bias(output, arriving if old is None else arriving + old)
    replace_value(way.value.bias_add.outputs[0], way.value.node.outputs[0])
    report.change(way.value.name, f"value bias folded into {output.name}")


def _writer_of(structure: Structure, value: ir.Value) -> Linear | None:
    """The linear layer behind shape changes and constant factors, if that is all there is."""
    for _ in range(_MAX_STEPS):
        linear = structure.linear_of(value)
        if linear is not None:
            return linear if _is_private(linear.output) else None
        node = value.producer()
        if node is None or not _is_private(value):
            return None
        if is_op(node, *_SHAPE_OPS):
            above = node.inputs[0]
        elif is_op(node, "Mul", "Div"):
            above = _scaled_by_constant(node)
        else:
            return None
        if above is None:
            return None
        value = above
    return None


def _scaled_by_constant(node: ir.Node) -> ir.Value | None:
    """What a Mul or Div multiplies with one constant number; None if it does anything else."""
    first, second = node.inputs
    if const_scalar(second) is not None:
        return first
    if is_op(node, "Mul") and const_scalar(first) is not None:
        return second
    return None
