"""Tell what a file that is not an ONNX model is, so that the error can say what to do.

=========================  ===================================================================
code                       the file is ...
=========================  ===================================================================
DATA-FILE-MISSING          not there
DATA-NOT-A-FILE            a folder, FIFO, device or socket
DATA-UNREADABLE            not readable for this user
DATA-EMPTY-FILE            empty
DATA-GIT-LFS-POINTER       a Git LFS pointer: the text that stands for a file not yet fetched
DATA-HTML-PAGE             a web page, usually saved in place of a download
DATA-TORCH-CHECKPOINT      a PyTorch checkpoint or another pickle
DATA-ZIP-ARCHIVE           a zip archive
DATA-NOT-ONNX              something else; named where it is known
=========================  ===================================================================
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxq.errors import DataError

_HEAD = 4096
_GIVE_ONNX = "give a model in ONNX format"

# (offset, magic bytes, what it is)
_OTHER_FORMATS = (
    (0, b"GGUF", "a GGUF model"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ORTM", "a model in ORT format"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 (Keras) file"),
    (0, b"\x93NUMPY", "a numpy array"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x7fELF", "a program or shared library"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"%PDF", "a PDF document"),
)


@contextmanager
def open_model_file(path: Path) -> Iterator[tuple[int, int]]:
    """Open a model that the user named; yields the descriptor and the size in bytes.

    Links are followed, as the user chose the path, but only to a regular file; ``O_NONBLOCK``
    keeps a FIFO from hanging the process.
    """
    hint = "check the path" if path.name else _GIVE_ONNX
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError("DATA-FILE-MISSING", f"there is no file {path}", hint) from error
    except (OSError, ValueError) as error:
        raise DataError(
            "DATA-UNREADABLE", f"{path} cannot be opened: {error}", "check its permissions"
        ) from error
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
            raise DataError("DATA-NOT-A-FILE", f"{path} is {kind}", "give the .onnx file itself")
        if info.st_size == 0:
            raise DataError("DATA-EMPTY-FILE", f"{path} is empty", "export or download it again")
        yield descriptor, info.st_size
    finally:
        os.close(descriptor)


def refuse_other_formats(path: Path, descriptor: int, size: int) -> None:
    """Raise the error that fits when the file is recognisably something else than ONNX."""
    head = os.pread(descriptor, _HEAD, 0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"version https://git-lfs"):
        raise DataError(
            "DATA-GIT-LFS-POINTER",
            f"{path} is a Git LFS pointer, not the model",
            "fetch the file itself, for example with `git lfs pull`",
        )
    if text[:200].lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        raise DataError(
            "DATA-HTML-PAGE",
            f"{path} is a web page, not a model",
            "the download gave a page (a login or an error?); download the raw file",
        )
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        _refuse_zip(path, descriptor, head, size)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise _checkpoint(path, "a Python pickle")
    if text.startswith((b"ir_version:", b"<ir_version", b"<\n", b"<\r\n")):
        raise _not_onnx(path, "an ONNX model as text; convert it with `onnx.parser`")
    if text[:1] in (b"{", b"["):
        raise _not_onnx(path, "a JSON file")
    if head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size:
        raise _not_onnx(path, "a safetensors file")
    for offset, magic, kind in _OTHER_FORMATS:
        if head[offset : offset + len(magic)] == magic:
            raise _not_onnx(path, kind)


def _refuse_zip(path: Path, descriptor: int, head: bytes, size: int) -> None:
    directory = os.pread(descriptor, 1 << 16, max(0, size - (1 << 16)))
    if b"data.pkl" in head + directory or b"constants.pkl" in head + directory:
        raise _checkpoint(path, "a PyTorch checkpoint")
    raise DataError("DATA-ZIP-ARCHIVE", f"{path} is a zip archive", "unpack it first")


def _checkpoint(path: Path, kind: str) -> DataError:
    return DataError(
        "DATA-TORCH-CHECKPOINT",
        f"{path} is {kind}, not an ONNX model",
        "export it with torch.onnx.export; a pickle is code and is never loaded here",
    )


def _not_onnx(path: Path, kind: str) -> DataError:
    return DataError("DATA-NOT-ONNX", f"{path} is {kind}, not an ONNX model", _GIVE_ONNX)
