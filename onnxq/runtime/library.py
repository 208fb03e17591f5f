"""The compiled operator library: where it is, what is in it, and whether it fits this package.

A library is code. Only the one that the package ships, or one that the user names, is ever opened;
a model cannot name one.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnxq
from onnxq import custom_ops
from onnxq.custom_ops import Kernel
from onnxq.errors import DataError, UnsupportedError

ABI_TAG = "onnxq-ops-abi-1"
"""The contract between library and package; both sides raise it together."""

_NO_LIBRARY = (
    "the operator library was not built; operators run as their standard-ONNX bodies, slower. "
    "Install a C++17 compiler and reinstall onnxq to get the kernels"
)

_log = logging.getLogger("onnxq.runtime")


@dataclass(frozen=True)
class LibraryKind:
    """A library of operators; there is one for each provider.

    Args:
        provider: of its kernels, as ``ops.def`` calls it.
        file_name: of the shared library.
        abi_tag: what its entry point of that name must answer.
        entry_points: functions that it must have beside the common ones.
    """

    provider: str
    file_name: str
    abi_tag: str
    entry_points: tuple[str, ...]


CPU = LibraryKind("CPU", "libonnxq_ops_cpu.so", ABI_TAG, ("onnxq_isa_levels",))
CUDA = LibraryKind(
    "CUDA", "libonnxq_ops_cuda.so", "onnxq-ops-cuda-abi-1", ("onnxq_cuda_runtime_version",)
)
_COMMON_ENTRY_POINTS = ("onnxq_abi_tag", "onnxq_version", "onnxq_kernels")


@dataclass(frozen=True)
class Library:
    """What an operator library says about itself.

    Args:
        path: the shared library.
        version: version of onnxq that it was built with.
        kernels: the kernels it registers.
        isa_levels: instruction sets of this CPU that it has code for, the best last; CPU only.
        cuda_version: CUDA that it was built with, 1000 * major + 10 * minor; CUDA only.
    """

    path: Path
    version: str
    kernels: tuple[Kernel, ...]
    isa_levels: tuple[str, ...] = ()
    cuda_version: int = 0


def shipped_path(folders: Iterable[str] | None = None, *, kind: LibraryKind = CPU) -> Path | None:
    """Where the package's own library lies, or None when it was not built.

    Args:
        folders: folders of the package ``onnxq.custom_ops``; an editable install has two.
        kind: which library.
    """
    for folder in custom_ops.__path__ if folders is None else folders:
        path = Path(folder) / "lib" / kind.file_name
        if path.is_file():
            return path
    return None


def inspect_library(path: Path, kind: LibraryKind = CPU) -> Library:
    """Open a library and check that this package can use it.

    Raises:
        DataError: ``DATA-LIBRARY-MISSING``, there is no such file.
        UnsupportedError: ``UNSUPPORTED-LIBRARY``, it does not load, is not an onnxq operator
            library, has another ABI tag, or was built for another version of onnxq.
    """
    if not path.is_file():
        raise DataError(
            "DATA-LIBRARY-MISSING", f"{path} is not a file", "give the path of a .so file"
        )
    try:
        handle = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise _misfit(path, f"it does not load: {error}") from error
    entry_points = (*_COMMON_ENTRY_POINTS, *kind.entry_points)
    missing = [name for name in entry_points if not hasattr(handle, name)]
    if missing:
        raise _misfit(path, f"it is no onnxq operator library (no {missing[0]})")
    # Nothing else is called before the tag is known to fit.
    tag = _text(handle, "onnxq_abi_tag")
    if tag != kind.abi_tag:
        raise _misfit(path, f"its ABI tag is {tag!r}, this onnxq needs {kind.abi_tag!r}")
    rows = (line.split() for line in _text(handle, "onnxq_kernels").splitlines())
    library = Library(
        path=path,
        version=_text(handle, "onnxq_version"),
        kernels=tuple(Kernel(op, int(since), where, dtype) for op, since, where, dtype in rows),
        isa_levels=tuple(_text(handle, "onnxq_isa_levels").split()) if kind is CPU else (),
        cuda_version=int(handle.onnxq_cuda_runtime_version()) if kind is CUDA else 0,
    )
    if library.version != onnxq.__version__:
        raise _misfit(path, f"it is of onnxq {library.version}, this is {onnxq.__version__}")
    listed = {row for row in custom_ops.kernels() if row.provider == kind.provider}
    if set(library.kernels) != listed:
        raise _misfit(path, "its kernels are not those of this package's ops.def")
    return library


@functools.cache
def usable_library() -> Library | None:
    """The package's own library, or None, with one warning a process that says why."""
    path = shipped_path()
    if path is None:
        _log.warning("onnxq: %s", _NO_LIBRARY)
        return None
    try:
        return inspect_library(path)
    except UnsupportedError as error:
        _log.warning("onnxq: %s; operators run as their standard-ONNX bodies", error.cause)
        return None


def library_problem() -> str | None:
    """Why the package's own library cannot be used, or None when it can."""
    path = shipped_path()
    if path is None:
        return _NO_LIBRARY
    try:
        inspect_library(path)
    except UnsupportedError as error:
        return error.cause
    return None


def _text(handle: ctypes.CDLL, name: str) -> str:
    function = getattr(handle, name)
    function.argtypes = []
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _misfit(path: Path, reason: str) -> UnsupportedError:
    return UnsupportedError(
        "UNSUPPORTED-LIBRARY",
        f"the operator library {path} cannot be used: {reason}",
        "reinstall onnxq, so that library and package are of one build",
    )
