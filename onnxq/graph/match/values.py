"""Questions about single values and nodes: what is constant, who writes, who reads, which shape.

Nothing here changes the graph. Arrays are read when asked for and not kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

#: Since this IR version an initializer that is also a graph input is a default that the caller
#: may override. Before it, every initializer had to be listed as an input and was constant.
OVERRIDABLE_SINCE_IR = 4

FLOAT_TYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


def op_domain(node: ir.Node) -> str:
    """The node's domain, with the two spellings of the default domain made one ("")."""
    return "" if node.domain == "ai.onnx" else node.domain


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether ``node`` is one of ``op_types`` of ``domain`` ("" and "ai.onnx" are the same)."""
    return (
        node is not None
        and node.op_type in op_types
        and op_domain(node) == ("" if domain == "ai.onnx" else domain)
    )


def producer(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """The node that writes ``value``; with ``op_types``, only if it is one of these."""
    node = None if value is None else value.producer()
    if node is None or not op_types or is_op(node, *op_types, domain=domain):
        return node
    return None


def consumers(value: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes that read ``value``, in subgraphs too, each once."""
    return tuple(value.consumers())


def sole_consumer(value: ir.Value, *op_types: str, domain: str = "") -> ir.Node | None:
    """The only node that reads ``value``; None if there are more, or if it is a graph output.

    A node that reads the value at two of its inputs counts as one reader.
    """
    readers = consumers(value)
    if len(readers) != 1 or value.is_graph_output():
        return None
    if op_types and not is_op(readers[0], *op_types, domain=domain):
        return None
    return readers[0]


def reads_type_only(node: ir.Node, value: ir.Value) -> bool:
    """Whether ``node`` uses the element type of ``value``, but none of its numbers (CastLike)."""
    return is_op(node, "CastLike") and node.inputs[0] is not value


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, inside of its subgraphs too, from outside of itself."""
    for value in node.inputs:
        if value is not None:
            yield value
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type is ir.AttributeType.GRAPH:
            yield from _captured(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from _captured(graph)


def _captured(graph: ir.Graph) -> Iterator[ir.Value]:
    own = {*graph.inputs, *graph.initializers.values()}
    own.update(v for node in graph for v in node.outputs)
    for node in graph:
        yield from (v for v in reads(node) if v not in own)
    yield from (v for v in graph.outputs if v not in own)


def value_name(value: ir.Value | None) -> str:
    """The value's name, or "" for a left-out input."""
    return "" if value is None else value.name or ""


def node_label(node: ir.Node) -> str:
    """A name to show for a node: its own, else that of its first output."""
    return node.name or value_name(next(iter(node.outputs), None))


def node_input(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index`` of ``node``; None when it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a binary node that reads ``value``; ``value`` itself if both are it."""
    first, second = node_input(node, 0), node_input(node, 1)
    return second if first is value else first


def attr_int(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or the operator's default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def attr_float(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or the operator's default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def attr_ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An attribute that is a list of integers; None when absent."""
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())


def attr_string(node: ir.Node, name: str, default: str) -> str:
    """A string attribute, or the operator's default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def through_identity(value: ir.Value) -> ir.Value:
    """The value behind any chain of Identity nodes."""
    while (node := producer(value, "Identity")) is not None and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def const_tensor(value: ir.Value | None, ir_version: int | None = None) -> ir.TensorProtocol | None:
    """The tensor behind a constant value, still lazy; None if the value is not constant.

    Constant is: an initializer, or the output of a Constant node, or either through Identity
    nodes. An initializer that is also listed as a graph input is a default that a caller may
    override, so it is *not* constant, unless ``ir_version`` says that the model is older than
    IR version 4, where every initializer had to be listed so. Without ``ir_version`` the newer
    rule holds.
    """
    if value is None:
        return None
    value = through_identity(value)
    node = value.producer()
    if node is not None:
        return _constant_node_tensor(node) if is_op(node, "Constant") else None
    if not value.is_initializer():
        return None
    if value.is_graph_input() and (ir_version is None or ir_version >= OVERRIDABLE_SINCE_IR):
        return None
    return value.const_value


def _constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node in any of its dense forms; None for sparse and strings."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        if name == "value":
            return attribute.as_tensor()
        if name == "value_float":
            return ir.tensor(np.array(attribute.as_float(), np.float32))
        if name == "value_floats":
            return ir.tensor(np.array(attribute.as_floats(), np.float32))
        if name == "value_int":
            return ir.tensor(np.array(attribute.as_int(), np.int64))
        if name == "value_ints":
            return ir.tensor(np.array(attribute.as_ints(), np.int64))
    return None


def const_array(
    value: ir.Value | None, ir_version: int | None = None
) -> npt.NDArray[np.generic] | None:
    """The array of a constant value (see :func:`const_tensor` for the rule), else None."""
    tensor = const_tensor(value, ir_version)
    return None if tensor is None else tensor.numpy()


def is_const(value: ir.Value | None, ir_version: int | None = None) -> bool:
    """Whether ``value`` is constant by the rule of :func:`const_tensor`; reads no data."""
    return const_tensor(value, ir_version) is not None


def const_shape(value: ir.Value | None, ir_version: int | None = None) -> tuple[int, ...] | None:
    """The shape of a constant value, without reading its data; None if it is not constant."""
    tensor = const_tensor(value, ir_version)
    return None if tensor is None else tuple(int(d) for d in tensor.shape.numpy())


def const_scalar(value: ir.Value | None, ir_version: int | None = None) -> float | None:
    """The number in a constant of one element; None for all else."""
    shape = const_shape(value, ir_version)
    if shape is None or int(np.prod(shape)) != 1:
        return None
    array = const_array(value, ir_version)
    if array is None or array.dtype.kind in "OSU":
        return None
    return float(array.reshape(()).astype(np.float64))


def const_ints(value: ir.Value | None, ir_version: int | None = None) -> tuple[int, ...] | None:
    """The numbers of a constant integer tensor, flattened; None for all else."""
    array = const_array(value, ir_version)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(i) for i in array.reshape(-1))


def as_float32(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """``array`` as contiguous float32."""
    return np.ascontiguousarray(array, dtype=np.float32)


def static_shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape, None for each symbolic dimension; None when even the rank is unknown."""
    if value is None:
        return None
    constant = const_shape(value)
    if constant is not None:
        return constant
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions, or None when unknown."""
    shape = static_shape(value)
    return None if shape is None else len(shape)


def last_dim(value: ir.Value | None) -> int | None:
    """The size of the last dimension, or None when unknown."""
    shape = static_shape(value)
    return shape[-1] if shape else None


def shape_entries(value: ir.Value | None) -> list[int | None] | None:
    """A shape tensor's entries, None for each that is known only at run time.

    None instead of a list when even the number of entries is unknown.
    """
    numbers = const_ints(value)
    if numbers is not None:
        return list(numbers)
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_op(node, "Concat"):
        parts = [shape_entries(v) for v in node.inputs]
        return None if any(p is None for p in parts) else [d for p in parts if p for d in p]
    if is_op(node, "Cast", "Identity"):
        return shape_entries(node.inputs[0])
    if is_op(node, "Unsqueeze"):
        return [None]
    if is_op(node, "Reshape") and const_ints(node_input(node, 1)) in ((-1,), (1,)):
        inner = shape_entries(node.inputs[0])
        return [None] if inner is None or len(inner) <= 1 else inner
    if is_op(node, "Shape"):
        start, end = attr_int(node, "start", 0), node.attributes.get("end")
        if end is not None and 0 <= start <= end.as_int():
            return [None] * (end.as_int() - start)
        return None
    if is_op(node, "Slice") and producer(node.inputs[0], "Shape") is not None:
        bounds = const_ints(node_input(node, 1)), const_ints(node_input(node, 2))
        if bounds[0] and bounds[1] and 0 <= bounds[0][0] <= bounds[1][0] < 8:
            return [None] * (bounds[1][0] - bounds[0][0])
        return None
    if is_op(node, "Where"):
        kept = shape_entries(node_input(node, 2))
        return None if kept is None else [None if d == -1 else d for d in kept]
    if is_op(node, "Gather"):
        indices = const_ints(node_input(node, 1))
        shape = static_shape(node_input(node, 1))
        return [None] * len(indices) if indices is not None and shape else None
    return None


def value_dtype(value: ir.Value | None) -> ir.DataType | None:
    """The element type, or None when unknown."""
    if value is None:
        return None
    tensor = const_tensor(value)
    return value.dtype if tensor is None else tensor.dtype


def is_float_cast(node: ir.Node | None) -> bool:
    """Whether ``node`` is a Cast to a float type from a float type (or one of unknown type)."""
    if node is None or not is_op(node, "Cast"):
        return False
    source = value_dtype(node.inputs[0])
    return ir.DataType(attr_int(node, "to", 0)) in FLOAT_TYPES and (
        source is None or source in FLOAT_TYPES
    )


def is_pass_through(node: ir.Node | None) -> bool:
    """Whether output 0 of ``node`` is its input 0, element for element.

    Identity, a Cast between float types, and Dropout outside training. Float casts round, but
    a channel stays the same channel, which is what the matches are used for.
    """
    if node is None:
        return False
    if is_op(node, "Identity") or is_float_cast(node):
        return True
    if is_op(node, "Dropout"):
        training = node_input(node, 2)
        return training is None or const_scalar(training) == 0
    return False


def behind(value: ir.Value) -> ir.Value:
    """The value behind any chain of pass-through nodes (see :func:`is_pass_through`)."""
    while is_pass_through(node := value.producer()):
        assert node is not None
        source = node.inputs[0]
        if source is None:
            return value
        value = source
    return value


def pass_through_readers(value: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Each (node, value it reads) for readers of ``value``, looking through pass-through nodes."""
    for node in consumers(value):
        if is_pass_through(node) and node.inputs[0] is value:
            yield from pass_through_readers(node.outputs[0])
        else:
            yield node, value
