"""Large new tensors on disk until they are saved, so that a run holds one layer at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.atomic import reported

LARGE = 1 << 20
"""Bytes from which on an array is put on disk."""


def spilled(array: npt.NDArray[Any]) -> npt.NDArray[Any] | ir.TensorProtocol:
    """``array`` itself if it is small, else a tensor that is read from a file when it is needed.

    The file goes when the tensor does.

    Raises:
        DataError: the temporary folder cannot be written.
    """
    if array.nbytes < LARGE:
        return array
    folder = tempfile.TemporaryDirectory(prefix="onnxq-spill-")
    path = Path(folder.name) / "data"
    with reported(path):
        array.tofile(path)
    dtype, shape = array.dtype, array.shape

    def read(kept: object = folder) -> ir.TensorProtocol:
        assert kept is folder
        return ir.Tensor(np.fromfile(path, dtype).reshape(shape))

    return ir.LazyTensor(read, dtype=ir.DataType.from_numpy(dtype), shape=ir.Shape(shape))
