"""Read off a finished model in which precision each operator computes, for the drawing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from onnxq.cli.view import CellView

if TYPE_CHECKING:
    import onnx_ir as ir

_LINEAR: Final = frozenset(
    ("MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "ConvInteger", "MatMulNBits")
)
_SHOWN: Final = _LINEAR | frozenset(
    (
        "Softmax",
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "RMSNormalization",
        "Gelu",
        "FastGelu",
        "BiasGelu",
        "Relu",
        "Sigmoid",
        "HardSwish",
        "Clip",
        "Tanh",
        "Silu",
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "LSTM",
        "GRU",
        "RNN",
        "GlobalAveragePool",
        "AveragePool",
        "MaxPool",
        "GatherBlockQuantized",
        "QLinearMatMul",
        "QLinearConv",
        "QGemm",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
    )
)
"""Operators that get a cell whatever they read; Gather, Add and Mul depend on what they read."""

_PASS_THROUGH: Final = frozenset(
    ("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool")
)


def cells(model: ir.Model, why: Mapping[str, str]) -> list[CellView]:
    """The operators of the main graph that compute, in graph order.

    Args:
        model: as it was written.
        why: reason from the plan, by name of the site.
    """
    from onnxq.graph.match import analyze

    structure = analyze(model)
    regions: dict[int, tuple[str, str]] = {}
    inner: set[int] = set()
    found_regions = [(m.name, str(m.kind), m.nodes) for m in structure.norms]
    found_regions += [(m.name, str(m.kind), m.nodes) for m in structure.activations]
    for name, kind, (first, *others) in found_regions:
        if others or first.op_type not in _SHOWN:
            regions[id(first)] = (name, kind)
            inner.update(id(node) for node in others)
    for linear in structure.linears:
        if linear.bias_add is not None:
            inner.add(id(linear.bias_add))
    residual = {id(add.node) for add in structure.residual_adds}
    found: list[CellView] = []
    for node in model.graph:
        if id(node) in inner:
            continue
        if id(node) in regions:
            name, kind = regions[id(node)]
            found.append(CellView(name, kind, "float", "", "float", why.get(name, "")))
        elif id(node) in residual or _is_shown(node):
            found.append(_cell(node, why))
    return found


def _is_shown(node: ir.Node) -> bool:
    if node.domain == "com.onnxq" or node.op_type in _SHOWN:
        return True
    if node.op_type == "Gather" and node.inputs[0] is not None:
        table = _constant(node.inputs[0])
        # One column: the scales of a quantized table, looked up beside it.
        shape = None if table is None else table.shape
        return shape is not None and len(shape) == 2 and shape[1] != 1
    return False


def _cell(node: ir.Node, why: Mapping[str, str]) -> CellView:
    activation, weight = "float", ""
    for value in node.inputs:
        if value is None:
            continue
        stored = _constant(value)
        if stored is not None:
            if not weight and stored.shape is not None and len(stored.shape) >= 2:
                weight = _format(stored)
        elif activation == "float":
            activation = _activation(value)
    if activation == "float" and node.op_type in ("Relu", "Clip"):
        activation = _fused_clamp(node)
    if node.op_type == "MatMulNBits":
        weight = f"int{_bits(node)}"
    name = node.name or str(node.outputs[0].name)
    return CellView(
        name, node.op_type, activation, weight, _mode(activation, weight), why.get(name, "")
    )


def _fused_clamp(node: ir.Node) -> str:
    """The format of a clamp between an integer product and a QuantizeLinear: runtimes fuse it."""
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    readers = list(node.outputs[0].consumers())
    if before is None or before.op_type not in _LINEAR or not readers:
        return "float"
    feeds = before.inputs[0]
    if feeds is None or _activation(feeds) == "float":
        return "float"
    if any(reader.op_type != "QuantizeLinear" for reader in readers):
        return "float"
    return _codes(readers[0], readers[0].outputs[0])


def _mode(activation: str, weight: str) -> str:
    if activation.startswith("dynamic"):
        return "dynamic"
    if activation != "float":
        return "static"
    return "weights" if weight.startswith(("int", "uint", "float8", "float4")) else "float"


def _format(value: ir.Value) -> str:
    """The dtype of a value as people write it: ``float32``, ``int8``."""
    if value.dtype is None:
        return "float"
    names = {"FLOAT": "float", "DOUBLE": "float64"}
    return names.get(value.dtype.name, value.dtype.name.lower())


def _constant(value: ir.Value) -> ir.Value | None:
    """The initializer behind ``value``, through DequantizeLinear and changes of shape."""
    while True:
        if value.const_value is not None or value.is_initializer():
            return value
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        if node.op_type not in ("DequantizeLinear", "Transpose", "Reshape", "Identity", "Cast"):
            return None
        value = node.inputs[0]


def _activation(value: ir.Value) -> str:
    """In which format ``value`` is read: integers that are dequantized count as what they are."""
    while True:
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return "float"
        if node.op_type == "DequantizeLinear":
            found = _codes(node, node.inputs[0])
            dynamic = _is_dynamic(node.inputs[0])
            return f"dynamic {found}" if dynamic else found
        if _is_dynamic(value):
            return "dynamic uint8"
        if node.op_type not in _PASS_THROUGH:
            return "float"
        value = node.inputs[0]


def _codes(node: ir.Node, quantized: ir.Value) -> str:
    """The format of the codes of a (De)QuantizeLinear; the zero point's type is always known."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    return _format(quantized if zero_point is None else zero_point)


def _is_dynamic(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and (
        node.op_type == "DynamicQuantizeLinear" or node.op_type.startswith("DynamicQuantize")
    )


def bytes_by_format(model: ir.Model) -> dict[str, int]:
    """Bytes of the initializers by number format; packed weights count as what they hold."""
    packed = {
        node.inputs[1].name: f"int{_bits(node)}"
        for node in model.graph
        if node.op_type == "MatMulNBits" and node.inputs[1] is not None
    }
    found: dict[str, int] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            name = packed.get(value.name) or (
                "float32" if _format(value) == "float" else _format(value)
            )
            found[name] = found.get(name, 0) + int(value.const_value.nbytes)
    return found


def bits_per_weight(before: Mapping[str, int], after: Mapping[str, int]) -> float | None:
    """Bits that a float weight of the input takes in the output, scales included."""
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
    count = sum(total / sizes[name] for name, total in before.items() if name in sizes)
    kept = {n: b for n, b in after.items() if n in sizes or "8" in n or "4" in n or "2" in n}
    kept.pop("int64", None)
    return 8 * sum(kept.values()) / count if count else None


def _bits(node: ir.Node) -> int:
    bits = node.attributes.get("bits")
    return bits.as_int() if bits is not None else 4
