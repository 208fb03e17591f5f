"""Linear layers: MatMul, Gemm and Conv with a constant weight, and the bias Add after them.

================  ====================  =================================================
kind              weight as stored      axes
================  ====================  =================================================
MatMul            ``[K, N]``            in 0, out 1; in 1, out 0 behind ``Transpose``
Gemm transB=0     ``[K, N]``            in 0, out 1
Gemm transB=1     ``[N, K]``            in 1, out 0
Conv              ``[N, K/groups, *k]``  in 1, out 0
================  ====================  =================================================
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.match.values import (
    FLOAT_TYPES,
    as_float32,
    attr_float,
    attr_int,
    attr_ints,
    const_shape,
    const_tensor,
    is_const,
    is_op,
    node_input,
    node_label,
    other_input,
    sole_consumer,
    value_dtype,
    value_name,
)

LinearKind = Literal["matmul", "gemm", "conv"]

_DEQUANTIZE = "DequantizeLinear"


@dataclass(frozen=True)
class Linear:
    """One linear layer ``output = alpha * x · W + bias``.

    Attributes:
        name: unique in the graph and stable from run to run: the node's name, or that of its
            output where the node has none or shares it.
        node: the MatMul, Gemm or Conv.
        kind: which of them.
        x: the activation, ``[..., K]`` (Conv: ``[batch, K, *spatial]``).
        weight: the constant, behind the nodes of ``weight_path``.
        weight_path: Identity, Transpose and float Cast nodes from ``weight`` to the node, in the
            order of the data; empty when the node reads the constant itself.
        weight_index: which input of ``node`` is the weight.
        in_axis, out_axis: axes of the array *as stored* in ``weight``. For Conv, ``in_axis``
            counts channels within a group.
        bias: the constant bias of N elements (Gemm C, Conv B, or the other operand of
            ``bias_add``); its shape may have leading or trailing ones.
        bias_add: the separate Add that applies the bias, if there is one.
        output: the value after the bias.
        groups: Conv groups; 1 for all else.
        alpha, beta: Gemm's factors of the product and of C; 1 for all else.
    """

    name: str
    node: ir.Node
    kind: LinearKind
    x: ir.Value
    weight: ir.Value
    weight_path: tuple[ir.Node, ...]
    weight_index: int
    in_axis: int
    out_axis: int
    bias: ir.Value | None
    bias_add: ir.Node | None
    output: ir.Value
    groups: int = 1
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape as stored."""
        tensor = _stored(self.weight)
        return tuple(int(d) for d in tensor.shape.numpy())

    @property
    def w(self) -> npt.NDArray[np.float32]:
        """The weight as stored, in float32; read anew at each access, so keep it if you loop."""
        return as_float32(_stored(self.weight).numpy())

    @property
    def b(self) -> npt.NDArray[np.float32] | None:
        """The bias as ``[N]`` float32, Gemm's beta applied; None without bias."""
        if self.bias is None:
            return None
        flat = as_float32(_stored(self.bias).numpy()).reshape(-1)
        full = flat if flat.size == self.out_features else np.repeat(flat, self.out_features)
        return full if self.beta == 1.0 else np.float32(self.beta) * full

    @property
    def in_features(self) -> int:
        """K: input channels, over all groups."""
        return self.shape[self.in_axis] * self.groups

    @property
    def out_features(self) -> int:
        """N: output channels, over all groups."""
        return self.shape[self.out_axis]

    @property
    def is_depthwise(self) -> bool:
        """Whether each input channel is convolved by itself."""
        return self.groups > 1 and self.shape[self.in_axis] == 1

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes of the layer; the one that writes ``output`` is last."""
        tail = () if self.bias_add is None else (self.bias_add,)
        return (*self.weight_path, self.node, *tail)

    @property
    def is_weight_shared(self) -> bool:
        """Whether something else reads the stored weight too (a tied embedding, say)."""
        return len(self.weight.uses()) > 1 or self.weight.is_graph_output()


def _stored(value: ir.Value) -> ir.TensorProtocol:
    """The tensor of a value that matched as constant (whatever the IR version was)."""
    tensor = const_tensor(value) or value.const_value
    if tensor is None:
        raise ValueError(f"{value_name(value)!r} is no longer constant; match again")
    return tensor


def match_linear(node: ir.Node, ir_version: int | None = None) -> Linear | str | None:
    """The linear layer at ``node``.

    Returns:
        the match; a reason if the node is of the right kind, but not a layer with a constant
        weight that can be treated; None if the node is of another kind, or multiplies two
        activations.
    """
    if is_op(node, "MatMul"):
        return _match_matmul(node, ir_version)
    if is_op(node, "Gemm"):
        return _match_gemm(node, ir_version)
    if is_op(node, "Conv"):
        return _match_conv(node, ir_version)
    if is_op(node, "ConvTranspose"):
        return "ConvTranspose is not treated as a linear layer"
    return None


@dataclass(frozen=True)
class _Weight:
    """A constant behind weight-only nodes; ``axes[i]`` is the stored axis that is read as i."""

    value: ir.Value
    path: tuple[ir.Node, ...]
    axes: tuple[int, ...]


def _trace_weight(value: ir.Value | None, ir_version: int | None) -> _Weight | str | None:
    """Walk from a node's input to the constant behind it; None if it is an activation."""
    path: list[ir.Node] = []
    transposes: list[tuple[int, ...] | None] = []
    current = value
    while current is not None:
        node = current.producer()
        if node is None or is_op(node, "Constant"):
            break
        if is_op(node, _DEQUANTIZE) or is_op(node, _DEQUANTIZE, domain="com.microsoft"):
            quantized = is_const(node_input(node, 0), ir_version)
            return "the weight is quantized already (DequantizeLinear)" if quantized else None
        if not is_op(node, "Identity", "Transpose", "Cast"):
            return None
        if is_op(node, "Transpose"):
            transposes.append(attr_ints(node, "perm"))
        path.append(node)
        current = node.inputs[0]
    if current is None or not is_const(current, ir_version):
        return None
    if value_dtype(current) not in FLOAT_TYPES:
        return f"the weight is {value_dtype(current)}, not floating point"
    shape = const_shape(current, ir_version)
    assert shape is not None
    axes = tuple(range(len(shape)))
    for perm in reversed(transposes):
        axes = axes[::-1] if perm is None else tuple(axes[p] for p in perm)
    return _Weight(current, tuple(reversed(path)), axes)


def _match_matmul(node: ir.Node, ir_version: int | None) -> Linear | str | None:
    right = _trace_weight(node_input(node, 1), ir_version)
    if right is None:
        left = _trace_weight(node_input(node, 0), ir_version)
        return None if left is None else "the constant is the left operand of MatMul"
    if isinstance(right, str):
        return right
    if len(right.axes) != 2:
        return f"the weight has rank {len(right.axes)}, not 2"
    x = node_input(node, 0)
    if x is None or is_const(x, ir_version):
        return "both operands are constant"
    bias_add, bias = _bias_add(node.outputs[0], right, right.axes[1], -1, ir_version)
    return Linear(
        name=node_label(node),
        node=node,
        kind="matmul",
        x=x,
        weight=right.value,
        weight_path=right.path,
        weight_index=1,
        in_axis=right.axes[0],
        out_axis=right.axes[1],
        bias=bias,
        bias_add=bias_add,
        output=node.outputs[0] if bias_add is None else bias_add.outputs[0],
    )


def _match_gemm(node: ir.Node, ir_version: int | None) -> Linear | str | None:
    weight = _trace_weight(node_input(node, 1), ir_version)
    if weight is None:
        left = _trace_weight(node_input(node, 0), ir_version)
        return None if left is None else "the constant is the left operand of Gemm"
    if isinstance(weight, str):
        return weight
    if len(weight.axes) != 2:
        return f"the weight has rank {len(weight.axes)}, not 2"
    if attr_int(node, "transA", 0):
        return "Gemm reads its activation transposed (transA=1)"
    x = node_input(node, 0)
    if x is None or is_const(x, ir_version):
        return "both operands are constant"
    k, n = (1, 0) if attr_int(node, "transB", 0) else (0, 1)
    in_axis, out_axis = weight.axes[k], weight.axes[n]
    bias, bias_add = node_input(node, 2), None
    if bias is not None and not _is_channel_bias(bias, weight, out_axis, -1, ir_version):
        return "Gemm's C is not a constant of one number a column"
    if bias is None:
        bias_add, bias = _bias_add(node.outputs[0], weight, out_axis, -1, ir_version)
    return Linear(
        name=node_label(node),
        node=node,
        kind="gemm",
        x=x,
        weight=weight.value,
        weight_path=weight.path,
        weight_index=1,
        in_axis=in_axis,
        out_axis=out_axis,
        bias=bias,
        bias_add=bias_add,
        output=node.outputs[0] if bias_add is None else bias_add.outputs[0],
        alpha=attr_float(node, "alpha", 1.0),
        beta=attr_float(node, "beta", 1.0) if bias_add is None else 1.0,
    )


def _match_conv(node: ir.Node, ir_version: int | None) -> Linear | str | None:
    weight = _trace_weight(node_input(node, 1), ir_version)
    if weight is None:
        return "the kernel of Conv is not constant"
    if isinstance(weight, str):
        return weight
    if len(weight.axes) < 3:
        return f"the kernel of Conv has rank {len(weight.axes)}"
    x = node_input(node, 0)
    if x is None or is_const(x, ir_version):
        return "both operands are constant"
    out_axis = weight.axes[0]
    channel = 1 - len(weight.axes)
    bias, bias_add = node_input(node, 2), None
    if bias is not None and not is_const(bias, ir_version):
        return "the bias of Conv is not constant"
    if bias is None:
        bias_add, bias = _bias_add(node.outputs[0], weight, out_axis, channel, ir_version)
    return Linear(
        name=node_label(node),
        node=node,
        kind="conv",
        x=x,
        weight=weight.value,
        weight_path=weight.path,
        weight_index=1,
        in_axis=weight.axes[1],
        out_axis=out_axis,
        bias=bias,
        bias_add=bias_add,
        output=node.outputs[0] if bias_add is None else bias_add.outputs[0],
        groups=attr_int(node, "group", 1),
    )


def _bias_add(
    output: ir.Value, weight: _Weight, out_axis: int, channel: int, ir_version: int | None
) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add that is the only reader of ``output`` and adds one constant number a channel."""
    add = sole_consumer(output, "Add")
    if add is None:
        return None, None
    bias = other_input(add, output)
    if bias is None or not _is_channel_bias(bias, weight, out_axis, channel, ir_version):
        return None, None
    return add, bias


def _is_channel_bias(
    bias: ir.Value, weight: _Weight, out_axis: int, channel: int, ir_version: int | None
) -> bool:
    """Whether ``bias`` is constant and has N elements along ``channel`` (counted from the end)."""
    shape = const_shape(bias, ir_version)
    stored = const_shape(weight.value, ir_version)
    if shape is None or stored is None or len(shape) < -channel:
        return False
    others = shape[:channel] + (shape[channel + 1 :] if channel != -1 else ())
    return shape[channel] == stored[out_axis] and all(d == 1 for d in others)


def find_linears(
    graph: ir.Graph, ir_version: int | None = None
) -> tuple[tuple[Linear, ...], tuple[tuple[str, str, str], ...]]:
    """All linear layers of ``graph`` in node order, and (what, node, reason) of near misses."""
    found: list[Linear] = []
    rejected: list[tuple[str, str, str]] = []
    names = Counter(node.name for node in graph if node.name)
    for node in graph:
        match = match_linear(node, ir_version)
        if isinstance(match, str):
            rejected.append(("linear", node_label(node), match))
        elif match is not None:
            if names[match.name] > 1:
                match = replace(match, name=value_name(node.outputs[0]))
            found.append(match)
    return tuple(found), tuple(rejected)
