"""Where a model keeps its tensors: walk them, swap them, take them out for streaming."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxq.errors import InternalError
from onnxq.graph.external import DataFile, FileTensor
from onnxq.graph.wire import Sink

PLACEHOLDER = "onnxq-placeholder-"
"""Start of the location of a tensor that stands in a skeleton for the i-th one taken out."""

SOURCE = "onnxq.source"
"""Key in ``model.meta``: the resolved path of the file that the model was loaded from."""

EXTERNAL = "onnxq.external"
"""Key in ``model.meta``: the model was loaded with external data, so it is saved with it."""

Setter = Callable[[ir.TensorProtocol], None]


def _all_nodes_and_graphs(model: ir.Model) -> Iterator[tuple[ir.Graph, Iterable[ir.Node]]]:
    roots = [model.graph, *(function.graph for function in model.functions.values())]
    for root in roots:
        yield root, root
        for graph in root.subgraphs():
            if graph is not root:
                yield graph, graph


def tensor_slots(model: ir.Model) -> Iterator[tuple[Setter, ir.TensorProtocol, bool]]:
    """Every place that holds a tensor: a function that replaces it, the tensor, and whether it is
    an initializer (else a node attribute), in a fixed order, subgraphs and functions included.
    """
    for graph, nodes in _all_nodes_and_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is None:
                raise InternalError(
                    "INTERNAL-EMPTY-INITIALIZER", f"initializer {value.name!r} has no tensor"
                )
            yield _value_setter(value), value.const_value, True
        for node in nodes:
            for attribute in list(node.attributes.values()):
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield _attribute_setter(node, attribute), attribute.as_tensor(), False
                elif attribute.type == ir.AttributeType.TENSORS:
                    for index, tensor in enumerate(attribute.as_tensors()):
                        yield _list_setter(node, attribute.name, index), tensor, False


def _value_setter(value: ir.Value) -> Setter:
    def replace(tensor: ir.TensorProtocol) -> None:
        value.const_value = tensor

    return replace


def _attribute_setter(node: ir.Node, attribute: ir.Attr) -> Setter:
    def replace(tensor: ir.TensorProtocol) -> None:
        node.attributes[attribute.name] = ir.AttrTensor(
            attribute.name, tensor, doc_string=attribute.doc_string
        )

    return replace


def _list_setter(node: ir.Node, name: str, index: int) -> Setter:
    def replace(tensor: ir.TensorProtocol) -> None:
        old = node.attributes[name]
        tensors = list(old.as_tensors())
        tensors[index] = tensor
        node.attributes[name] = ir.AttrTensors(name, tensors, doc_string=old.doc_string)

    return replace


def external_slots(model: ir.Model) -> list[tuple[Setter, ir.ExternalTensor]]:
    """The slots of :func:`tensor_slots` whose tensor is a plain onnx_ir external tensor."""
    return [
        (replace, tensor)
        for replace, tensor, _ in tensor_slots(model)
        if isinstance(tensor, ir.ExternalTensor)
    ]


def copy_model(model: ir.Model) -> ir.Model:
    """A copy with graphs, nodes, values and metadata of its own; the tensors are shared."""
    try:
        copied = model.clone()
    except Exception as error:
        raise InternalError(
            "INTERNAL-INVALID-GRAPH",
            f"the graph is not consistent: {' '.join(str(error).split())[:300]}",
            "a pass left it broken; find it with --bisect and report it",
        ) from error
    copied.meta.update(model.meta)
    return copied


def copy_to_edit(model: ir.Model) -> ir.Model:
    """As :func:`copy_model`, with tensors of its own too; their elements are shared.

    Values name their tensors, so passes on a plain copy would rename those of the original. Two
    places that hold one tensor still do so in the copy.
    """
    copied = copy_model(model)
    copies: dict[int, tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}
    for replace, tensor, _ in list(tensor_slots(copied)):
        _, own = copies.setdefault(id(tensor), (tensor, _renamable(tensor)))
        replace(own)
    return copied


def _renamable(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same elements under a name of its own."""
    return _as_raw(tensor) if isinstance(tensor, ir.TensorProtoTensor) else copy.copy(tensor)


def _as_raw(tensor: ir.TensorProtoTensor) -> ir.TensorProtocol:
    """The same elements, not bound to a message: written as raw bytes, and free to be renamed."""
    return ir.LazyTensor(
        lambda: tensor,
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def files_of(model: ir.Model) -> set[DataFile]:
    """The files that the model's tensors are read from."""
    return {tensor.file for _, tensor, _ in tensor_slots(model) if isinstance(tensor, FileTensor)}


def model_nbytes(model: ir.Model) -> int:
    """Bytes of all tensors together, strings not counted."""
    return sum(tensor.nbytes for _, tensor, _ in tensor_slots(model) if not is_text(tensor))


def is_text(tensor: ir.TensorProtocol) -> bool:
    """Whether the elements are strings, which have no raw bytes."""
    return tensor.dtype == ir.DataType.STRING


def skeleton(
    model: ir.Model, take: Callable[[ir.TensorProtocol, bool], bool]
) -> tuple[onnx.ModelProto, list[ir.TensorProtocol]]:
    """The model as protobuf without the tensors that ``take`` chooses, and those tensors.

    In the protobuf the i-th of them is an external tensor at ``PLACEHOLDER`` i.
    """
    copy = copy_model(model)
    taken: list[ir.TensorProtocol] = []
    for replace, tensor, is_initializer in list(tensor_slots(copy)):
        if is_text(tensor):
            continue
        if not take(tensor, is_initializer):
            if isinstance(tensor, ir.TensorProtoTensor):
                # Elements in typed fields or as raw bytes: equal models are written alike.
                replace(_as_raw(tensor))
            continue
        stand_in = ir.ExternalTensor(
            f"{PLACEHOLDER}{len(taken)}",
            None,
            None,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        replace(stand_in)
        taken.append(tensor)
    return ir.to_proto(copy), taken


def placeholders(
    tensors: Iterable[onnx.TensorProto],
) -> Iterator[tuple[onnx.TensorProto, int | None]]:
    """Each tensor, with the number of the one that :func:`skeleton` took out for it, if any."""
    for tensor in tensors:
        location = tensor.external_data[0].value if tensor.external_data else ""
        is_ours = location.startswith(PLACEHOLDER)
        yield tensor, int(location.removeprefix(PLACEHOLDER)) if is_ours else None


@dataclass(frozen=True)
class Streamed:
    """A tensor as a stream of raw bytes, of which a file-backed one holds a chunk at a time."""

    tensor: ir.TensorProtocol

    @property
    def nbytes(self) -> int:
        """Bytes that :meth:`tofile` writes."""
        return self.tensor.nbytes

    def tofile(self, file: Sink) -> None:
        """Write the raw little-endian bytes."""
        if isinstance(self.tensor, FileTensor):
            self.tensor.tofile(file)
        else:
            file.write(self.tensor.tobytes())
