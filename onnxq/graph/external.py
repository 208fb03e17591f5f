"""Weights that stay on disk, and the guard in front of every file that a model names.

A model file is untrusted input: its ``external_data`` entries are paths that somebody else chose.
:func:`open_guarded` opens such a path only when it is a plain file, in the model's folder, reached
through no link of any kind; :class:`DataFile` remembers which file was checked, and refuses to read
a different one later; :class:`FileTensor` reads its bytes through that door on every use, so that a
model costs no memory for weights that no pass looks at.

=============================  ====================================================================
code                           the model's external data ...
=============================  ====================================================================
DATA-EXTERNAL-PATH             has an empty, absolute or ``..`` path, or one with odd characters
DATA-EXTERNAL-MISSING          does not exist
DATA-EXTERNAL-LINK             is a symbolic link, lies below one, or has several hard links
DATA-EXTERNAL-NOT-REGULAR      is a folder, FIFO, device or socket
DATA-EXTERNAL-FIELDS           has a malformed offset, length or key
DATA-EXTERNAL-RANGE            reaches past the end of its file
DATA-EXTERNAL-LENGTH           has a length that is not the size of the tensor
DATA-EXTERNAL-TOTAL            is larger, all tensors together, than the cap
DATA-EXTERNAL-UNREADABLE       cannot be opened for another reason
DATA-FILE-CHANGED              was changed or replaced after the model was loaded
=============================  ====================================================================
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxq.errors import DataError, UnsupportedError
from onnxq.graph.wire import Sink

MAX_EXTERNAL_BYTES = 1 << 37
"""Default cap on the bytes of all external tensors of a model together: 128 GiB."""

COPY_CHUNK = 1 << 23
"""Bytes that a streaming copy holds in memory at once: 8 MiB."""

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LINK_HINT = "put the data file itself, not a link, beside the model (for example with `cp -L`)"


@dataclass(frozen=True)
class DataFile:
    """A file that passed the guard, identified so that a later swap is noticed.

    Attributes:
        folder: the folder of the model; the guard lets nothing outside it be opened.
        location: path relative to ``folder``, with ``/`` between its parts.
        device, inode, size, mtime_ns: what ``fstat`` said when the guard let the file pass.
        is_model: the file is the model itself, whose path the user gave, so that it may be a link.
    """

    folder: str
    location: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    is_model: bool = False

    @property
    def path(self) -> Path:
        """The file's path."""
        return Path(self.folder, self.location)

    @contextmanager
    def open(self) -> Iterator[int]:
        """Open the file again; raises ``DATA-FILE-CHANGED`` when it is not the one checked."""
        try:
            if self.is_model:
                descriptor = os.open(self.path, _OPEN_FLAGS)
            else:
                descriptor = open_guarded(self.folder, self.location)
        except OSError as error:
            raise self._changed() from error
        try:
            self._compare(os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)

    def _compare(self, now: os.stat_result) -> None:
        seen = (self.device, self.inode, self.size, self.mtime_ns)
        if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != seen:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(
            "DATA-FILE-CHANGED",
            f"{self.path} was changed, replaced or removed while the model was in use",
            "run again, and leave the input files alone while it runs",
        )


def describe_file(
    descriptor: int, folder: str, location: str, *, is_model: bool = False
) -> DataFile:
    """The :class:`DataFile` of an open descriptor."""
    info = os.fstat(descriptor)
    return DataFile(
        folder, location, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, is_model
    )


def check_location(location: str) -> PurePosixPath:
    """Check the text of an external-data path, before the file system is asked anything."""
    path = PurePosixPath(location)
    bad = (
        not path.parts
        or path.is_absolute()
        or ".." in path.parts
        or any(ord(letter) < 32 or letter in "\\:" for letter in location)
        or "\x7f" in location
    )
    if bad:
        raise DataError(
            "DATA-EXTERNAL-PATH",
            f"the model names external data at {location!r}",
            "only relative paths that stay inside the model's folder are read; "
            "move the data beside the model and save it again",
        )
    return path


def open_guarded(folder: str, location: str) -> int:
    """Open ``location`` inside ``folder`` for reading and return its descriptor.

    Every part is looked at with ``lstat`` and opened relative to its parent without following
    links, then the open file is checked again, so that swapping a part in between gains nothing.
    The folder itself was named by the user and may be a link.
    """
    parts = check_location(location).parts
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            _check_kind(parent, part, location, folder_wanted=True)
            child = os.open(part, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=parent)
            os.close(parent)
            parent = child
        _check_kind(parent, parts[-1], location, folder_wanted=False)
        descriptor = os.open(parts[-1], _OPEN_FLAGS, dir_fd=parent)
    except OSError as error:
        raise _refusal(error, folder, location) from error
    finally:
        os.close(parent)
    try:
        _check_regular(os.fstat(descriptor), location)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(parent: int, part: str, location: str, *, folder_wanted: bool) -> None:
    info = os.stat(part, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISLNK(info.st_mode):
        raise DataError(
            "DATA-EXTERNAL-LINK",
            f"external data {location!r} is reached through the symbolic link {part!r}",
            _LINK_HINT,
        )
    if not folder_wanted:
        _check_regular(info, location)


def _check_regular(info: os.stat_result, location: str) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise DataError(
            "DATA-EXTERNAL-NOT-REGULAR",
            f"external data {location!r} is not a regular file",
            "external data must be an ordinary file beside the model",
        )
    if info.st_nlink != 1:
        raise DataError(
            "DATA-EXTERNAL-LINK",
            f"external data {location!r} has {info.st_nlink} hard links",
            _LINK_HINT,
        )


def _refusal(error: OSError, folder: str, location: str) -> DataError:
    if error.errno == errno.ELOOP:
        return DataError(
            "DATA-EXTERNAL-LINK", f"external data {location!r} is a symbolic link", _LINK_HINT
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return DataError(
            "DATA-EXTERNAL-MISSING",
            f"external data {location!r} does not exist in {folder or '.'}",
            "copy the data file together with the model",
        )
    return DataError(
        "DATA-EXTERNAL-UNREADABLE",
        f"external data {location!r} cannot be opened: {error.strerror}",
        "check the file's permissions and name",
    )


@dataclass(frozen=True)
class ExternalEntry:
    """The checked ``external_data`` fields of one tensor; offset and length in bytes."""

    location: str
    offset: int
    length: int


def external_entry(tensor: onnx.TensorProto, nbytes: int) -> ExternalEntry:
    """Check the ``external_data`` fields of ``tensor``, which holds ``nbytes`` bytes."""
    fields: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in fields:
            raise _bad_fields(tensor, f"has the key {entry.key!r} twice")
        fields[entry.key] = entry.value
    location = fields.get("location", "")
    check_location(location)
    offset = _natural(tensor, "offset", fields.get("offset", "0"))
    length = _natural(tensor, "length", fields.get("length", str(nbytes)))
    if length != nbytes:
        raise DataError(
            "DATA-EXTERNAL-LENGTH",
            f"tensor {tensor.name!r} needs {nbytes} bytes, its external data has {length}",
            "the model and its data file do not belong together; export again",
        )
    return ExternalEntry(location, offset, length)


def _natural(tensor: onnx.TensorProto, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise _bad_fields(tensor, f"has {key} {text[:40]!r}")
    return int(text)


def _bad_fields(tensor: onnx.TensorProto, what: str) -> DataError:
    return DataError(
        "DATA-EXTERNAL-FIELDS",
        f"the external data of tensor {tensor.name!r} {what}",
        "offset and length must be whole numbers >= 0, each given once",
    )


def guard_entries(
    entries: Iterable[tuple[str, ExternalEntry]],
    folder: str,
    *,
    max_total: int = MAX_EXTERNAL_BYTES,
) -> dict[str, DataFile]:
    """Check the files behind ``entries`` (tensor name, fields); location -> checked file.

    The sum is checked before any file is touched, every file before any of its bytes is read.
    """
    listed = list(entries)
    total = sum(entry.length for _, entry in listed)
    if total > max_total:
        raise DataError(
            "DATA-EXTERNAL-TOTAL",
            f"the model's external tensors add up to {total} bytes, the cap is {max_total}",
            "raise max_external_bytes when a model of this size is meant",
        )
    files: dict[str, DataFile] = {}
    for name, entry in listed:
        if entry.location not in files:
            descriptor = open_guarded(folder, entry.location)
            try:
                files[entry.location] = describe_file(descriptor, folder, entry.location)
            finally:
                os.close(descriptor)
        size = files[entry.location].size
        if entry.offset + entry.length > size:
            raise DataError(
                "DATA-EXTERNAL-RANGE",
                f"tensor {name!r} lies at bytes {entry.offset}..{entry.offset + entry.length} of "
                f"{entry.location!r}, which has {size}",
                "the data file is truncated or belongs to another model; copy it again",
            )
    return files


class FileTensor(ir.LazyTensor):
    """A tensor whose bytes stay in a checked file and are read when they are asked for.

    Nothing is cached but a weak reference to the last array, so that the weights in memory are
    those that a pass holds on to. Reads are copies, never memory maps: a file that shrinks gives
    an error and not a bus error, and the process does not grow by the pages that it touched.

    Args:
        file: the checked file.
        offset: first byte in the file.
        dtype: element type; anything but STRING.
        shape: static shape, e.g. ``[C_out, C_in]``.
        name: name of the tensor.
        external: the bytes come from an external-data file, not from the model file.
    """

    __slots__ = ("_array", "external", "file", "offset")

    def __init__(
        self,
        file: DataFile,
        offset: int,
        dtype: ir.DataType,
        shape: ir.Shape,
        *,
        name: str | None,
        external: bool,
        doc_string: str | None = None,
        metadata_props: dict[str, str] | None = None,
    ) -> None:
        shape.freeze()
        super().__init__(
            self.load,
            dtype,
            shape,
            name=name,
            doc_string=doc_string,
            metadata_props=metadata_props,
        )
        self.file = file
        self.offset = offset
        self.external = external
        self._array: weakref.ref[np.ndarray] | None = None

    def load(self) -> ir.TensorProtocol:
        """A tensor with the same content in memory."""
        return ir.Tensor(self.numpy(), dtype=self.dtype, shape=self.shape, name=self.name)

    def __repr__(self) -> str:
        return f"{self._repr_base()}(name={self.name!r}, offset={self.offset})"

    def chunks(self) -> Iterator[bytes]:
        """The raw little-endian bytes, at most :data:`COPY_CHUNK` at a time."""
        with self.file.open() as descriptor:
            position, left = self.offset, self.nbytes
            while left:
                block = os.pread(descriptor, min(COPY_CHUNK, left), position)
                if not block:
                    raise self.file._changed()
                yield block
                position += len(block)
                left -= len(block)

    def _read(self) -> bytearray:
        data = bytearray(self.nbytes)
        view, position = memoryview(data), 0
        for block in self.chunks():
            view[position : position + len(block)] = block
            position += len(block)
        return data

    def tobytes(self) -> bytes:
        """The raw little-endian bytes."""
        return bytes(self._read())

    def tofile(self, file: Sink) -> None:
        """Write the raw bytes to ``file`` without holding more than one chunk."""
        for block in self.chunks():
            file.write(block)

    def numpy(self) -> np.ndarray:
        """The values as a read-only array; types that numpy lacks come from ``ml_dtypes``."""
        known = None if self._array is None else self._array()
        if known is not None:
            return known
        array = self._decode()
        array.flags.writeable = False
        self._array = weakref.ref(array)
        return array

    def _decode(self) -> np.ndarray:
        dims = self.shape.numpy()
        if self.dtype.bitwidth < 8:
            packed = onnx.TensorProto(
                data_type=self.dtype.value, dims=dims, raw_data=self.tobytes()
            )
            return np.array(ir.serde.deserialize_tensor(packed).numpy())
        dtype = np.dtype(self.dtype.numpy()).newbyteorder("<")
        return np.frombuffer(self._read(), dtype=dtype).reshape(dims)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        wanted = array.dtype if dtype is None else np.dtype(dtype)
        if copy or wanted != array.dtype:
            return np.array(array, dtype=wanted)
        return array

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return np.array(self.numpy()).__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU

    def __reduce__(self) -> tuple[Any, ...]:
        dims = tuple(self.shape.numpy())
        return _rebuild, (self.file, self.offset, self.dtype, dims, self.name, self.external)


def _rebuild(
    file: DataFile,
    offset: int,
    dtype: ir.DataType,
    dims: tuple[int, ...],
    name: str | None,
    external: bool,
) -> FileTensor:
    return FileTensor(file, offset, dtype, ir.Shape(dims), name=name, external=external)


def tensor_nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes that a dense tensor of this type and shape has; 4-bit and smaller types are packed."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise DataError(
            "DATA-TENSOR-TYPE",
            f"tensor {tensor.name!r} has the unknown element type {tensor.data_type}",
            "the model is damaged, or newer than the installed onnx and onnx_ir",
        )
    if any(dim < 0 for dim in tensor.dims):
        raise DataError(
            "DATA-TENSOR-SHAPE",
            f"tensor {tensor.name!r} has the shape {list(tensor.dims)}",
            "the model is damaged; export it again",
        )
    if dtype == ir.DataType.STRING:
        raise UnsupportedError(
            "UNSUPPORTED-EXTERNAL-STRING",
            f"string tensor {tensor.name!r} lies in external data",
            "ONNX does not define this; export the strings inside the model",
        )
    elements = 1
    for dim in tensor.dims:
        elements *= dim
    return (elements * dtype.bitwidth + 7) // 8
