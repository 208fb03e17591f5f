"""``canonicalize``: one spelling for later passes, and nothing in the graph that does no work.

Rewrites, each of which keeps the function:

1. constants become initializers; what depends on constants alone is folded;
2. ``BatchNormalization`` behind ``Conv`` goes into the Conv's weight and bias::

       a = gamma / sqrt(var + eps)        W'[n] = a[n] * W[n]
       b' = a * (b - mean) + beta

3. ``MatMul`` of a matrix and the Add of its bias become ``Gemm``, as onnxruntime would make them,
   which runs a Gemm on integers only if its bias is in integers too;
4. a constant zero ``Pad`` before ``Conv`` becomes the Conv's own ``pads``;
5. dead nodes, Identity and common subexpressions go; unused opset imports go;
6. an opset below ``opset``, or below what a later pass needs, is raised with ONNX's converter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxq.errors import SpecError
from onnxq.graph.edit import add_initializer, fresh_name, remove_dead, replace_value
from onnxq.graph.match import Linear, const_array, is_const, is_op, sole_consumer
from onnxq.graph.match.linears import find_linears
from onnxq.graph.match.values import (
    OVERRIDABLE_SINCE_IR,
    attr_float,
    attr_int,
    attr_ints,
    attr_string,
    const_ints,
    node_label,
    other_input,
    rank,
)
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.prepare.opset import raise_opset

MAX_ROUNDS = 8
"""Rounds of cleaning; two or three are usual, the last of which finds nothing."""

FOLD_LIMIT = 64 * 1024 * 1024
"""Largest folded constant, in elements: weights behind a Transpose must pass."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Clean the graph: constants, BatchNorm, Pad, dead code, opset.

    Args:
        opset: lowest opset of the default domain; 13 has per-channel DequantizeLinear. Where a
            later pass needs more for the formats and the target chosen, the model is raised to
            that.
    """

    name: ClassVar[str] = "canonicalize"
    summary: ClassVar[str] = "fold constants, BatchNorm and Pad; drop dead code; raise the opset"
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4
    may_match_nothing: ClassVar[bool] = True

    opset: int = 13

    def __post_init__(self) -> None:
        newest = onnx.defs.onnx_opset_version()
        if not 1 <= self.opset <= newest:
            raise SpecError(
                "SPEC-RANGE",
                f"opset={self.opset} is not between 1 and {newest}",
                f"onnx {onnx.__version__} knows operators up to opset {newest}",
            )

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Apply all rewrites to every graph of the model."""
        report = PassReport()
        before, _ = size = _size(model)
        _drop_constant_inputs(model)
        lowest, because = self._lowest_opset(ctx)
        if raise_opset(model, lowest, report):
            report.change("model", "opset raised", f"to {lowest}{because}")
        skipped = report.skipped
        for _ in range(MAX_ROUNDS):
            step = _clean(model)
            report.changed.extend(step.changed)
            report.skipped = [*skipped, *step.skipped]
            if size == (size := _size(model)):
                break
        if size[0] < before:
            report.change("model", "nodes removed", f"{before} to {size[0]}")
        return report

    def _lowest_opset(self, ctx: Context) -> tuple[int, str]:
        """The opset to raise the model to, and which later pass wants more than ``opset``."""
        lowest, because = self.opset, ""
        for later in ctx.upcoming:
            needed = later.opset_needed(ctx.target)
            if needed > lowest:
                lowest, because = needed, f", which `{later.name}` needs"
        return lowest, because


def _size(model: ir.Model) -> tuple[int, int]:
    """How many nodes and how many initializers there are."""
    return (
        sum(1 for _ in model.graph.all_nodes()),
        sum(len(graph.initializers) for graph in model.graphs()),
    )


def _clean(model: ir.Model) -> PassReport:
    """One round: what one rewrite leaves behind may be work for those before it."""
    report = PassReport()
    common.ShapeInferencePass()(model)
    reason = fold_constants(model)
    if reason is not None:
        report.skip("constant folding", reason)
    _forget_removed_nodes(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        _fold_transposed_weights(graph, model.ir_version, report)
        _fold_batch_norms(graph, model.ir_version, report)
        _fold_pads(graph, model.ir_version, report)
        _fuse_gemms(graph, model.ir_version, report)
        _drop_identities(graph)
        _name_nodes(graph)
    common.DeduplicateInitializersPass(size_limit=1024)(model)
    common.CommonSubexpressionEliminationPass()(model)
    remove_dead(model.graph)
    common.RemoveUnusedOpsetsPass()(model)
    return report


def _forget_removed_nodes(model: ir.Model) -> None:
    """Branches of a folded If keep their place among the readers of outer values: drop them."""
    nodes = set(model.graph.all_nodes())
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in (*graph.inputs, *graph.initializers.values()):
            _drop_uses_outside(value, nodes)
    for node in nodes:
        for value in node.outputs:
            _drop_uses_outside(value, nodes)


def _drop_uses_outside(value: ir.Value, nodes: set[ir.Node]) -> None:
    for use in list(value.uses()):
        if use.node not in nodes:
            use.node.replace_input_with(use.idx, None)


def _drop_constant_inputs(model: ir.Model) -> None:
    """Before IR version 4 every initializer had to be listed as an input, overridable or not."""
    if model.ir_version < OVERRIDABLE_SINCE_IR:
        common.RemoveInitializersFromInputsPass()(model)
        model.ir_version = OVERRIDABLE_SINCE_IR


def fold_constants(model: ir.Model) -> str | None:
    """Evaluate what depends on constants alone, shapes of fixed size included.

    Returns:
        Why onnxscript's folder stopped before the end, if it did. It rewrites node by node, so
        the graph is whole either way.
    """
    from onnxscript import optimizer

    def small_fill(node: ir.Node) -> bool | None:
        """ConstantOfShape is not folded unless asked for; small ones feed shapes and pads."""
        if not is_op(node, "ConstantOfShape"):
            return None
        shape = const_ints(node.inputs[0])
        return shape is not None and math.prod(shape) <= 1024

    try:
        optimizer.fold_constants(
            model, input_size_limit=1024, output_size_limit=1024 * 1024, should_fold=small_fill
        )
    except RuntimeError as error:
        return f"stopped early: {error}"
    return None


def _name_nodes(graph: ir.Graph) -> None:
    """One name for each node, so that globs and reports can say which is meant.

    A node without a name gets that of its output, a doubled name gets a number.
    """
    listed = {node.name for node in graph if node.name}
    taken: set[str] = set()
    for node in graph:
        base = name = node_label(node)
        count = 1
        while name in taken or (name in listed and name != node.name):
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        node.name = name


def _drop_identities(graph: ir.Graph) -> None:
    """Remove Identity where neither side is what the graph itself hands out or takes in."""
    for node in [n for n in graph if is_op(n, "Identity")]:
        source, result = node.inputs[0], node.outputs[0]
        if source is not None and not result.is_graph_output():
            replace_value(result, source)
            graph.remove(node, safe=True)


def _fold_transposed_weights(graph: ir.Graph, ir_version: int, report: PassReport) -> None:
    """``Transpose(initializer)`` becomes an initializer, unless a tied weight would be doubled."""
    for node in list(graph):
        if not is_op(node, "Transpose"):
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is None or result.is_graph_output() or len(source.uses()) > 1:
            continue
        array = const_array(source, ir_version)
        if array is None or array.size > FOLD_LIMIT or array.dtype.kind not in "fi":
            continue
        perm = attr_ints(node, "perm") or tuple(reversed(range(array.ndim)))
        name = fresh_name(graph, f"{source.name}_transposed")
        folded = add_initializer(graph, name, np.ascontiguousarray(array.transpose(perm)))
        replace_value(result, folded)
        report.change(node_label(node), "constant Transpose folded")
        graph.remove(node, safe=True)


def _fold_batch_norms(graph: ir.Graph, ir_version: int, report: PassReport) -> None:
    for norm in [n for n in graph if is_op(n, "BatchNormalization")]:
        reason = _fold_batch_norm(graph, norm, ir_version)
        if reason is None:
            report.change(node_label(norm), "BatchNormalization folded into Conv")
        else:
            report.skip(node_label(norm), reason)


def _fold_batch_norm(graph: ir.Graph, norm: ir.Node, ir_version: int) -> str | None:
    """Fold one BatchNormalization; a string says why it stays."""
    x = norm.inputs[0]
    conv = x.producer() if x is not None else None
    if conv is None or x is None or not is_op(conv, "Conv"):
        return "BatchNormalization is not behind a Conv"
    if attr_int(norm, "training_mode", 0) or any(not o.name or o.uses() for o in norm.outputs[1:]):
        return "BatchNormalization is in training mode"
    if sole_consumer(x) is not norm:
        return "the Conv's output has other readers"
    params = [const_array(v, ir_version) for v in norm.inputs[1:5]]
    weight_value = conv.inputs[1]
    weight = const_array(weight_value, ir_version)
    if weight is None or weight_value is None or any(p is None for p in params):
        return "weights or statistics are not constant"
    gamma, beta, mean, var = (np.asarray(p, np.float64) for p in params)
    if gamma.size != weight.shape[0]:
        return f"its scale has {gamma.size} elements, not one a channel"
    old_bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = 0.0 if old_bias is None else const_array(old_bias, ir_version)
    if bias is None:
        return "the Conv's bias is not constant"
    factor = gamma / np.sqrt(var + attr_float(norm, "epsilon", 1e-5))
    folded = weight.astype(np.float64) * factor.reshape(-1, *([1] * (weight.ndim - 1)))
    shifted = factor * (np.asarray(bias, np.float64) - mean) + beta
    weight_name = fresh_name(graph, f"{weight_value.name}_bn")
    new_weight = add_initializer(graph, weight_name, folded.astype(weight.dtype))
    bias_name = fresh_name(graph, f"{conv.outputs[0].name}_bias")
    new_bias = add_initializer(graph, bias_name, shifted.astype(weight.dtype))
    inputs = [conv.inputs[0], new_weight, new_bias]
    fused = ir.Node(
        conv.domain, "Conv", inputs, conv.attributes.values(), num_outputs=1, name=conv.name
    )
    fused.outputs[0].name = norm.outputs[0].name
    fused.outputs[0].type, fused.outputs[0].shape = norm.outputs[0].type, norm.outputs[0].shape
    graph.insert_before(norm, fused)
    replace_value(norm.outputs[0], fused.outputs[0])
    graph.remove([norm, conv], safe=True)
    return None


def _fuse_gemms(graph: ir.Graph, ir_version: int, report: PassReport) -> None:
    linears, _ = find_linears(graph, ir_version)
    for linear in linears:
        if linear.kind == "matmul" and linear.bias_add is not None and rank(linear.x) == 2:
            _fuse_gemm(graph, linear, linear.bias_add)
            report.change(linear.name, "MatMul and Add of the bias fused into Gemm")


def _fuse_gemm(graph: ir.Graph, linear: Linear, add: ir.Node) -> None:
    product = linear.node
    bias = other_input(add, product.outputs[0])
    gemm = ir.Node("", "Gemm", [*product.inputs, bias], num_outputs=1, name=product.name)
    out = gemm.outputs[0]
    out.name = fresh_name(graph, f"{linear.output.name}_gemm")
    out.type, out.shape = linear.output.type, linear.output.shape
    graph.insert_before(add, gemm)
    replace_value(linear.output, out)
    graph.remove([add, product], safe=True)


def _fold_pads(graph: ir.Graph, ir_version: int, report: PassReport) -> None:
    for pad in [n for n in graph if is_op(n, "Pad")]:
        conv = sole_consumer(pad.outputs[0], "Conv")
        if conv is None or conv.inputs[0] is not pad.outputs[0]:
            continue
        reason = _fold_pad(graph, pad, conv, ir_version)
        if reason is None:
            report.change(node_label(pad), "Pad folded into Conv")
        else:
            report.skip(node_label(pad), reason)


def _fold_pad(graph: ir.Graph, pad: ir.Node, conv: ir.Node, ir_version: int) -> str | None:
    """Fold one Pad; a string says why it stays."""
    if attr_string(pad, "mode", "constant") != "constant":
        return "the Pad does not fill with a constant"
    amounts = _pad_amounts(pad, ir_version)
    if amounts is None:
        return "the Pad's amounts are not constant, or it does not fill with zero"
    if attr_string(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "the Conv pads by itself"
    half = len(amounts) // 2
    if any(amounts[:2]) or any(amounts[half : half + 2]) or min(amounts) < 0:
        return "the Pad also touches batch or channels, or crops"
    spatial = half - 2
    own = attr_ints(conv, "pads") or (0,) * (2 * spatial)
    extra = (*amounts[2:half], *amounts[half + 2 :])
    conv.attributes["pads"] = ir.AttrInt64s(
        "pads", [a + b for a, b in zip(own, extra, strict=True)]
    )
    conv.attributes.pop("auto_pad", None)
    source = pad.inputs[0]
    if source is None:
        return "the Pad has no input"
    replace_value(pad.outputs[0], source)
    graph.remove(pad, safe=True)
    return None


def _pad_amounts(pad: ir.Node, ir_version: int) -> tuple[int, ...] | None:
    """The Pad's amounts if it fills with zero on all axes, else None."""
    amounts = attr_ints(pad, "pads")
    if amounts is not None:
        return amounts if attr_float(pad, "value", 0.0) == 0.0 else None
    found = const_array(pad.inputs[1], ir_version) if len(pad.inputs) > 1 else None
    if found is None or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return None
    fill = pad.inputs[2] if len(pad.inputs) > 2 else None
    if fill is not None:
        value = const_array(fill, ir_version) if is_const(fill, ir_version) else None
        if value is None or float(value.reshape(-1)[0]) != 0.0:
            return None
    return tuple(int(a) for a in found)
