"""Structural checks of a parsed model, run before anything else sees it.

Two of them protect the process itself: onnxruntime recurses over chains of model-local functions
and crashes at a few thousand, and functions that call one another twice each expand without end.
The rest makes sure that what :mod:`onnx_ir` drops without a word (sparse tensors, training info)
is refused instead, that every tensor has the bytes its shape promises, and that nodes are sorted.

=========================  ====================================================================
code                       the model ...
=========================  ====================================================================
DATA-NO-GRAPH              has no graph, or one without outputs
DATA-IR-VERSION            does not say its IR version
DATA-OPSET                 imports no standard operators, or a version below 1
DATA-OPSET-CONFLICT        imports one domain in two versions
DATA-FUNCTION-CYCLE        has a model-local function that calls itself
DATA-FUNCTION-DEPTH        nests model-local functions deeper than MAX_FUNCTION_DEPTH
DATA-FUNCTION-EXPANSION    would have more than MAX_EXPANDED_NODES nodes with functions inlined
DATA-CYCLE                 has nodes that wait for one another
DATA-UNDEFINED-VALUE       reads a value that nothing defines
DATA-TENSOR-TYPE           has a tensor of an unknown element type
DATA-TENSOR-SHAPE          has a tensor with a negative dimension
DATA-TENSOR-SIZE           has a tensor with more or fewer bytes than its shape needs
DATA-INVALID-MODEL         breaks another rule of the ONNX standard (message of onnx.checker)
UNSUPPORTED-IR-VERSION     is newer or older than the installed onnx reads
UNSUPPORTED-OPSET          is newer than the installed onnx
UNSUPPORTED-SPARSE         has sparse tensors
UNSUPPORTED-SEGMENT        has a tensor stored in segments
UNSUPPORTED-TRAINING       has training info
=========================  ====================================================================
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import onnx

from onnxq.errors import DataError, UnsupportedError
from onnxq.graph.external import tensor_nbytes

MAX_FUNCTION_DEPTH = 64
MAX_EXPANDED_NODES = 10_000_000
MIN_IR_VERSION = 3

_EXPORT_AGAIN = "the model is damaged or was exported wrongly; export it again"
_MAX_VERSIONS = {
    "": onnx.defs.onnx_opset_version(),
    "ai.onnx.ml": onnx.defs.onnx_ml_opset_version(),
}

FunctionKey = tuple[str, str, str]


def graphs_of_node(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The subgraphs in the attributes of ``node``."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def walk_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All nodes, those in subgraphs included."""
    stack = [iter(nodes)]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            continue
        yield node
        stack.extend(iter(graph.node) for graph in graphs_of_node(node))


def walk_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all subgraphs, those in functions included."""
    yield model.graph
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    for nodes in bodies:
        for node in walk_nodes(nodes):
            yield from graphs_of_node(node)


def walk_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor: initializers and attributes, in all graphs and functions.

    Those of the main graph's initializers come first, in their order.
    """
    yield from model.graph.initializer
    yield from _body_tensors(model.graph.node)
    for function in model.functions:
        yield from function_tensors(function)


def function_tensors(function: onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of a model-local function."""
    yield from _body_tensors(function.node)
    yield from _attribute_tensors(function.attribute_proto)


def _body_tensors(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in walk_nodes(nodes):
        yield from _attribute_tensors(node.attribute)
        for graph in graphs_of_node(node):
            yield from graph.initializer


def _attribute_tensors(attributes: Sequence[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def check_header(model: onnx.ModelProto) -> None:
    """Check what the model says of itself, and make its opset imports unique, in place."""
    if not model.HasField("graph"):
        raise DataError("DATA-NO-GRAPH", "the model has no graph", _EXPORT_AGAIN)
    if not model.graph.output:
        raise DataError("DATA-NO-GRAPH", "the graph has no outputs", _EXPORT_AGAIN)
    if not model.ir_version:
        raise DataError("DATA-IR-VERSION", "the model does not say its IR version", _EXPORT_AGAIN)
    if not MIN_IR_VERSION <= model.ir_version <= onnx.IR_VERSION:
        raise UnsupportedError(
            "UNSUPPORTED-IR-VERSION",
            f"the model has IR version {model.ir_version}; "
            f"onnx {onnx.__version__} reads {MIN_IR_VERSION} to {onnx.IR_VERSION}",
            "install a newer onnx, or export the model again",
        )
    if model.training_info:
        raise UnsupportedError(
            "UNSUPPORTED-TRAINING",
            "the model carries training info, which would be lost",
            "export the model for inference",
        )
    _unify_opsets(model, "the model")
    for function in model.functions:
        _unify_opsets(function, f"function {function.name!r}")


def _unify_opsets(owner: onnx.ModelProto | onnx.FunctionProto, what: str) -> None:
    versions: dict[str, int] = {}
    for entry in owner.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        known = versions.setdefault(domain, entry.version)
        if known != entry.version:
            raise DataError(
                "DATA-OPSET-CONFLICT",
                f"{what} imports domain {domain or 'ai.onnx'!r} as {known} and {entry.version}",
                _EXPORT_AGAIN,
            )
        if entry.version < 1:
            raise DataError(
                "DATA-OPSET", f"{what} imports {domain or 'ai.onnx'!r} {known}", _EXPORT_AGAIN
            )
        newest = _MAX_VERSIONS.get(domain)
        if newest is not None and entry.version > newest:
            raise UnsupportedError(
                "UNSUPPORTED-OPSET",
                f"{what} imports {domain or 'ai.onnx'!r} {known}; "
                f"onnx {onnx.__version__} knows up to {newest}",
                f"install a newer onnx, or export with opset {newest} or lower",
            )
    if not versions:
        raise DataError("DATA-OPSET", f"{what} imports no operators", _EXPORT_AGAIN)
    del owner.opset_import[:]
    for domain, version in versions.items():
        owner.opset_import.add(domain=domain, version=version)


def check_functions(model: onnx.ModelProto) -> None:
    """Bound the nesting of model-local functions and the size of the model once inlined."""
    bodies: dict[FunctionKey, Sequence[onnx.NodeProto]] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in bodies:
            raise DataError(
                "DATA-INVALID-MODEL", f"function {function.name!r} is defined twice", _EXPORT_AGAIN
            )
        bodies[key] = function.node
    calls = {key: _calls(nodes, bodies) for key, nodes in bodies.items()}
    depth: dict[FunctionKey, int] = {}
    size: dict[FunctionKey, int] = {}
    for key in _callees_first(calls):
        callees = calls[key][0]
        depth[key] = 1 + max((depth[callee] for callee in callees), default=0)
        size[key] = calls[key][1] + sum(size[callee] for callee in callees)
        if depth[key] > MAX_FUNCTION_DEPTH:
            raise DataError(
                "DATA-FUNCTION-DEPTH",
                f"function {key[1]!r} nests functions more than {MAX_FUNCTION_DEPTH} deep; "
                "runtimes crash on such chains",
                "inline the functions first (onnx.inliner)",
            )
    callees, own = _calls(model.graph.node, bodies)
    expanded = own + sum(size[callee] for callee in callees)
    if expanded > MAX_EXPANDED_NODES:
        raise DataError(
            "DATA-FUNCTION-EXPANSION",
            f"with its functions inlined the model would have {expanded} nodes",
            f"at most {MAX_EXPANDED_NODES} are accepted; share values instead of repeating calls",
        )


def _calls(
    nodes: Sequence[onnx.NodeProto], bodies: dict[FunctionKey, Sequence[onnx.NodeProto]]
) -> tuple[list[FunctionKey], int]:
    """The functions that ``nodes`` call, repeats included, and the number of other nodes."""
    called: list[FunctionKey] = []
    others = 0
    for node in walk_nodes(nodes):
        key = (node.domain, node.op_type, node.overload)
        if key in bodies:
            called.append(key)
        else:
            others += 1
    return called, others


def _callees_first(
    calls: dict[FunctionKey, tuple[list[FunctionKey], int]],
) -> Iterator[FunctionKey]:
    """All functions, each after those that it calls; without recursion, as chains may be long."""
    done: set[FunctionKey] = set()
    for root in calls:
        if root in done:
            continue
        path = {root: iter(calls[root][0])}
        while path:
            key = next(reversed(path))
            callee = next(path[key], None)
            if callee is None:
                del path[key]
                done.add(key)
                yield key
            elif callee in path:
                raise DataError(
                    "DATA-FUNCTION-CYCLE", f"function {callee[1]!r} calls itself", _EXPORT_AGAIN
                )
            elif callee not in done:
                path[callee] = iter(calls[callee][0])


def check_tensor(tensor: onnx.TensorProto) -> None:
    """Check that a tensor inside the model has exactly the data that its shape needs."""
    if tensor.HasField("segment"):
        raise UnsupportedError(
            "UNSUPPORTED-SEGMENT", f"tensor {tensor.name!r} is stored in segments", _EXPORT_AGAIN
        )
    if tensor.data_type == onnx.TensorProto.STRING:
        elements = 1
        for dim in tensor.dims:
            elements *= dim
        _compare(tensor, elements, len(tensor.string_data), "strings")
        return
    nbytes = tensor_nbytes(tensor)
    if tensor.HasField("raw_data"):
        _compare(tensor, nbytes, len(tensor.raw_data), "bytes")
        return
    field, values = _typed_values(tensor, nbytes)
    _compare(tensor, values, len(getattr(tensor, field)), f"values in {field}")


def _typed_values(tensor: onnx.TensorProto, nbytes: int) -> tuple[str, int]:
    """The typed field of this element type and how many values it must have.

    Types below 32 bits store one value a number, 4-bit and smaller types one packed byte.
    """
    kind = onnx.TensorProto
    width: dict[int, tuple[str, int]] = {
        kind.FLOAT: ("float_data", 4),
        kind.COMPLEX64: ("float_data", 4),
        kind.DOUBLE: ("double_data", 8),
        kind.COMPLEX128: ("double_data", 8),
        kind.INT64: ("int64_data", 8),
        kind.UINT64: ("uint64_data", 8),
        kind.UINT32: ("uint64_data", 4),
        kind.INT32: ("int32_data", 4),
        kind.INT16: ("int32_data", 2),
        kind.UINT16: ("int32_data", 2),
        kind.FLOAT16: ("int32_data", 2),
        kind.BFLOAT16: ("int32_data", 2),
    }
    field, itemsize = width.get(tensor.data_type, ("int32_data", 1))
    return field, nbytes // itemsize


def _compare(tensor: onnx.TensorProto, needed: int, found: int, unit: str) -> None:
    if needed != found:
        raise DataError(
            "DATA-TENSOR-SIZE",
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} needs {needed} {unit}, "
            f"it has {found}",
            _EXPORT_AGAIN,
        )


def refuse_sparse(model: onnx.ModelProto) -> None:
    """Refuse sparse tensors, which onnx_ir leaves out without a word."""
    found = any(graph.sparse_initializer for graph in walk_graphs(model))
    for nodes in [model.graph.node, *(function.node for function in model.functions)]:
        for node in walk_nodes(nodes):
            for attribute in node.attribute:
                found |= attribute.HasField("sparse_tensor") or bool(attribute.sparse_tensors)
    if found:
        raise UnsupportedError(
            "UNSUPPORTED-SPARSE",
            "the model has sparse tensors",
            "convert them to dense tensors first",
        )


def sort_nodes(model: onnx.ModelProto) -> None:
    """Bring the nodes of every graph into an order in which values are defined before use.

    Only graphs that are out of order are touched, and there the order changes as little as it can:
    of the nodes that are ready the first one listed comes first.
    """
    outer: set[str] = set()
    _sort_graph(model.graph, outer)
    for function in model.functions:
        _sort_body(function, {*function.input}, f"function {function.name!r}")


def _sort_graph(graph: onnx.GraphProto, outer: set[str]) -> None:
    known = {value.name for value in graph.input}
    known |= {tensor.name for tensor in graph.initializer}
    _sort_body(graph, outer | known, f"graph {graph.name!r}")


def _sort_body(body: onnx.GraphProto | onnx.FunctionProto, known: set[str], where: str) -> None:
    needs = [_reads(node) for node in body.node]
    maker = {name: i for i, node in enumerate(body.node) for name in node.output if name}
    order = _order(needs, maker, known, where)
    if order != list(range(len(needs))):
        nodes = [onnx.NodeProto() for _ in order]
        for copy, index in zip(nodes, order, strict=True):
            copy.CopyFrom(body.node[index])
        del body.node[:]
        body.node.extend(nodes)
    inner: set[str] | None = None
    for node in body.node:
        for graph in graphs_of_node(node):
            if inner is None:
                inner = known | maker.keys()
            _sort_graph(graph, inner)


def _order(
    needs: Sequence[set[str]], maker: dict[str, int], known: set[str], where: str
) -> list[int]:
    waits = [0] * len(needs)
    readers: list[list[int]] = [[] for _ in needs]
    for index, names in enumerate(needs):
        for name in names:
            if name in maker:
                waits[index] += 1
                readers[maker[name]].append(index)
            elif name not in known:
                raise DataError(
                    "DATA-UNDEFINED-VALUE",
                    f"{where} reads {name!r}, which nothing defines",
                    _EXPORT_AGAIN,
                )
    ready = [index for index, count in enumerate(waits) if not count]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(needs):
        raise DataError("DATA-CYCLE", f"{where} has nodes that wait for each other", _EXPORT_AGAIN)
    return order


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that ``node`` and its subgraphs read from the graph around it."""
    names = {name for name in node.input if name}
    for graph in graphs_of_node(node):
        own = {value.name for value in graph.input} | {t.name for t in graph.initializer}
        inside: set[str] = {value.name for value in graph.output}
        for inner in graph.node:
            own.update(inner.output)
            inside |= _reads(inner)
        names |= inside - own
    return names


def check_standard(model: onnx.ModelProto) -> None:
    """Run onnx's own checker, with the data of external tensors out of its sight.

    Functions are checked one by one: together with the model the checker wants both to import one
    opset, while onnxruntime inlines a function whatever opset its body is written for.
    """
    with _without_functions(model) as functions, _without_external(model, functions):
        try:
            onnx.checker.check_model(model)
            for function in functions:
                onnx.checker.check_function(function, _context(model, function))
        except Exception as error:
            cause = " ".join(str(error).split())[:400]
            raise DataError(
                "DATA-INVALID-MODEL", f"the model breaks the ONNX standard: {cause}", _EXPORT_AGAIN
            ) from error


def _context(model: onnx.ModelProto, function: onnx.FunctionProto) -> onnx.checker.C.CheckerContext:
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in function.opset_import}
    return context


@contextmanager
def _without_functions(model: onnx.ModelProto) -> Iterator[list[onnx.FunctionProto]]:
    functions = []
    for function in model.functions:
        functions.append(onnx.FunctionProto())
        functions[-1].CopyFrom(function)
    del model.functions[:]
    try:
        yield functions
    finally:
        model.functions.extend(functions)


@contextmanager
def _without_external(
    model: onnx.ModelProto, functions: Sequence[onnx.FunctionProto]
) -> Iterator[None]:
    """Show external tensors as empty ones, as the checker would follow their paths."""
    saved: list[tuple[onnx.TensorProto, onnx.TensorProto]] = []
    in_functions = (tensor for function in functions for tensor in function_tensors(function))
    for tensor in chain(walk_tensors(model), in_functions):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            saved.append((tensor, copy))
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            tensor.dims[:] = [0]
    try:
        yield
    finally:
        for tensor, copy in saved:
            tensor.CopyFrom(copy)
