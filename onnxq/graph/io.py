"""Guarded load and atomic save of ONNX models."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxq.errors import DataError


@dataclass(frozen=True)
class SavedModel:
    """What :func:`save` wrote: the graph file, its data file if any, and their total bytes."""

    path: Path
    bytes: int
    data_path: Path | None


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read the ONNX model at ``path``; weights stay on disk until they are used."""
    source = Path(path)
    if not source.exists():
        raise DataError("DATA-FILE-MISSING", f"there is no file {source}", "check the path")
    try:
        return ir.load(source)
    except Exception as error:
        raise DataError("DATA-NOT-ONNX", f"{source} cannot be read: {error}") from error


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    external: bool | None = None,
    threshold: int = 1024,
) -> SavedModel:
    """Write ``model`` to ``path`` in one atomic step; ``source`` is a path that must differ."""
    target = Path(path)
    if source is not None and target.exists() and os.path.samefile(source, target):
        raise DataError("DATA-OUTPUT-IS-INPUT", f"{target} is the input", "choose another output")
    temporary = target.with_name(f".{target.name}.onnxq-tmp")
    try:
        ir.save(model, temporary, format="protobuf")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return SavedModel(target, target.stat().st_size, None)


def copy_model(model: ir.Model) -> ir.Model:
    """A copy whose graphs, nodes and values are new and whose tensors are shared."""
    return model.clone()


def serialized(model: ir.Model) -> bytes:
    """The model as one protobuf message (below 2 GiB), weights included."""
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
