"""Rotations in front of packed products with INT8 activations: rotated and quantized at once.

``QuantMatMul(Hadamard(x))`` with INT8 activations becomes
``QuantMatMulInt8(HadamardQuantize(x))``: the same numbers, but the rotated activations are nowhere
in float, and several products share one quantization.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxq import custom_ops
from onnxq.graph.edit import Names, insert_before, replace_value

ROTATION = "Hadamard"
ROTATION_INT8 = "HadamardQuantize"
PRODUCT = "QuantMatMul"
PRODUCT_INT8 = "QuantMatMulInt8"
_ORDER_INPUT = 6


def quantize_rotations(model: ir.Model, products: Sequence[ir.Node]) -> list[str]:
    """Fuse each rotation that only these ``QuantMatMul`` read; the names of the rotations.

    All must quantize alike: by row, or by groups of one size. An order of columns stands between
    rotation and quantization, and keeps them apart.

    Args:
        model: changed in place.
        products: of float32 activations.
    """
    fused = []
    for rotation in dict.fromkeys(node.inputs[0].producer() for node in products if node.inputs[0]):
        if rotation is None or rotation.domain != custom_ops.DOMAIN:
            continue
        readers = list(rotation.outputs[0].consumers())
        if rotation.op_type != ROTATION or rotation.outputs[0].is_graph_output():
            continue
        if not all(node in products and _plain(node) for node in readers):
            continue
        groups = {_group(node) for node in readers}
        if len(groups) == 1:
            _fuse(model, rotation, readers, groups.pop())
            fused.append(rotation.name or ROTATION)
    return fused


def _plain(node: ir.Node) -> bool:
    """INT8 activations, in the order in which they come."""
    order = node.inputs[_ORDER_INPUT]
    tensor = None if order is None else order.const_value
    alone = tensor is not None and tensor.size == 1
    return alone and node.attributes["int8_activations"].as_int() in (1, 2)


def _group(node: ir.Node) -> int:
    """Columns of activations that share a scale."""
    by_group = node.attributes["int8_activations"].as_int() == 2
    return node.attributes["group" if by_group else "K"].as_int()


def _fuse(model: ir.Model, rotation: ir.Node, readers: Sequence[ir.Node], group: int) -> None:
    names = Names(model.graph)
    for op in (ROTATION_INT8, PRODUCT_INT8):
        custom_ops.attach(model, op)
    attributes: dict[str, int | float] = {
        "block": rotation.attributes["block"].as_int(),
        "scale": rotation.attributes["scale"].as_float(),
        "group": group,
    }
    both = custom_ops.make_node(ROTATION_INT8, rotation.inputs, attributes, name=rotation.name)
    for value, suffix in zip(both.outputs, ("quantized", "scales"), strict=True):
        value.name = names.fresh(f"{rotation.outputs[0].name}_{suffix}")
    insert_before(rotation, both)
    for node in readers:
        given = {
            name: attribute.as_float() if name == "factor" else attribute.as_int()
            for name, attribute in node.attributes.items()
        }
        rest = node.inputs[1:_ORDER_INPUT]
        product = custom_ops.make_node(PRODUCT_INT8, [*both.outputs, *rest], given, name=node.name)
        out, old = product.outputs[0], node.outputs[0]
        out.name, out.type, out.shape = names.fresh(f"{old.name}_int8"), old.type, old.shape
        insert_before(node, product)
        replace_value(old, out)
        model.graph.remove(node, safe=True)
    model.graph.remove(rotation, safe=True)
