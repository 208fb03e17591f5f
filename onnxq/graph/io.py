"""Guarded load and atomic save of ONNX models, their fingerprint and their provenance.

:func:`load` reads the graph and leaves large weights on the disk, whether they lie in external
data or inside the model file; every file is checked before it is opened (:mod:`.external`), and the
graph before it is handed on (:mod:`.check`). :func:`save` writes one tensor at a time and replaces
the output in one step (:mod:`.atomic`): the data file first, named by its content, the graph last.
Equal models give equal bytes: nothing that is written depends on the time, the machine or a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxq.errors import DataError, InternalError, OnnxqError, UnsupportedError
from onnxq.graph import check, wire
from onnxq.graph.atomic import (
    Temporary,
    check_target,
    locked_folder,
    reported,
    temporary_for,
)
from onnxq.graph.external import (
    COPY_CHUNK,
    MAX_EXTERNAL_BYTES,
    DataFile,
    ExternalEntry,
    FileTensor,
    check_location,
    describe_file,
    external_entry,
    guard_entries,
    tensor_nbytes,
)
from onnxq.graph.sniff import open_model_file, refuse_other_formats

MAX_MESSAGE_BYTES = (1 << 31) - (1 << 20)
"""Largest model written without external data; protobuf itself stops at 2 GiB."""

KEEP_INLINE_BYTES = 1 << 16
"""Weights inside a model file that are at least this large stay there until they are used."""

DATA_ALIGNMENT = 64
"""Alignment, in bytes, of every tensor in a data file: one cache line."""

PROVENANCE_PREFIX = "onnxq."

_PLACEHOLDER = "onnxq-placeholder-"
_SOURCE = "onnxq.source"
_EXTERNAL = "onnxq.external"
_TOO_LARGE_HINT = "lower the threshold so that more tensors go to the data file"

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class SavedModel:
    """What :func:`save` wrote.

    Attributes:
        path: the graph file.
        bytes: size of the graph file and the data file together.
        data_path: the data file, ``None`` when the weights are inside the graph file.
    """

    path: Path
    bytes: int
    data_path: Path | None


# --------------------------------------------------------------------------------------- load


def load(path: Path_, *, max_external_bytes: int = MAX_EXTERNAL_BYTES) -> ir.Model:
    """Read the ONNX model at ``path``; large weights stay on disk until they are used.

    Raises:
        DataError: the file is missing, not ONNX, damaged, or names external data that the guard
            refuses; the codes are listed in :mod:`.sniff`, :mod:`.external` and :mod:`.check`.
        UnsupportedError: the model is newer than the installed onnx, or uses sparse tensors,
            training info, or types that onnx_ir lacks.
    """
    source = Path(path)
    with open_model_file(source) as (descriptor, size):
        refuse_other_formats(source, descriptor, size)
        proto, weights = _parse(source, descriptor, size)
        real = Path(os.path.realpath(source))
        file = describe_file(descriptor, str(real.parent), real.name, is_model=True)
    try:
        model = _deserialize(proto, weights, file, str(source.parent), max_external_bytes)
    except OnnxqError as error:
        raise type(error)(
            error.code, f"{source}: {error.cause}", error.hint, **error.details
        ) from error
    except NotImplementedError as error:
        raise UnsupportedError(
            "UNSUPPORTED-FEATURE",
            f"{source} uses what onnx_ir does not read: {_first_line(error)}",
            "export the model without it",
        ) from error
    except Exception as error:
        raise DataError(
            "DATA-INVALID-MODEL",
            f"{source} is not a valid model: {_first_line(error)}",
            "the model is damaged or was exported wrongly; export it again",
        ) from error
    model.meta[_SOURCE] = str(real)
    return model


def _parse(
    source: Path, descriptor: int, size: int
) -> tuple[onnx.ModelProto, Sequence[wire.Weight]]:
    weights: Sequence[wire.Weight] = ()
    try:
        try:
            skeleton, weights = wire.scan_model(descriptor, size, KEEP_INLINE_BYTES)
        except wire.Unusual:
            skeleton = _read_whole(source, descriptor, size)
        proto = onnx.ModelProto()
        proto.ParseFromString(skeleton)
    except wire.Truncated as error:
        raise DataError(
            "DATA-TRUNCATED",
            f"{source} is incomplete: {error}",
            "copy, download or export it again",
        ) from error
    except wire.Malformed as error:
        raise DataError(
            "DATA-NOT-ONNX", f"{source} is not an ONNX model: {error}", "give a model in ONNX format"
        ) from error
    except DecodeError as error:
        raise DataError(
            "DATA-CORRUPT",
            f"{source} is damaged inside: {_first_line(error)}",
            "copy, download or export it again",
        ) from error
    return proto, weights


def _read_whole(source: Path, descriptor: int, size: int) -> bytes:
    if size > MAX_MESSAGE_BYTES:
        raise DataError(
            "DATA-CORRUPT", f"{source} has no single graph, and is above 2 GiB", "export it again"
        )
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read(size)


def _deserialize(
    proto: onnx.ModelProto,
    weights: Sequence[wire.Weight],
    file: DataFile,
    folder: str,
    max_external_bytes: int,
) -> ir.Model:
    check.check_header(proto)
    check.refuse_sparse(proto)
    check.check_functions(proto)
    lazy, entries = _check_tensors(proto, weights, file)
    files = guard_entries(entries, folder or ".", max_total=max_external_bytes)
    check.sort_nodes(proto)
    check.check_standard(proto)
    model = ir.from_proto(proto)
    for holder, tensor in _external_slots(model):
        index = os.fspath(tensor.location).removeprefix(_PLACEHOLDER)
        place = lazy[int(index)]
        if isinstance(place, wire.Weight):
            owner, offset, external = file, place.offset, False
        else:
            owner, offset, external = files[place.location], place.offset, True
        holder(_file_tensor(tensor, owner, offset, external=external))
    if files:
        model.meta[_EXTERNAL] = True
    return model


def _check_tensors(
    proto: onnx.ModelProto, weights: Sequence[wire.Weight], file: DataFile
) -> tuple[list[wire.Weight | ExternalEntry], list[tuple[str, ExternalEntry]]]:
    """Check every tensor, and number those whose bytes are elsewhere: the location becomes i."""
    cut = {weight.index: weight for weight in weights}
    lazy: list[wire.Weight | ExternalEntry] = []
    entries: list[tuple[str, ExternalEntry]] = []
    for index, tensor in enumerate(check.walk_tensors(proto)):  # the main graph's come first
        weight = cut.get(index)
        if weight is not None:
            _check_cut(tensor, weight)
            lazy.append(weight)
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = external_entry(tensor, tensor_nbytes(tensor))
            entries.append((tensor.name, entry))
            lazy.append(entry)
        else:
            check.check_tensor(tensor)
            continue
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{_PLACEHOLDER}{len(lazy) - 1}")
    return lazy, entries


def _check_cut(tensor: onnx.TensorProto, weight: wire.Weight) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise DataError(
            "DATA-INVALID-MODEL",
            f"tensor {tensor.name!r} has data both inside and outside the model",
            "export the model again",
        )
    nbytes = tensor_nbytes(tensor)
    if nbytes != weight.length:
        raise DataError(
            "DATA-TENSOR-SIZE",
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} needs {nbytes} bytes, "
            f"it has {weight.length}",
            "the model is damaged; export it again",
        )


def _file_tensor(
    tensor: ir.ExternalTensor, file: DataFile, offset: int, *, external: bool
) -> FileTensor:
    return FileTensor(
        file,
        offset,
        tensor.dtype,
        tensor.shape,
        name=tensor.name,
        external=external,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
    )


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # onnx_ir wraps the reason in the place, several times
        error = error.__cause__
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]


# ------------------------------------------------------------------------- walks over tensors

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


def _external_slots(model: ir.Model) -> list[tuple[Setter, ir.ExternalTensor]]:
    return [
        (replace, tensor)
        for replace, tensor, _ in tensor_slots(model)
        if isinstance(tensor, ir.ExternalTensor)
    ]


def copy_model(model: ir.Model) -> ir.Model:
    """A copy with graphs, nodes, values and metadata of its own; the tensors are shared."""
    copy = model.clone()
    copy.meta.update(model.meta)
    return copy


# --------------------------------------------------------------------------------------- save


def save(
    model: ir.Model,
    path: Path_,
    *,
    source: Path_ | None = None,
    external: bool | None = None,
    threshold: int = 1024,
) -> SavedModel:
    """Write ``model`` to ``path`` in one step; a failure leaves the old file as it was.

    Args:
        model: the model; it is not changed.
        path: the output. A link at this place is replaced, not followed.
        source: the input, when the model does not come from :func:`load`, which remembers it.
        external: put the weights in a file of their own, ``<stem>.<hash>.data``. Default: when the
            model was loaded from such files, or is too large for one.
        threshold: initializers below this many bytes stay in the graph file.

    Raises:
        DataError: the output is the input, a folder or not writable, or the disk is full.
    """
    target = Path(path)
    _refuse_inputs(model, target, source)
    check_target(target)
    if external is None:
        external = bool(model.meta.get(_EXTERNAL)) or _nbytes(model) > MAX_MESSAGE_BYTES
    with reported(target):
        if external:
            return _save_external(model, target, threshold)
        return _save_internal(model, target)


def _refuse_inputs(model: ir.Model, target: Path, source: Path_ | None) -> None:
    inputs = [] if source is None else [Path(source)]
    if _SOURCE in model.meta:
        inputs.append(Path(model.meta[_SOURCE]))
    inputs += sorted({file.path for file in _files(model)})
    for known in inputs:
        with suppress(OSError):
            if os.path.samefile(known, target):
                raise DataError(
                    "DATA-OUTPUT-IS-INPUT",
                    f"the output {target} is the input {known}",
                    "write to another file; the input is never overwritten",
                )


def _files(model: ir.Model) -> set[DataFile]:
    return {tensor.file for _, tensor, _ in tensor_slots(model) if isinstance(tensor, FileTensor)}


def _nbytes(model: ir.Model) -> int:
    return sum(tensor.nbytes for _, tensor, _ in tensor_slots(model) if not _is_text(tensor))


def _is_text(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype == ir.DataType.STRING


def _skeleton(
    model: ir.Model, take: Callable[[ir.TensorProtocol, bool], bool]
) -> tuple[onnx.ModelProto, list[ir.TensorProtocol]]:
    """The model as protobuf without the tensors that ``take`` chooses, and those tensors.

    In the protobuf the i-th of them is an external tensor at ``_PLACEHOLDER`` i.
    """
    copy = copy_model(model)
    taken: list[ir.TensorProtocol] = []
    for replace, tensor, is_initializer in list(tensor_slots(copy)):
        if _is_text(tensor) or not take(tensor, is_initializer):
            continue
        stand_in = ir.ExternalTensor(
            f"{_PLACEHOLDER}{len(taken)}",
            None,
            None,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        replace(stand_in)
        taken.append(tensor)
    return ir.to_proto(copy), taken


def _placeholders(
    tensors: Iterable[onnx.TensorProto],
) -> Iterator[tuple[onnx.TensorProto, int | None]]:
    for tensor in tensors:
        location = tensor.external_data[0].value if tensor.external_data else ""
        is_ours = location.startswith(_PLACEHOLDER)
        yield tensor, int(location.removeprefix(_PLACEHOLDER)) if is_ours else None


def _inline(
    model: ir.Model,
) -> tuple[onnx.ModelProto, list[ir.TensorProtocol | None]]:
    """The skeleton for :func:`.wire.write_model`: only large weights of the main graph streamed."""
    main = {id(value.const_value) for value in model.graph.initializers.values()}
    proto, taken = _skeleton(
        model,
        lambda tensor, is_initializer: (
            is_initializer and tensor.nbytes >= KEEP_INLINE_BYTES and id(tensor) in main
        ),
    )
    streamed: list[ir.TensorProtocol | None] = []
    for tensor, index in _placeholders(proto.graph.initializer):
        streamed.append(None if index is None else taken[index])
        if index is not None:
            _clear_external(tensor)
    for tensor, index in _placeholders(check.walk_tensors(proto)):
        if index is not None:  # a tensor of the main graph that a subgraph shares
            _clear_external(tensor)
            tensor.raw_data = taken[index].tobytes()
    return proto, streamed


def _clear_external(tensor: onnx.TensorProto) -> None:
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def _save_internal(model: ir.Model, target: Path) -> SavedModel:
    proto, streamed = _inline(model)
    size = wire.model_size(proto, streamed)
    if size > MAX_MESSAGE_BYTES:
        raise UnsupportedError(
            "UNSUPPORTED-TOO-LARGE",
            f"the model needs {size} bytes; a file without external data holds below 2 GiB",
            "save it with external data",
        )
    with temporary_for(target) as graph:
        wire.write_model(graph.file, proto, streamed)
        graph.flush()
        with locked_folder(target.parent):
            graph.put_in_place()
            _remove_old_data(target, keep=None, model=model)
    return SavedModel(target, target.stat().st_size, None)


def _save_external(model: ir.Model, target: Path, threshold: int) -> SavedModel:
    proto, taken = _skeleton(
        model, lambda tensor, is_initializer: is_initializer and tensor.nbytes >= threshold
    )
    if proto.ByteSize() > MAX_MESSAGE_BYTES:
        raise UnsupportedError(
            "UNSUPPORTED-TOO-LARGE", "the graph alone is above 2 GiB", _TOO_LARGE_HINT
        )
    if not taken:
        return _save_internal(model, target)
    with temporary_for(target) as data, temporary_for(target) as graph:
        digest, offsets = _write_data(data.file, taken)
        data_path = target.with_name(f"{target.stem}.{digest[:12]}.data")
        for tensor, index in _placeholders(check.walk_tensors(proto)):
            if index is not None:
                _point_at(tensor, data_path.name, offsets[index], taken[index].nbytes)
        graph.file.write(proto.SerializeToString(deterministic=True))
        data.flush()
        graph.flush()
        with locked_folder(target.parent):
            _commit(data, data_path, graph)
            _remove_old_data(target, keep=data_path, model=model)
    return SavedModel(target, target.stat().st_size + data_path.stat().st_size, data_path)


def _commit(data: Temporary, data_path: Path, graph: Temporary) -> None:
    """Data first, graph last; if the graph cannot follow, the data goes again."""
    check_target(data_path)
    existed = data_path.exists()
    try:
        data.put_in_place(data_path)
        graph.put_in_place()
    except BaseException:
        if not existed and graph.path.exists():
            data_path.unlink(missing_ok=True)
        raise


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.position = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        if self._file is not None:
            self._file.write(data)
        self.position += memoryview(data).nbytes
        return memoryview(data).nbytes

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _write_data(file: IO[bytes], tensors: Sequence[ir.TensorProtocol]) -> tuple[str, list[int]]:
    """Write the tensors one after the other; the same tensor is written once.

    Returns the SHA-256 of the file and, for each tensor, where its bytes start.
    """
    out = _Hashed(file)
    known: dict[int, int] = {}
    offsets = []
    for tensor in tensors:
        if id(tensor) not in known:
            out.write(bytes(-out.position % DATA_ALIGNMENT))
            known[id(tensor)] = out.position
            _write_tensor(tensor, out)
        offsets.append(known[id(tensor)])
    return out.hexdigest(), offsets


def _write_tensor(tensor: ir.TensorProtocol, out: Any) -> None:
    if isinstance(tensor, FileTensor):
        tensor.tofile(out)
    else:
        out.write(tensor.tobytes())


def _point_at(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _remove_old_data(target: Path, *, keep: Path | None, model: ir.Model) -> None:
    """Remove data files that earlier saves to ``target`` left and that nothing uses any more.

    A file is ours when its name carries the hash of its content; it is used when the model in
    hand reads from it or another model in the folder names it.
    """
    pattern = re.compile(re.escape(target.stem) + r"\.([0-9a-f]{12})\.data")
    in_use = {(file.device, file.inode) for file in _files(model)}
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or entry == keep or entry.is_symlink() or not entry.is_file():
            continue
        info = entry.stat()
        if (info.st_dev, info.st_ino) in in_use or _is_named(entry.name, target.parent):
            continue
        if file_hash(entry).startswith(match[1]):
            entry.unlink()


def _is_named(location: str, folder: Path) -> bool:
    """Whether a model in ``folder`` has the name of this data file in it."""
    needle = location.encode()
    for model in folder.glob("*.onnx"):
        tail = b""
        with suppress(OSError), model.open("rb") as file:
            while block := file.read(COPY_CHUNK):
                if needle in tail + block:
                    return True
                tail = block[-len(needle) :]
    return False


# --------------------------------------------------------------------- serialized, fingerprint


def serialized(model: ir.Model) -> bytes:
    """The model as one protobuf message with all weights inside; the bytes :func:`save` writes."""
    import io

    proto, streamed = _inline(model)
    size = wire.model_size(proto, streamed)
    if size > MAX_MESSAGE_BYTES:
        raise UnsupportedError(
            "UNSUPPORTED-TOO-LARGE",
            f"the model needs {size} bytes; one message holds below 2 GiB",
            "use session_source, which goes through a temporary file",
        )
    out = io.BytesIO()
    wire.write_model(out, proto, streamed)
    return out.getvalue()


@contextmanager
def session_source(model: ir.Model, *, limit: int = 1 << 28) -> Iterator[bytes | str]:
    """What ``onnxruntime.InferenceSession`` takes: bytes, or above ``limit`` a temporary file.

    Create the session inside the ``with`` block; the file is gone after it.
    """
    if _nbytes(model) <= limit:
        yield serialized(model)
        return
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        yield str(save(model, Path(folder, "model.onnx"), external=True).path)


def fingerprint(model: ir.Model) -> str:
    """SHA-256, in hex, of the graph's structure and weights.

    It does not depend on where or in which field the weights are stored, nor on documentation,
    metadata or the producer's name; it does on every name, type, shape, attribute and number.
    """
    proto, tensors = _skeleton(model, lambda tensor, is_initializer: True)
    hashes: dict[int, str] = {}
    for tensor in tensors:
        if id(tensor) not in hashes:
            hashes[id(tensor)] = _tensor_hash(tensor)
    for tensor, index in _placeholders(check.walk_tensors(proto)):
        if index is not None:
            tensor.external_data[0].value = hashes[id(tensors[index])]
    for field in ("producer_name", "producer_version", "model_version", "domain"):
        proto.ClearField(field)
    _strip_notes(proto)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def _tensor_hash(tensor: ir.TensorProtocol) -> str:
    out = _Hashed()
    _write_tensor(tensor, out)
    return out.hexdigest()


def _strip_notes(message: Any) -> None:
    """Remove documentation and metadata from a message and all messages in it."""
    for note in ("doc_string", "metadata_props"):
        if note in message.DESCRIPTOR.fields_by_name:
            message.ClearField(note)
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                _strip_notes(part)


def file_hash(path: Path_) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_on_disk(path: Path_) -> int:
    """Bytes of a model file and of the external data files that it names."""
    source = Path(path)
    with open_model_file(source) as (descriptor, size):
        refuse_other_formats(source, descriptor, size)
        proto, _ = _parse(source, descriptor, size)
    locations = set()
    for tensor in check.walk_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            locations.add(check_location(fields.get("location", "")))
    total = size
    for location in locations:
        try:
            total += source.parent.joinpath(location).lstat().st_size
        except OSError as error:
            raise DataError(
                "DATA-EXTERNAL-MISSING",
                f"external data {str(location)!r} does not exist in {source.parent}",
                "copy the data file together with the model",
            ) from error
    return total


# --------------------------------------------------------------------------------- provenance


def set_provenance(model: ir.Model, facts: Mapping[str, Any]) -> None:
    """Write ``facts`` into the model's metadata as ``onnxq.<key>``, in place of older ones.

    The values are stored as JSON with sorted keys; keep times, host names and paths out of them,
    as equal runs must give equal bytes.
    """
    encoded = {
        PROVENANCE_PREFIX + key: json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        for key, value in sorted(facts.items())
    }
    others = {
        key: value
        for key, value in model.metadata_props.items()
        if not key.startswith(PROVENANCE_PREFIX)
    }
    model.metadata_props.clear()
    model.metadata_props.update(others)
    model.metadata_props.update(encoded)


def get_provenance(model: ir.Model) -> dict[str, Any]:
    """The facts that :func:`set_provenance` wrote; a value that is not JSON stays a string."""
    facts: dict[str, Any] = {}
    for key, text in sorted(model.metadata_props.items()):
        if key.startswith(PROVENANCE_PREFIX):
            try:
                facts[key.removeprefix(PROVENANCE_PREFIX)] = json.loads(text)
            except ValueError:
                facts[key.removeprefix(PROVENANCE_PREFIX)] = text
    return facts
