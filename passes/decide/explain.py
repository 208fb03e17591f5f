"""Why what ``assign`` did not plan stays as it is: the reasons of its report."""

from __future__ import annotations

import onnx_ir as ir

from onnxq.graph.match import Structure, analyze_all, is_op
from onnxq.graph.match.values import node_label, op_domain
from onnxq.passes.contract import PassReport
from onnxq.passes.plan import QuantPlan

FLOAT_REASONS = {
    "norm": "stays float: onnxruntime has no integer kernel, and its output needs the precision",
    "activation": "stays float: onnxruntime has no integer kernel",
    "softmax": "stays float: a mask constant would set the range of its input",
    "attention": "stays float: both operands are activations; little time, much error",
    "residual": "stays float: an integer add loses accuracy and gains no speed",
    "recurrent": "stays float: its weights are not those of a linear layer",
}

RECURRENT = ("LSTM", "GRU", "RNN")

INTEGER_OPS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
"""Operators of the standard and of onnxruntime that hold integer weights already."""


def explain_floats(structure: Structure, plan: QuantPlan, report: PassReport) -> None:
    """Say for everything that could be asked for why it stays float."""
    planned = set(plan.sites)
    for norm in structure.norms:
        report.skip(norm.name, f"{norm.kind} {FLOAT_REASONS['norm']}")
    for activation in structure.activations:
        if activation.kind.startswith(("gelu", "silu")):
            report.skip(activation.name, f"{activation.kind} {FLOAT_REASONS['activation']}")
    for attention in structure.attentions:
        report.skip(attention.name, f"softmax {FLOAT_REASONS['softmax']}")
        report.skip(attention.name, f"attention MatMul {FLOAT_REASONS['attention']}")
    for add in structure.residual_adds:
        if add.name not in planned and add.name not in plan.floats:
            report.skip(add.name, f"residual add {FLOAT_REASONS['residual']}")


def explain_rejected(structure: Structure, report: PassReport) -> None:
    """Say of near misses, and of layers with weights that no pass treats, why they stay."""
    for reject in structure.rejected:
        if reject.what == "linear":
            report.skip(reject.node, f"stays as it is: {reject.reason}")
    for node in structure.graph:
        if is_op(node, *RECURRENT):
            report.skip(node_label(node), f"{node.op_type} {FLOAT_REASONS['recurrent']}")
        elif node.op_type in INTEGER_OPS and op_domain(node) in ("", "com.microsoft"):
            report.skip(node_label(node), f"{node.op_type} computes on integers already")


def explain_subgraphs(model: ir.Model, report: PassReport) -> None:
    """Say that layers inside of If and Loop are left alone."""
    inner = sum(len(s.linears) for s in list(analyze_all(model))[1:])
    if inner:
        report.skip("If/Loop bodies", f"{inner} linear layers inside of subgraphs stay float")
