"""``fold-attention-bias``: take two bias Adds out of every attention block.

Softmax is blind to what is added to all scores of a query, and its rows sum to one::

    q . (k_t + b_k)        = q . k_t + c(q)            the key bias cancels: drop it
    sum_t p_t (v_t + b_v)  = sum_t p_t v_t + b_v       so b_o' = b_o + W_o^T b_v

Applies when only changes of shape and constant factors lie between the key layer and the scores
(rotary embeddings move the bias by position), and when the value layer's channels can be followed
to the output layer. A guard that turns rows of a fully masked query into zeros keeps ``b_v``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxq.graph.edit import remove_dead, replace_value, set_bias
from onnxq.graph.match import Attention, Linear, Structure, analyze, is_op
from onnxq.graph.match.values import const_scalar
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS

_SHAPE_OPS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")
_MAX_STEPS = 12


@dataclass(frozen=True)
class FoldAttentionBias(Pass):
    """Drop key biases and move value biases into the output layer."""

    name: ClassVar[str] = "fold-attention-bias"
    summary: ClassVar[str] = "drop key biases, fold value biases into the output layer"
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4
    may_match_nothing: ClassVar[bool] = True

    def candidates(self, model: ir.Model) -> list[str]:
        """The softmax attentions."""
        return [attention.name for attention in analyze(model).attentions]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Fold at every attention of the main graph."""
        report = PassReport()
        for name in self.candidates(model):
            structure = analyze(model)
            attention = next(a for a in structure.attentions if a.name == name)
            _fold_value_bias(structure, attention, report)
            _drop_key_bias(structure, attention, report)
        remove_dead(model.graph)
        return report


def _drop_key_bias(structure: Structure, attention: Attention, report: PassReport) -> None:
    key = _writer_of(structure, attention.k)
    if key is None:
        report.skip(attention.name, "keys are moved by position or not from one linear layer")
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
    if any(is_op(node, "Where", "IsNaN") for node in attention.nodes[1:] if node is not attention.mask_node):
        report.skip(way.value.name, "value bias: fully masked rows are set to zero")
        return
    if len(way.value.output.uses()) != 1:
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
            return linear if len(linear.output.uses()) == 1 else None
        node = value.producer()
        if node is None or len(value.uses()) != 1:
            return None
        if is_op(node, *_SHAPE_OPS):
            above = node.inputs[0]
        elif is_op(node, "Mul", "Div"):
            above = next((v for v in node.inputs if v is not None and const_scalar(v) is None), None)
        else:
            return None
        if above is None:
            return None
        value = above
    return None
