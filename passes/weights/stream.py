"""Activations of all calibration samples at one place of a model, on disk.

One file a value and sample, so that memory holds those of a single sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.graph.atomic import reported

Array = npt.NDArray[Any]


class Stream:
    """The values that lie between the stages of one run of the model.

    Args:
        folder: where the files go; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, sample: int, values: Mapping[str, Array]) -> None:
        """Keep values of one sample.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        for name, array in values.items():
            path = self._path(name, sample)
            with reported(path):
                np.save(path, array, allow_pickle=False)

    def get(self, sample: int, name: str) -> Array:
        """One value of one sample."""
        with reported(self._path(name, sample)):
            found: Array = np.load(self._path(name, sample), allow_pickle=False)
        return found

    def drop(self, names: Iterable[str], samples: int) -> None:
        """Forget values that nothing reads any more."""
        for name in names:
            for sample in range(samples):
                self._path(name, sample).unlink(missing_ok=True)

    def _path(self, name: str, sample: int) -> Path:
        key = hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
        return self._folder / f"{key}.{sample}.npy"
