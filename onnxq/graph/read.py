"""Read an ONNX model: check the file, the graph and its external data, leave weights on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxq.errors import DataError, OnnxqError, UnsupportedError
from onnxq.graph import check, wire
from onnxq.graph.external import (
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
from onnxq.graph.tensors import EXTERNAL, PLACEHOLDER, SOURCE, external_slots

KEEP_INLINE_BYTES = 1 << 16
"""Weights inside a model file that are at least this large stay there until they are used."""


def load(path: str | os.PathLike[str], *, max_external_bytes: int = MAX_EXTERNAL_BYTES) -> ir.Model:
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
    except Exception as error:
        raise _unreadable(source, error) from error
    model.meta[SOURCE] = str(real)
    return model


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """A copy of a model in memory, checked as :func:`load` checks a file.

    Raises:
        DataError: ``DATA-EXTERNAL-PATH``: weights lie in files whose folder nobody knows; and the
            codes of :mod:`.check`.
        UnsupportedError: as :func:`load`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    check.check_header(copy)
    check.refuse_sparse(copy)
    check.check_functions(copy)
    for tensor in check.walk_tensors(copy):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise DataError(
                "DATA-EXTERNAL-PATH",
                f"the weight {tensor.name!r} of a model in memory lies in a file",
                "give the model's path, or load the weights with it",
            )
        check.check_tensor(tensor)
    check.sort_nodes(copy)
    check.check_standard(copy)
    try:
        return ir.from_proto(copy)
    except Exception as error:
        raise _unreadable(Path("the model in memory"), error) from error


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
            "DATA-NOT-ONNX",
            f"{source} is not an ONNX model: {error}",
            "give a model in ONNX format",
        ) from error
    except DecodeError as error:
        raise DataError(
            "DATA-CORRUPT",
            f"{source} is damaged inside: {_first_line(error)}",
            "copy, download or export it again",
        ) from error
    return proto, weights


def _read_whole(source: Path, descriptor: int, size: int) -> bytes:
    if size >= 1 << 31:
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
    lazy, entries = _check_tensors(proto, weights)
    files = guard_entries(entries, folder or ".", max_total=max_external_bytes)
    check.sort_nodes(proto)
    check.check_standard(proto)
    model = ir.from_proto(proto)
    ir.to_proto(model)  # what cannot be written back is refused now, not after an hour of work
    for holder, tensor in external_slots(model):
        index = os.fspath(tensor.location).removeprefix(PLACEHOLDER)
        place = lazy[int(index)]
        if isinstance(place, wire.Weight):
            owner, offset, external = file, place.offset, False
        else:
            owner, offset, external = files[place.location], place.offset, True
        holder(_file_tensor(tensor, owner, offset, external=external))
    if files:
        model.meta[EXTERNAL] = True
    return model


def _check_tensors(
    proto: onnx.ModelProto, weights: Sequence[wire.Weight]
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
        tensor.external_data.add(key="location", value=f"{PLACEHOLDER}{len(lazy) - 1}")
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


def _unreadable(source: Path, error: Exception) -> OnnxqError:
    if isinstance(_root(error), NotImplementedError):
        return UnsupportedError(
            "UNSUPPORTED-FEATURE",
            f"{source} uses what onnx_ir does not read: {_first_line(error)}",
            "export the model without it",
        )
    return DataError(
        "DATA-INVALID-MODEL",
        f"{source} is not a valid model: {_first_line(error)}",
        "the model is damaged or was exported wrongly; export it again",
    )


def _root(error: BaseException) -> BaseException:
    """The first cause; onnx_ir wraps it in the places that it went through."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    root = _root(error)
    return (" ".join(str(root).split()) or type(root).__name__)[:300]


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """Bytes of a model file and of the external data files that it names."""
    source = Path(path)
    files, total = _files_of(source)
    for file in files:
        try:
            total += file.lstat().st_size
        except OSError as error:
            raise DataError(
                "DATA-EXTERNAL-MISSING",
                f"external data {str(file.relative_to(source.parent))!r} does not exist in "
                f"{source.parent}",
                "copy the data file together with the model",
            ) from error
    return total


def data_files(path: str | os.PathLike[str]) -> list[Path]:
    """The external data files that a model names, whether they exist or not."""
    return _files_of(Path(path))[0]


def _files_of(source: Path) -> tuple[list[Path], int]:
    """The external data files that a model names, and the size of the model file itself."""
    with open_model_file(source) as (descriptor, size):
        refuse_other_formats(source, descriptor, size)
        proto, _ = _parse(source, descriptor, size)
    locations = set()
    for tensor in check.walk_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            fields = {entry.key: entry.value for entry in tensor.external_data}
            locations.add(check_location(fields.get("location", "")))
    return [source.parent.joinpath(location) for location in sorted(locations)], size
