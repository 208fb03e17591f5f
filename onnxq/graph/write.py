"""Write an ONNX model, one tensor at a time, and replace the output in one step."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir

from onnxq.errors import DataError, UnsupportedError
from onnxq.graph import check, wire
from onnxq.graph.atomic import (
    Temporary,
    check_target,
    locked_folder,
    reported,
    temporary_for,
)
from onnxq.graph.external import COPY_CHUNK
from onnxq.graph.identity import HashedFile, file_hash
from onnxq.graph.read import KEEP_INLINE_BYTES
from onnxq.graph.tensors import (
    EXTERNAL,
    SOURCE,
    Streamed,
    files_of,
    model_nbytes,
    placeholders,
    skeleton,
)

MAX_MESSAGE_BYTES = (1 << 31) - (1 << 20)
"""Largest model written without external data; protobuf itself stops at 2 GiB."""

DATA_ALIGNMENT = 64
"""Alignment, in bytes, of every tensor in a data file: one cache line."""

_TOO_LARGE_HINT = "lower the threshold so that more tensors go to the data file"


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


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
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
        external = bool(model.meta.get(EXTERNAL)) or model_nbytes(model) > MAX_MESSAGE_BYTES
    with reported(target):
        if external:
            return _save_external(model, target, threshold)
        return _save_internal(model, target)


def _refuse_inputs(model: ir.Model, target: Path, source: str | os.PathLike[str] | None) -> None:
    inputs = [] if source is None else [Path(source)]
    if SOURCE in model.meta:
        inputs.append(Path(model.meta[SOURCE]))
    inputs += sorted({file.path for file in files_of(model)})
    for known in inputs:
        with suppress(OSError):
            if known.samefile(target):
                raise DataError(
                    "DATA-OUTPUT-IS-INPUT",
                    f"the output {target} is the input {known}",
                    "write to another file; the input is never overwritten",
                )


def _inline(
    model: ir.Model,
) -> tuple[onnx.ModelProto, list[Streamed | None]]:
    """The skeleton for :func:`.wire.write_model`: only large weights of the main graph streamed."""
    main = {id(value.const_value) for value in model.graph.initializers.values()}
    proto, taken = skeleton(
        model,
        lambda tensor, is_initializer: (
            is_initializer and tensor.nbytes >= KEEP_INLINE_BYTES and id(tensor) in main
        ),
    )
    streamed: list[Streamed | None] = []
    for tensor, index in placeholders(proto.graph.initializer):
        streamed.append(None if index is None else Streamed(taken[index]))
        if index is not None:
            _clear_external(tensor)
    for tensor, index in placeholders(check.walk_tensors(proto)):
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
        size = graph.file.tell()
        with locked_folder(target.parent):
            graph.put_in_place()
            _remove_old_data(target, keep=None, model=model)
    return SavedModel(target, size, None)


def _save_external(model: ir.Model, target: Path, threshold: int) -> SavedModel:
    proto, taken = skeleton(
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
        for tensor, index in placeholders(check.walk_tensors(proto)):
            if index is not None:
                _point_at(tensor, data_path.name, offsets[index], taken[index].nbytes)
        graph.file.write(proto.SerializeToString(deterministic=True))
        data.flush()
        graph.flush()
        size = data.file.tell() + graph.file.tell()
        with locked_folder(target.parent):
            _commit(data, data_path, digest, graph)
            _remove_old_data(target, keep=data_path, model=model)
    return SavedModel(target, size, data_path)


def _commit(data: Temporary, data_path: Path, digest: str, graph: Temporary) -> None:
    """Data first, graph last; if the graph cannot follow, the data goes again."""
    check_target(data_path)
    existed = data_path.exists()
    try:
        if not _is_same(data_path, digest):
            data.put_in_place(data_path)
        graph.put_in_place()
    except BaseException:
        if not existed and graph.path.exists():
            data_path.unlink(missing_ok=True)
        raise


def _is_same(data_path: Path, digest: str) -> bool:
    """Whether the data file is there already: an equal save, or one that stopped before its graph.

    It is then left alone, as the model in hand may be reading it.
    """
    if data_path.is_symlink() or not data_path.is_file() or data_path.stat().st_nlink != 1:
        return False
    return file_hash(data_path) == digest


def _write_data(file: IO[bytes], tensors: Sequence[ir.TensorProtocol]) -> tuple[str, list[int]]:
    """Write the tensors one after the other; the same tensor is written once.

    Returns the SHA-256 of the file and, for each tensor, where its bytes start.
    """
    out = HashedFile(file)
    known: dict[int, int] = {}
    offsets = []
    for tensor in tensors:
        if id(tensor) not in known:
            out.write(bytes(-out.position % DATA_ALIGNMENT))
            known[id(tensor)] = out.position
            Streamed(tensor).tofile(out)
        offsets.append(known[id(tensor)])
    return out.hexdigest(), offsets


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
    in_use = {(file.device, file.inode) for file in files_of(model)}
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


def serialized(model: ir.Model) -> bytes:
    """The model as one protobuf message with all weights inside; the bytes :func:`save` writes."""
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
    if model_nbytes(model) <= limit:
        yield serialized(model)
        return
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        yield str(save(model, Path(folder, "model.onnx"), external=True).path)
