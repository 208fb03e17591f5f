"""The last look at a model before it is called fit for its target.

Two rules hold for every target, since each was seen to give wrong results in silence somewhere:
int32 biases have no zero point, and scales and zero points have one rank. The rest comes from
:class:`onnxq.passes.targets.Target`. What is checked is what quantization is about: Q/DQ and their
types, integer and packed operators, operators outside of the standard, and shapes; whether a
runtime has each float operator of the standard is for the runtime to say.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from onnxq.errors import UnsupportedError
from onnxq.graph.match import const_array, is_const, is_op
from onnxq.graph.match.values import attr_int, node_label, op_domain, value_dtype
from onnxq.passes.targets import Target

CONTRIB: Final = "com.microsoft"
_INTEGER_PRODUCTS: Final = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
_WIDTHS: Final = {
    ir.DataType.INT2: 2,
    ir.DataType.UINT2: 2,
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
    ir.DataType.INT16: 16,
    ir.DataType.UINT16: 16,
}
_FLOAT8: Final = frozenset(
    {
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.FLOAT8E8M0,
    }
)


def check_input(model: ir.Model, target: Target) -> None:
    """Refuse a model that no pass can make fit for ``target``, before any of them runs.

    Raises:
        UnsupportedError: ``TARGET-SHAPES``, ``TARGET-NEEDS``.
    """
    if target.static_shapes:
        _check_shapes(model, target)
    if target.needs:
        domain, op_type = target.needs.split("::")
        if not any((n.domain, n.op_type) == (domain, op_type) for n in model.graph.all_nodes()):
            raise UnsupportedError(
                "TARGET-NEEDS",
                f"target `{target.name}` needs {target.needs} and the model has none; onnxq has no "
                "pass that fuses attention into it",
                "export the decoder with the model builder of onnxruntime-genai, then quantize it "
                "here and put it back into its folder; or choose --target cpu",
            )


def _check_shapes(model: ir.Model, target: Target) -> None:
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        free = [str(d) for d in value.shape or () if not isinstance(d, int)]
        if value.shape is None or free:
            named = ", ".join(free) or "all"
            raise UnsupportedError(
                "TARGET-SHAPES",
                f"target `{target.name}` needs fixed shapes; input `{value.name}` has free "
                f"dimensions: {named}",
                "fix each of them first: python -m onnxruntime.tools.make_dynamic_shape_fixed "
                f"--dim_param {free[0] if free else 'NAME'} --dim_value 1 model.onnx fixed.onnx",
            )


def check_output(model: ir.Model, target: Target) -> None:
    """Refuse a finished model that holds what ``target`` does not list.

    Raises:
        UnsupportedError: ``TARGET-OP``, ``TARGET-TYPE``, ``TARGET-ZERO-POINT``, ``TARGET-RANK``,
            ``TARGET-BLOCK``, ``TARGET-CHANNELS``; cause and details name node and operator.
    """
    for node in model.graph.all_nodes():
        _check_op(node, target)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _check_qdq(node, target, model.ir_version)
    if not target.float8:
        _check_floats(model, target)


def _refuse(code: str, node: ir.Node, target: Target, what: str, hint: str) -> UnsupportedError:
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return UnsupportedError(
        code,
        f"target `{target.name}`: {op} `{node_label(node)}` {what}",
        hint,
        node=node_label(node),
        op=op,
    )


def _check_op(node: ir.Node, target: Target) -> None:
    domain = op_domain(node)
    if domain == "":
        known = target.dynamic_quant or node.op_type not in _INTEGER_PRODUCTS
    elif domain == CONTRIB:
        known = target.has(node.op_type)
    else:
        known = "function" in target.forms
    if not known:
        raise _refuse(
            "TARGET-OP",
            node,
            target,
            "is no operator that this target lists",
            "choose other passes or formats; if it stands in the model that came in, export "
            "that without it",
        )


def _check_qdq(node: ir.Node, target: Target, ir_version: int) -> None:
    inputs = [*node.inputs, None][:3] if len(node.inputs) < 3 else list(node.inputs[:3])
    data, scale, zero = inputs
    codes = data if node.op_type == "DequantizeLinear" else node.outputs[0]
    dtype = value_dtype(zero) if zero is not None else value_dtype(codes) if codes else None
    if dtype == ir.DataType.INT32:
        if zero is not None:
            hint = "leave the zero point of int32 codes out: it is 0"
            raise _refuse("TARGET-ZERO-POINT", node, target, "has a zero point on int32", hint)
        return
    constant = (
        data is not None and node.op_type == "DequantizeLinear" and is_const(data, ir_version)
    )
    if dtype in _WIDTHS:
        _check_width(node, dtype, target, constant=constant)
    zeros = const_array(zero, ir_version) if zero is not None else None
    scales = const_array(scale, ir_version) if scale is not None else None
    if zeros is not None and scales is not None and zeros.ndim != scales.ndim:
        raise _refuse(
            "TARGET-RANK",
            node,
            target,
            f"has a scale of rank {scales.ndim} and a zero point of rank {zeros.ndim}",
            "give both one shape",
        )
    if constant and scales is not None and scales.ndim:
        _check_granularity(node, target)
    signed = constant or target.activations == ("int8",)
    if signed and dtype == ir.DataType.INT8 and zeros is not None and bool(np.any(zeros)):
        raise _refuse(
            "TARGET-ZERO-POINT",
            node,
            target,
            "has int8 codes with a zero point other than 0",
            "use symmetric int8, or uint8 for zero points",
        )


def _check_width(node: ir.Node, dtype: ir.DataType, target: Target, *, constant: bool) -> None:
    """Whether the target takes codes of ``dtype``, as weights or as activations."""
    name = dtype.name.lower()
    if constant:
        known = _WIDTHS[dtype] in target.bits or name in target.weights
    else:
        # A value between Gather and its Q/DQ pair has the type of the table.
        known = not target.activations or name in target.activations
    if not known:
        what = "weights" if constant else "activations"
        raise _refuse(
            "TARGET-TYPE",
            node,
            target,
            f"has {what} in {name}, which this target does not list",
            "leave the formats to the target: assign{weights=auto activations=auto}",
        )


def _check_granularity(node: ir.Node, target: Target) -> None:
    """Whether the target takes the blocks or channels of a weight."""
    block = attr_int(node, "block_size", 0)
    if block and ("blocked" not in target.forms or (target.blocks and block not in target.blocks)):
        hint = "leave block out, or choose another target"
        raise _refuse("TARGET-BLOCK", node, target, f"has blocks of {block}", hint)
    products = [u.node for u in node.outputs[0].uses() if is_op(u.node, "MatMul", "Gemm")]
    if products and not block and not target.per_channel_matmul:
        hint = "leave the formats to the target: it takes one scale for the whole weight"
        raise _refuse(
            "TARGET-CHANNELS",
            node,
            target,
            f"has one scale a channel, and {products[0].op_type} `{node_label(products[0])}` "
            "reads it",
            hint,
        )


def _check_floats(model: ir.Model, target: Target) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.dtype in _FLOAT8:
                reader = next((use.node for use in value.uses()), None)
                if reader is not None:
                    raise _refuse(
                        "TARGET-TYPE",
                        reader,
                        target,
                        f"reads `{value.name}` in {value.dtype}, which this target does not list",
                        "choose an integer format",
                    )
