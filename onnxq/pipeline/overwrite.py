"""What a run reads must never be what it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxq.errors import DataError
from onnxq.graph import io


def refuse_overwrite(
    path: Path,
    what: str,
    model: Path,
    calib: Any = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Refuse to write to a file that the run reads, however it is spelt or linked.

    Args:
        path: the file to write.
        what: what will be written, for the message.
        model: the input model; the external data that it names counts as well.
        calib: calibration data; only what is the path of a file matters.
        tokenizer: ``tokenizer.json`` for text samples.

    Raises:
        DataError: ``DATA-OUTPUT-IS-INPUT``; the model cannot be read.
    """
    if not path.exists():
        return
    for file, role in _files_read(model, calib, tokenizer):
        if file.exists() and path.samefile(file):
            raise DataError(
                "DATA-OUTPUT-IS-INPUT",
                f"{what} {path} is {role}",
                "write to another file; what a run reads is never overwritten",
            )


def _files_read(
    model: Path, calib: Any, tokenizer: str | os.PathLike[str] | None
) -> Iterator[tuple[Path, str]]:
    """The files that a run reads, and what each of them is."""
    yield model, "the input"
    if isinstance(calib, str | os.PathLike):
        yield Path(os.fspath(calib).partition("#")[0]), "the calibration data"
    if tokenizer is not None:
        yield Path(tokenizer), "the tokenizer"
    for file in io.data_files(model):
        yield file, "the input's external data"
