"""Safe edits: each leaves the graph valid, the model's interface as it was, and others' data alone.

* Names are unique over the graph and all its subgraphs, and never taken from a value in use.
* New nodes go where their inputs exist already.
* A value that is a graph output keeps its name there, whatever produces it.
* A constant is written in place only when nothing else reads it; else the reader gets a copy.

:func:`validate` checks all that a pass could break; the pipeline runs it after every pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxq.errors import InternalError, PreconditionError
from onnxq.graph.match.linears import Linear
from onnxq.graph.match.values import const_tensor, is_op, node_label, op_domain, value_name

_Array = npt.NDArray[np.generic]

#: Initializers above this size are shown to onnx.checker without their data.
_CHECKED_BYTES = 1024

# Names ----------------------------------------------------------------------------------------


def names_in_use(graph: ir.Graph) -> set[str]:
    """Names of all values and nodes of ``graph``, its subgraphs, and what these capture."""
    names: set[str] = set()
    for each in (graph, *graph.subgraphs()):
        names.update(value_name(v) for v in each.inputs)
        names.update(each.initializers)
        for node in each:
            names.add(node.name or "")
            names.update(value_name(v) for v in (*node.inputs, *node.outputs))
    names.discard("")
    return names


class Names:
    """Fresh names for one graph; quicker than :func:`fresh_name` when many are needed.

    Make it anew after edits that did not take their names from it.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._taken = names_in_use(graph)

    def fresh(self, base: str) -> str:
        """``base`` itself if it is free, else ``base_1``, ``base_2``, ...; taken from now on."""
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


def fresh_name(graph: ir.Graph, base: str) -> str:
    """A name that nothing in ``graph`` or its subgraphs has: ``base``, ``base_1``, ..."""
    return Names(graph).fresh(base)


# Nodes ----------------------------------------------------------------------------------------


def insert_after(anchor: ir.Node | ir.Value, nodes: ir.Node | Sequence[ir.Node]) -> None:
    """Insert ``nodes``, in their order, right after a node or the writer of a value.

    After a graph input or an initializer means: at the beginning of its graph. Outputs without
    a name get one.

    Raises:
        InternalError: if the anchor belongs to no graph.
    """
    new = [nodes] if isinstance(nodes, ir.Node) else list(nodes)
    node = anchor.producer() if isinstance(anchor, ir.Value) else anchor
    graph = anchor.graph if node is None else node.graph
    if not isinstance(graph, ir.Graph):
        raise InternalError("INTERNAL-NO-GRAPH", f"{anchor.name!r} belongs to no graph")
    _name(graph, new)
    if node is not None:
        graph.insert_after(node, new)
    elif len(graph):
        graph.insert_before(graph.node(0), new)
    else:
        graph.extend(new)


def insert_before(anchor: ir.Node, nodes: ir.Node | Sequence[ir.Node]) -> None:
    """Insert ``nodes``, in their order, right before ``anchor``.

    Raises:
        InternalError: if the anchor belongs to no graph.
    """
    new = [nodes] if isinstance(nodes, ir.Node) else list(nodes)
    graph = anchor.graph
    if not isinstance(graph, ir.Graph):
        raise InternalError("INTERNAL-NO-GRAPH", f"{node_label(anchor)!r} belongs to no graph")
    _name(graph, new)
    graph.insert_before(anchor, new)


def _name(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Give names to nodes and outputs that have none."""
    unnamed = [n for n in nodes if not n.name or any(not v.name for v in n.outputs)]
    if not unnamed:
        return
    names = Names(graph)
    for node in unnamed:
        source = value_name(next((v for v in node.inputs if v is not None), None))
        base = f"{source}_{node.op_type}" if source else node.op_type
        if not node.name:
            node.name = names.fresh(base)
        for value in node.outputs:
            if not value.name:
                value.name = names.fresh(f"{base}_output")


def replace_value(
    old: ir.Value,
    new: ir.Value,
    *,
    except_nodes: Collection[ir.Node] = (),
    outputs: bool = True,
) -> int:
    """Let everything that reads ``old`` read ``new``: nodes, subgraphs, graph outputs.

    A graph output keeps its name: ``new`` takes the name of ``old``, which gets a fresh one. Where
    ``new`` cannot be renamed (it is an input, an initializer or an output itself), an Identity
    carries the name.

    Args:
        old: what is read now.
        new: what shall be read; already in the graph unless it is an initializer or input.
        except_nodes: readers that keep ``old``; give those that compute ``new`` from it.
        outputs: whether graph outputs are replaced too.

    Returns:
        how many uses were changed.
    """
    if old is new:
        return 0
    kept = set(except_nodes)
    changed = 0
    for usage in old.uses():
        if usage.node not in kept:
            usage.node.replace_input_with(usage.idx, new)
            changed += 1
    if new.shape is None and new.producer() is not None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    if outputs and old.is_graph_output():
        changed += _replace_output(old, new)
    return changed


def _replace_output(old: ir.Value, new: ir.Value) -> int:
    graph = old.graph
    if graph is None:
        raise InternalError("INTERNAL-NO-GRAPH", f"{value_name(old)!r} belongs to no graph")
    owners = [g for g in (graph, *graph.subgraphs()) if any(v is old for v in g.outputs)]
    public_name = old.name
    can_rename = new.producer() is not None and not new.is_graph_output() and new.graph is graph
    if not can_rename:
        identity = ir.node("Identity", inputs=[new], name=fresh_name(graph, f"{old.name}_identity"))
        identity.outputs[0].type, identity.outputs[0].shape = old.type, old.shape
        graph.append(identity)
        new = identity.outputs[0]
    if not _is_interface(old):
        old.name = fresh_name(graph, f"{public_name}_inner")
        new.name = public_name
    changed = 0
    for owner in owners:
        for index, value in enumerate(owner.outputs):
            if value is old:
                owner.outputs[index] = new
                changed += 1
    return changed


def _is_interface(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_initializer()


# Constants ------------------------------------------------------------------------------------


def add_initializer(graph: ir.Graph, name: str, array: _Array | ir.TensorProtocol) -> ir.Value:
    """Add a constant to ``graph``.

    Args:
        graph: where readers will be: this graph or subgraphs of it.
        name: must be free, see :func:`fresh_name`.
        array: the data; numpy arrays with types of ``ml_dtypes`` keep them.

    Raises:
        InternalError: if the name is taken.
    """
    if name in graph.initializers or any(value_name(v) == name for v in graph.inputs):
        raise InternalError("INTERNAL-NAME-TAKEN", f"an initializer {name!r} exists already")
    value = ir.Value(name=name)
    _fill(value, array)
    graph.register_initializer(value)
    return value


def _fill(value: ir.Value, array: _Array | ir.TensorProtocol) -> None:
    """Make ``array`` the content of ``value``, and its type and shape those of the value."""
    tensor = ir.tensor(array, name=value.name) if isinstance(array, np.ndarray) else array
    value.const_value = tensor
    value.shape = ir.Shape(tensor.shape.numpy())
    value.type = ir.TensorType(tensor.dtype)


def replace_const(
    node: ir.Node, index: int, array: _Array | ir.TensorProtocol, name: str | None = None
) -> ir.Value:
    """Give input ``index`` of ``node`` new constant content, and no other reader.

    Written in place if this input is the only reader of an initializer that is no graph input or
    output; else the node gets an initializer of its own, and what it read before stays as long
    as something reads it.

    Args:
        node: the reader.
        index: which input; it is appended when the node has fewer.
        array: the new content.
        name: what to call a new initializer; by default the old name and a number.

    Returns:
        the value that the input now reads.
    """
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise InternalError("INTERNAL-NO-GRAPH", f"{node_label(node)!r} belongs to no graph")
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None and _is_private_initializer(old):
        _fill(old, array)
        return old
    base = name or value_name(old) or f"{node_label(node)}_const"
    new = add_initializer(graph, fresh_name(graph, base), array)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, new)
    if old is not None:
        _drop_if_unread(old)
    return new


def _is_private_initializer(value: ir.Value) -> bool:
    return (
        value.is_initializer()
        and len(value.uses()) == 1
        and not value.is_graph_input()
        and not value.is_graph_output()
    )


def _drop_if_unread(value: ir.Value) -> None:
    """Remove a constant that lost its last reader."""
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node, graph = value.producer(), value.graph
    if node is None and value.is_initializer() and isinstance(graph, ir.Graph):
        del graph.initializers[value_name(value)]
    elif node is not None and is_op(node, "Constant") and isinstance(node.graph, ir.Graph):
        node.graph.remove(node, safe=True)


def set_weight(linear: Linear, array: npt.NDArray[np.floating]) -> ir.Value:
    """Write the weight of a linear layer, in the layout that is stored, for this layer alone.

    The element type stays. Other readers of the constant (a tied embedding) keep the old one;
    a Transpose before the weight that others read too is copied.

    Raises:
        PreconditionError: if a number does not fit into the element type.
    """
    data = _cast_like(array, linear.weight, linear.name)
    reader, index = linear.node, linear.weight_index
    for node in reversed(linear.weight_path):
        if len(node.outputs[0].uses()) > 1:
            source = node.outputs[0]
            attributes = list(node.attributes.values())
            copy = ir.Node(node.domain, node.op_type, list(node.inputs), attributes)
            copy.outputs[0].type, copy.outputs[0].shape = source.type, source.shape
            insert_before(reader, copy)
            reader.replace_input_with(index, copy.outputs[0])
            node = copy
        reader, index = node, 0
    return replace_const(reader, index, data)


def set_bias(linear: Linear, array: npt.NDArray[np.floating]) -> ir.Value:
    """Write the bias of a linear layer, ``[N]``, adding one where it has none.

    A MatMul without bias gets an Add, and what read its output then reads the sum; match again.

    Raises:
        PreconditionError: if a number does not fit into the element type.
    """
    data = _cast_like(array.reshape(-1), linear.weight, linear.name)
    if linear.bias_add is not None:
        index = 1 if linear.bias_add.inputs[1] is linear.bias else 0
        shape = _stored(linear.bias).shape.numpy()
        return replace_const(linear.bias_add, index, data.reshape(shape))
    base = f"{linear.name}_bias"
    if linear.kind != "matmul":
        if linear.beta != 1.0:
            data = _cast_like(array.reshape(-1) / linear.beta, linear.weight, linear.name)
        return replace_const(linear.node, 2, data, name=base)
    graph = linear.node.graph
    if not isinstance(graph, ir.Graph):
        raise InternalError("INTERNAL-NO-GRAPH", f"{linear.name!r} belongs to no graph")
    bias = add_initializer(graph, fresh_name(graph, base), data)
    add = ir.node("Add", inputs=[linear.output, bias], name=fresh_name(graph, f"{base}_add"))
    insert_after(linear.node, add)
    replace_value(linear.output, add.outputs[0], except_nodes=[add])
    return bias


def _stored(value: ir.Value | None) -> ir.TensorProtocol:
    tensor = None if value is None else const_tensor(value) or value.const_value
    if tensor is None:
        raise InternalError("INTERNAL-STALE-MATCH", f"{value_name(value)!r} is not constant")
    return tensor


def _cast_like(array: npt.NDArray[np.floating], like: ir.Value, where: str) -> _Array:
    """``array`` in the element type of ``like``; refuses numbers that become infinite or NaN."""
    dtype = _stored(like).dtype.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        data: _Array = np.ascontiguousarray(array).astype(dtype)
    if not np.all(np.isfinite(data.astype(np.float64))):
        raise PreconditionError(
            "EDIT-NOT-FINITE",
            f"new numbers for {where!r} are not finite in {dtype}",
            "use a smaller range, or convert the model to float32 first",
        )
    return data


# Dead code ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removed:
    """How much :func:`remove_dead` took away."""

    nodes: int = 0
    initializers: int = 0


def remove_dead(graph: ir.Graph) -> Removed:
    """Remove nodes whose results nobody reads, then unread initializers, in subgraphs too.

    Inputs and outputs of the graph stay, and so do initializers that are inputs as well.
    """
    nodes = _remove_dead_nodes(graph)
    return Removed(nodes, sum(_remove_unread(each) for each in (graph, *graph.subgraphs())))


def _remove_dead_nodes(graph: ir.Graph) -> int:
    count = 0
    for node in reversed(list(graph)):
        if any(v.uses() or v.is_graph_output() for v in node.outputs):
            count += sum(_remove_dead_nodes(inner) for inner in _subgraphs_of(node))
        else:
            _detach(node)
            graph.remove(node)
            count += 1
    return count


def _remove_unread(graph: ir.Graph) -> int:
    """Remove the initializers of one graph that nothing reads; how many."""
    unread = [
        name
        for name, value in graph.initializers.items()
        if not (value.uses() or value.is_graph_input() or value.is_graph_output())
    ]
    for name in unread:
        del graph.initializers[name]
    return len(unread)


def _subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _detach(node: ir.Node) -> None:
    """Let ``node`` and all inside it read nothing."""
    for inner in _subgraphs_of(node):
        for each in inner:
            _detach(each)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)


# Validity -------------------------------------------------------------------------------------


def is_topologically_sorted(graph: ir.Graph) -> bool:
    """Whether every node of ``graph`` and its subgraphs comes after those whose values it reads."""
    return not any("before it exists" in p for p in _graph_problems(graph, set(), set()))


def find_problems(model: ir.Model) -> list[str]:
    """Everything that makes the IR of ``model`` invalid; empty for a valid one."""
    problems = _graph_problems(model.graph, set(), set())
    problems += _domain_problems(model.graph, model.graph.opset_imports, "the model")
    for function in model.functions.values():
        where = f"function {function.name!r}"
        problems += _body_problems(function, function.inputs, set(), set(), where)
        problems += _domain_problems(function, function.opset_imports, where)
    return problems


def _graph_problems(graph: ir.Graph, outer: set[ir.Value], names: set[str]) -> list[str]:
    where = f"graph {graph.name!r}"
    known = [*graph.inputs, *(v for v in graph.initializers.values() if v not in graph.inputs)]
    problems = []
    for key, value in graph.initializers.items():
        if key != value.name:
            problems.append(f"{where}: initializer {value.name!r} is registered as {key!r}")
        tensor = value.const_value
        if tensor is None:
            problems.append(f"{where}: initializer {key!r} has no data")
        elif value.dtype is not None and value.dtype != tensor.dtype:
            problems.append(f"{where}: {key!r} is {value.dtype}, its data {tensor.dtype}")
        elif value.shape is not None and value.shape.is_static() and value.shape != tensor.shape:
            problems.append(f"{where}: {key!r} is {value.shape}, its data {tensor.shape}")
    problems += _body_problems(graph, known, outer, names, where)
    return problems


def _body_problems(
    body: ir.Graph | ir.Function,
    known: Iterable[ir.Value],
    outer: set[ir.Value],
    outer_names: set[str],
    where: str,
) -> list[str]:
    problems: list[str] = []
    available, names = set(outer), set(outer_names)

    def define(value: ir.Value, by: str) -> None:
        if value.name:
            if value.name in names:
                problems.append(f"{where}: the name {value.name!r} of {by} is taken")
            names.add(value.name)
        elif value.uses() or value.is_graph_output():
            problems.append(f"{where}: a value of {by} is read, but has no name")
        available.add(value)

    for value in known:
        define(value, "an input or initializer")
    for node in body:
        label = f"{node.op_type} {node_label(node)!r}"
        for source in node.inputs:
            if source is not None and source not in available:
                late = source.producer() is not None and source.graph is node.graph
                why = "before it exists" if late else "which is defined nowhere around it"
                problems.append(f"{where}: {label} reads {source.name!r} {why}")
        for inner in _subgraphs_of(node):
            problems += _graph_problems(inner, available, names)
        for value in node.outputs:
            define(value, label)
    problems.extend(
        f"{where}: output {value.name!r} is defined nowhere"
        for value in body.outputs
        if value not in available
    )
    return problems


def _domain_problems(body: ir.Graph | ir.Function, imports: Iterable[str], where: str) -> list[str]:
    imported = {"" if domain == "ai.onnx" else domain for domain in imports}
    used = {op_domain(node) for node in body.all_nodes()}
    return [f"{where} uses domain {d or 'ai.onnx'!r} unimported" for d in sorted(used - imported)]


def validate(model: ir.Model, *, after: str = "") -> None:
    """Check that the IR holds together and that onnx.checker accepts the model.

    Args:
        model: what to check; it is not changed.
        after: what was done last, for the message.

    Raises:
        InternalError: with all problems found: a pass has a bug.
    """
    problems = find_problems(model)
    if not problems:
        problems = _checker_problems(model)
    if problems:
        when = f" after {after}" if after else ""
        raise InternalError(
            "INTERNAL-INVALID-IR",
            f"the model is invalid{when}: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
            "please report this with the model and the pipeline",
            problems=problems[:50],
        )


def _checker_problems(model: ir.Model) -> list[str]:
    """What onnx.checker says about the model with its large tensors left out."""
    light = model.clone()
    for graph in light.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _CHECKED_BYTES:
                empty = np.empty([0], dtype=tensor.dtype.numpy())
                value.const_value = ir.Tensor(empty, dtype=tensor.dtype, name=value.name)
    try:
        onnx.checker.check_model(ir.to_proto(light))
    except onnx.checker.ValidationError as error:
        return [" ".join(str(error).split())[:400]]
    return []
