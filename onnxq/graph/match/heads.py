"""Which channel of the value layer becomes which input channel of the output layer.

Attention mixes tokens, not channels: ``context[b, h, s, d]`` is a weighted mean over t of
``v[b, h, t, d]``. So a scale on output channel c of the value layer arrives, unchanged, at those
input channels of the output layer that the reshapes send c to. With grouped queries (GQA) each
value head is repeated, and c arrives at several.

The map is found by sending an array of channel numbers through the shape operators, with a
small batch and length, not by recognising layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.match.attention import Attention, FusedAttention
from onnxq.graph.match.linears import Linear
from onnxq.graph.match.values import (
    attr_int,
    attr_ints,
    const_ints,
    consumers,
    is_op,
    is_pass_through,
    node_input,
    node_label,
    shape_entries,
    static_shape,
    value_name,
)

_Ids = npt.NDArray[np.int64]

#: Batch and length of the array that is sent through; small, different, and not 1.
_BATCH, _LENGTH = 2, 3
#: Elements of that array for a model of fixed size; beyond, the small one is tried.
_MAX_IDS = 1 << 24
_MAX_STEPS = 32
#: These read only the shape of a value, so a scale on the value does not reach them.
SHAPE_READERS = ("Shape", "Size")


@dataclass(frozen=True)
class ValueToOutput:
    """The way of each channel from the value layer to the output layer of one attention.

    Attributes:
        value: the layer that computes v (or q, k and v together).
        output: the layer that reads the context.
        chain: the shape nodes between them, in the order of the data.
        channel_map: ``[output.in_features]``: input channel j of ``output`` is output channel
            ``channel_map[j]`` of ``value``.
        head_dim: D, channels of one head.
        num_heads: heads of the context.
        kv_heads: heads of v; ``num_heads / kv_heads`` is how often each is repeated.
    """

    value: Linear
    output: Linear
    chain: tuple[ir.Node, ...]
    channel_map: tuple[int, ...]
    head_dim: int
    num_heads: int
    kv_heads: int

    @property
    def repeats(self) -> int:
        """How many context heads share one value head."""
        return self.num_heads // self.kv_heads


class _NoWayError(Exception):
    """Why channels cannot be followed."""


def value_to_output(
    attention: Attention | FusedAttention, linears: tuple[Linear, ...]
) -> ValueToOutput | str:
    """Follow the channels of ``attention`` from its value layer to its output layer.

    Args:
        attention: the match.
        linears: the linear layers of the same graph.

    Returns:
        the way, or the reason why there is none that a per-channel scale could take.
    """
    try:
        return _follow(attention, linears)
    except _NoWayError as reason:
        return str(reason)


def _follow(attention: Attention | FusedAttention, linears: tuple[Linear, ...]) -> ValueToOutput:
    if attention.v is None:
        raise _NoWayError("q, k and v enter the operator as one tensor")
    by_output = {linear.output: linear for linear in linears}
    by_node = {linear.node: linear for linear in linears}
    value, before = _back_to_linear(attention.v, by_output, attention.nodes[-1])
    output, after = _on_to_linear(attention.context, by_node)
    if value.kind == "conv" or output.kind == "conv":
        raise _NoWayError("a Conv is not followed by channel")
    ids = _channel_ids(value)
    positions = ids.size // value.out_features
    for node in before:
        ids = _move(node, ids)
    before_heads = ids
    ids, head_dim = _attend(attention, ids)
    for node in after:
        ids = _move(node, ids)
    channel_map = _read_map(ids, value.out_features, output.in_features, positions)
    kv_channels = len(set(channel_map))
    if head_dim <= 0 or len(channel_map) % head_dim or kv_channels % head_dim:
        raise _NoWayError(
            f"heads of {head_dim} do not divide {len(channel_map)} channels "
            f"(v: {list(before_heads.shape)})"
        )
    return ValueToOutput(
        value=value,
        output=output,
        chain=(*before, *after),
        channel_map=channel_map,
        head_dim=head_dim,
        num_heads=len(channel_map) // head_dim,
        kv_heads=kv_channels // head_dim,
    )


_SHAPE_OPS = (
    "Reshape",
    "Transpose",
    "Unsqueeze",
    "Squeeze",
    "Expand",
    "Flatten",
    "Tile",
    "Gather",
    "Split",
    "Slice",
)


def _back_to_linear(
    value: ir.Value, by_output: Mapping[ir.Value, Linear], reader: ir.Node
) -> tuple[Linear, tuple[ir.Node, ...]]:
    """The layer that ``value`` comes from, and the nodes between, in the order of the data."""
    nodes: list[ir.Node] = []
    for _ in range(_MAX_STEPS):
        _check_only_reader(value, reader)
        linear = by_output.get(value)
        if linear is not None:
            return linear, tuple(reversed(nodes))
        node = value.producer()
        if node is None:
            raise _NoWayError(f"v comes from {value_name(value)!r}, not from a linear layer")
        if is_op(node, "Concat"):
            raise _NoWayError(f"v passes Concat {node_label(node)!r} (a cache?)")
        if not (is_op(node, *_SHAPE_OPS) or is_pass_through(node)) or node.inputs[0] is None:
            raise _NoWayError(f"v passes {node.op_type} {node_label(node)!r}")
        nodes.append(node)
        value, reader = node.inputs[0], node
    raise _NoWayError("the way from the value layer is too long")


def _on_to_linear(
    value: ir.Value, by_node: Mapping[ir.Node, Linear]
) -> tuple[Linear, tuple[ir.Node, ...]]:
    """The layer that reads ``value``, and the nodes between."""
    nodes: list[ir.Node] = []
    for _ in range(_MAX_STEPS):
        readers = [n for n in consumers(value) if not is_op(n, *SHAPE_READERS)]
        if len(readers) != 1 or value.is_graph_output():
            raise _NoWayError(f"the context {value_name(value)!r} is read by several nodes")
        node = readers[0]
        linear = by_node.get(node)
        if linear is not None:
            if linear.x is not value:
                raise _NoWayError("the context is not what the output layer multiplies")
            return linear, tuple(nodes)
        if not (is_op(node, *_SHAPE_OPS) or is_pass_through(node)) or node.inputs[0] is not value:
            raise _NoWayError(f"the context passes {node.op_type} {node_label(node)!r}")
        nodes.append(node)
        value = node.outputs[0]
    raise _NoWayError("the way to the output layer is too long")


def _check_only_reader(value: ir.Value, reader: ir.Node) -> None:
    others = [n for n in consumers(value) if n is not reader and not is_op(n, *SHAPE_READERS)]
    if others or value.is_graph_output():
        who = node_label(others[0]) if others else "the graph's outputs"
        raise _NoWayError(f"{value_name(value)!r} on the way of v is also read by {who}")


# Sending channel numbers through --------------------------------------------------------------


def _channel_ids(linear: Linear) -> _Ids:
    """``position * N + channel`` in the shape of the layer's output."""
    shape = static_shape(linear.output) or static_shape(linear.x)
    is_flat = linear.kind == "gemm" or (shape is not None and len(shape) == 2)
    lead: tuple[int, ...] = (_BATCH * _LENGTH,) if is_flat else (_BATCH, _LENGTH)
    n = linear.out_features
    # A model of fixed size may have its batch and length in the targets of its Reshapes.
    if shape is not None and len(shape) == len(lead) + 1:
        fixed = tuple(d or free for d, free in zip(shape, lead, strict=False))
        lead = fixed if math.prod(fixed) * n <= _MAX_IDS else lead
    return np.arange(math.prod(lead) * n, dtype=np.int64).reshape(*lead, n)


def _attend(attention: Attention | FusedAttention, ids: _Ids) -> tuple[_Ids, int]:
    """What attention does to channel numbers: nothing, but a fused operator repeats heads."""
    if isinstance(attention, Attention) or ids.ndim == 4 or attention.num_heads is None:
        return ids, ids.shape[-1]
    kv_heads = attention.kv_heads or attention.num_heads
    if ids.ndim != 3 or ids.shape[-1] % kv_heads or attention.num_heads % kv_heads:
        raise _NoWayError(f"v of shape {list(ids.shape)} has no {kv_heads} heads")
    head_dim = ids.shape[-1] // kv_heads
    heads = ids.reshape(*ids.shape[:2], kv_heads, head_dim)
    repeated = np.repeat(heads, attention.num_heads // kv_heads, axis=2)
    return repeated.reshape(*ids.shape[:2], -1), head_dim


def _read_map(
    ids: _Ids, value_channels: int, output_channels: int, positions: int
) -> tuple[int, ...]:
    """The channel at each last index, after a check that it is the same at every position."""
    if ids.shape[-1] != output_channels:
        raise _NoWayError(
            f"the output layer reads {output_channels} channels, {ids.shape[-1]} arrive"
        )
    rows = ids.reshape(-1, output_channels)
    position, channel = np.divmod(rows, value_channels)
    expected = np.arange(positions)[:, None]
    if rows.shape[0] != positions or not np.array_equal(
        position, np.broadcast_to(expected, rows.shape)
    ):
        raise _NoWayError("tokens and channels are mixed between the value and the output layer")
    if not np.array_equal(channel, np.broadcast_to(channel[:1], channel.shape)):
        raise _NoWayError("the way of a channel depends on the token")
    return tuple(int(c) for c in channel[0])


def _move(node: ir.Node, ids: _Ids) -> _Ids:
    """What one shape node does to the array of channel numbers."""
    try:
        return _apply(node, ids)
    except (ValueError, IndexError) as error:
        raise _NoWayError(
            f"{node.op_type} {node_label(node)!r} does not fit shape {list(ids.shape)}: {error}"
        ) from error


def _apply(node: ir.Node, ids: _Ids) -> _Ids:
    if is_pass_through(node):
        return ids
    if is_op(node, "Transpose"):
        return np.transpose(ids, attr_ints(node, "perm"))
    if is_op(node, "Reshape"):
        target = shape_entries(node_input(node, 1))
        return ids.reshape(_reshape_target(node, target, ids.shape))
    if is_op(node, "Expand"):
        return _expand(node, ids)
    if is_op(node, "Flatten"):
        axis = attr_int(node, "axis", 1)
        return ids.reshape(int(np.prod(ids.shape[:axis])), -1)
    if is_op(node, "Unsqueeze", "Squeeze"):
        axes = attr_ints(node, "axes") or const_ints(node_input(node, 1))
        if axes is None:
            raise _NoWayError(f"the axes of {node_label(node)!r} are not constant")
        return np.expand_dims(ids, axes) if is_op(node, "Unsqueeze") else np.squeeze(ids, axes)
    if is_op(node, "Tile"):
        return np.tile(ids, _constant(node, 1))
    if is_op(node, "Gather"):
        return np.take(ids, np.array(_constant(node, 1)), axis=attr_int(node, "axis", 0))
    if is_op(node, "Slice"):
        return _slice(node, ids)
    raise _NoWayError(f"{node.op_type} {node_label(node)!r} is not followed")


def _constant(node: ir.Node, index: int) -> tuple[int, ...]:
    numbers = const_ints(node_input(node, index))
    if numbers is None:
        raise _NoWayError(f"input {index} of {node.op_type} {node_label(node)!r} is not constant")
    return numbers


def _slice(node: ir.Node, ids: _Ids) -> _Ids:
    starts, ends, axes = (_constant(node, i) for i in (1, 2, 3))
    steps = _constant(node, 4) if node_input(node, 4) is not None else (1,) * len(starts)
    index: list[slice] = [slice(None)] * ids.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step <= 0:
            raise _NoWayError(f"Slice {node_label(node)!r} runs backwards")
        index[axis] = slice(start, end, step)
    return ids[tuple(index)]


def _expand(node: ir.Node, ids: _Ids) -> _Ids:
    target = shape_entries(node_input(node, 1))
    if target is None:
        raise _NoWayError(f"the shape of Expand {node_label(node)!r} is not known")
    width = max(len(target), ids.ndim)
    have = (1,) * (width - ids.ndim) + ids.shape
    want = [None] * (width - len(target)) + list(target)
    shape = tuple(h if w is None or w in (1, -1) else w for h, w in zip(have, want, strict=True))
    return np.broadcast_to(ids.reshape(have), shape)


def _reshape_target(
    node: ir.Node, target: list[int | None] | None, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The numbers of a Reshape's target, which may be known only in part.

    An unknown entry is a size taken from some tensor's shape at run time. The only one is
    computed; of several, the earlier ones keep the size at their own index.
    """
    if target is None:
        raise _NoWayError(f"the shape of Reshape {node_label(node)!r} is not known")
    keeps_zero = bool(attr_int(node, "allowzero", 0))
    sizes = [shape[i] if size == 0 and not keeps_zero else size for i, size in enumerate(target)]
    unknown = [i for i, size in enumerate(sizes) if size in (None, -1)]
    computed = next((i for i in unknown if sizes[i] == -1), unknown[-1] if unknown else None)
    for i in unknown:
        if i != computed:
            sizes[i] = shape[i]
    if computed is not None:
        sizes[computed] = -1
    return tuple(size for size in sizes if size is not None)
