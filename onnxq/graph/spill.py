"""Large new tensors on disk until they are saved, so that a run holds one layer at a time."""

from __future__ import annotations

import tempfile
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
    return _on_disk(array, None) if array.nbytes >= LARGE else array


def spill_new_tensors(model: ir.Model, reference: ir.Model) -> None:
    """Put the large arrays of ``model`` on disk that ``reference`` does not hold anyway.

    Raises:
        DataError: the temporary folder cannot be written.
    """
    held = {id(tensor) for _, tensor, _ in tensor_slots(reference)}
    moved: dict[int, ir.TensorProtocol] = {}
    for replace, tensor, _ in list(tensor_slots(model)):
        if type(tensor) is not ir.Tensor or id(tensor) in held or tensor.nbytes < LARGE:
            continue
        array = tensor.raw
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            continue
        if id(tensor) not in moved:
            moved[id(tensor)] = _on_disk(array, tensor.name)
        replace(moved[id(tensor)])


def _on_disk(array: npt.NDArray[Any], name: str | None) -> ir.TensorProtocol:
    """``array`` as a tensor in a file that goes when the tensor does."""
    folder = tempfile.TemporaryDirectory(prefix="onnxq-spill-")
    path = Path(folder.name) / "data"
    with reported(path):
        array.tofile(path)
    dtype, shape = array.dtype, array.shape

    def read(kept: object = folder) -> ir.TensorProtocol:
        assert kept is folder
        return ir.Tensor(np.fromfile(path, dtype).reshape(shape))

    return ir.LazyTensor(
        read, dtype=ir.DataType.from_numpy(dtype), shape=ir.Shape(shape), name=name
    )
