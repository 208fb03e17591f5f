"""Where integers can flow on: operators between convolutions that onnxruntime runs on 8 bits.

onnxruntime's QLinearConv writes 8-bit codes. An Add, a Concat, a pooling or a change of shape
whose inputs all come from such kernels runs on codes too, and the region grows as far as that
holds. Relu and Clip vanish into the range of the value that they write.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from onnxq.graph.match import Linear, Structure, is_op, sole_consumer
from onnxq.graph.match.values import (
    attr_float,
    const_scalar,
    is_const,
    node_input,
)
from onnxq.passes.sites import site_names

_COMPUTING = ("Add", "Concat", "AveragePool", "GlobalAveragePool")
_CODE_KEEPING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class IntegerOp:
    """An operator without weights that can read and write 8-bit codes.

    Args:
        name: as the plan calls it.
        node: the operator.
        inputs: the values that it reads as codes.
        output: the value that holds its codes, behind a Relu or Clip if one follows.
        keeps_codes: output codes mean what input codes mean, so they share scale and zero point.
    """

    name: str
    node: ir.Node
    inputs: tuple[ir.Value, ...]
    output: ir.Value
    keeps_codes: bool


def output_of_conv(linear: Linear) -> ir.Value:
    """The value whose range a Conv's codes have to cover: behind Relu or Clip."""
    return _behind_clamp(linear.output)


def _behind_clamp(value: ir.Value) -> ir.Value:
    clamp = sole_consumer(value, "Relu", "Clip")
    return value if clamp is None else clamp.outputs[0]


def known_bounds(value: ir.Value | None) -> tuple[float, float]:
    """Bounds that the operator which wrote ``value`` guarantees, infinite where it does not.

    Codes beyond them would be wasted, and onnxruntime only drops a Relu or Clip in front of a
    QuantizeLinear whose range lies within its bounds.
    """
    node = None if value is None else value.producer()
    if node is None:
        return -math.inf, math.inf
    if is_op(node, "Relu"):
        return 0.0, math.inf
    if is_op(node, "Sigmoid", "Softmax"):
        return 0.0, 1.0
    if is_op(node, "Clip"):
        return _clip_bound(node, 1, "min", -math.inf), _clip_bound(node, 2, "max", math.inf)
    return -math.inf, math.inf


def _clip_bound(clip: ir.Node, index: int, attribute: str, default: float) -> float:
    """A Clip's bound: an attribute before opset 11, an input since."""
    value = node_input(clip, index)
    if value is None:
        return attr_float(clip, attribute, default)
    bound = const_scalar(value)
    return default if bound is None else bound


def find_integer_ops(structure: Structure) -> list[IntegerOp]:
    """The operators to which codes can flow from the graph's convolutions, in graph order."""
    coded = {output_of_conv(linear) for linear in structure.linears if linear.kind == "conv"}
    found: list[IntegerOp] = []
    if not coded:
        return found
    for node, name in site_names(structure.graph).items():
        op = _match(node, name, coded)
        if op is not None:
            coded.add(op.output)
            found.append(op)
    return found


def _match(node: ir.Node, name: str, coded: set[ir.Value]) -> IntegerOp | None:
    keeps = is_op(node, *_CODE_KEEPING)
    if not keeps and not is_op(node, *_COMPUTING):
        return None
    reads = [v for v in node.inputs if v is not None]
    data = reads[:1] if keeps else reads
    if not data or any(v not in coded for v in data):
        return None
    if any(not is_const(v) for v in reads[len(data) :]) or len(node.outputs) > 1:
        return None
    output = node.outputs[0] if keeps else _behind_clamp(node.outputs[0])
    return IntegerOp(name, node, tuple(data), output, keeps)
