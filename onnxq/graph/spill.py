"""Large new tensors on disk until they are saved, so that a run holds one layer at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.atomic import reported
from onnxq.graph.tensors import tensor_slots

LARGE = 1 << 20
"""Bytes from which on an array is put on disk."""


def spilled(array: npt.NDArray[Any]) -> npt.NDArray[Any] | ir.TensorProtocol:
    """``array`` itself if it is small, else a tensor that is read from a file when it is needed.

    Raises:
        DataError: the temporary folder cannot be written.
    """
    return _on_disk([array], array.dtype, array.shape) if array.nbytes >= LARGE else array


def spilled_parts(
    parts: Iterable[npt.NDArray[Any]], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> npt.NDArray[Any] | ir.TensorProtocol:
    """The same for an array that comes in parts, one behind the other along its first axis.

    Raises:
        DataError: the temporary folder cannot be written.
    """
    if math.prod(shape) * dtype.itemsize >= LARGE:
        return _on_disk(parts, dtype, shape)
    return np.concatenate([np.ascontiguousarray(part, dtype) for part in parts]).reshape(shape)


def spill_new_tensors(model: ir.Model, reference: ir.Model) -> None:
    """Put the large arrays of ``model`` on disk that ``reference`` does not hold anyway.

    Raises:
        DataError: the temporary folder cannot be written.
    """
    # By their arrays: a model that is edited has tensors of its own around the same elements.
    held = {id(_array(tensor)) for _, tensor, _ in tensor_slots(reference)}
    moved: dict[int, ir.TensorProtocol] = {}
    for replace, tensor, _ in list(tensor_slots(model)):
        array = _array(tensor)
        if array is None or array.nbytes < LARGE or id(array) in held:
            continue
        if id(array) not in moved:
            moved[id(array)] = _on_disk([array], array.dtype, array.shape, tensor.name)
        replace(moved[id(array)])


def _array(tensor: ir.TensorProtocol) -> npt.NDArray[Any] | None:
    """The plain array in memory that ``tensor`` holds, if it holds one."""
    array = tensor.raw if type(tensor) is ir.Tensor else None
    return array if isinstance(array, np.ndarray) and array.dtype.kind in "fiu" else None


def _on_disk(
    parts: Iterable[npt.NDArray[Any]],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    name: str | None = None,
) -> ir.TensorProtocol:
    """An array as a tensor in a file that goes when the tensor does."""
    with reported(Path("the temporary folder")):
        folder = tempfile.TemporaryDirectory(prefix="onnxq-spill-")
    path = Path(folder.name) / "data"
    with reported(path):
        file = path.open("wb")
    with file:
        for part in parts:
            with reported(path):
                np.ascontiguousarray(part, dtype).tofile(file)

    def read(kept: object = folder) -> ir.TensorProtocol:
        assert kept is folder
        return ir.Tensor(np.fromfile(path, dtype).reshape(shape))

    return ir.LazyTensor(
        read, dtype=ir.DataType.from_numpy(dtype), shape=ir.Shape(shape), name=name
    )
