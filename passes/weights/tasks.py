"""Rounding one layer as a task of its own, here or in another process.

A task names files: the weight where the model keeps it, the moments in a scratch folder. With a
cache folder a result is kept under a hash of everything that it depends on, so that a run that was
cut off, or that changes other layers only, finds it again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxq.formats import Format
from onnxq.graph.atomic import reported, temporary_for
from onnxq.passes.naming import about
from onnxq.passes.weights.rounded import RoundedWeight, RoundedWeights
from onnxq.passes.work import WeightRef
from onnxq.solvers.grid import Solution
from onnxq.solvers.hessian import output_error

Array = npt.NDArray[Any]

_VERSION = 2
"""Raise it when solvers give other results for the same options: old caches are then ignored."""


@dataclass(frozen=True)
class Moments:
    """Of the input of a layer, over all samples.

    Attributes:
        gram: ``[K, K]`` sum of ``y y^T``, y the input as the layer will meet it.
        cross: ``[K, K]`` sum of ``x y^T``, x that of the float model; None without it.
    """

    gram: Array
    cross: Array | None = None

    def plus(self, other: Moments) -> Moments:
        """The moments of both."""
        cross = self.cross
        if cross is not None and other.cross is not None:
            cross = cross + other.cross
        return Moments(self.gram + other.gram, cross)

    def save(self, path: Path) -> str:
        """Write both to ``path``, for tasks; returns it."""
        arrays = {"gram": self.gram} | ({} if self.cross is None else {"cross": self.cross})
        with reported(path), path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        return str(path)

    @classmethod
    def load(cls, path: str) -> Moments:
        """The inverse of :meth:`save`."""
        with reported(Path(path)), np.load(path, allow_pickle=False) as stored:
            return cls(stored["gram"], stored["cross"] if "cross" in stored.files else None)


class Solver(Protocol):
    """What rounds: a pass with its options."""

    def round_rows(self, rows: Array, moments: Moments | None, fmt: Format, group: int) -> Solution:
        """Codes and scales of one layer, ``rows [N, K]``."""
        ...


@dataclass(frozen=True)
class LayerTask:
    """One layer to round.

    Args:
        owner: the pass.
        site: name of the layer.
        weight: where its weight is.
        moments: path of its :class:`Moments`; empty for solvers without.
        fmt: the format, its scheme included.
        group: columns that share a scale; 0 for the whole row.
        cache: folder of finished layers; empty for none.
    """

    owner: Solver
    site: str
    weight: WeightRef
    moments: str
    fmt: Format
    group: int
    cache: str = ""


def round_task(task: LayerTask) -> tuple[RoundedWeight, str]:
    """Run a task."""
    moments = Moments.load(task.moments) if task.moments else None
    rows = task.weight.rows()
    return round_layer(task.owner, task.site, rows, moments, task.fmt, task.group, task.cache)


def round_layer(
    owner: Solver,
    site: str,
    rows: Array,
    moments: Moments | None,
    fmt: Format,
    group: int,
    cache: str = "",
) -> tuple[RoundedWeight, str]:
    """The rounded weight, and its quality in words.

    Raises:
        DataError, UnsupportedError: as the solver says, with the layer's name.
    """
    kept = Path(cache) / f"{_key(owner, rows, moments, fmt, group)}.npz" if cache else None
    found = None if kept is None else _recall(kept)
    if found is None:
        with about(site):
            found = RoundedWeight.of(owner.round_rows(rows, moments, fmt, group))
        if kept is not None:
            _keep(kept, found)
    return found, quality(rows, found.values(), None if moments is None else moments.gram)


def quality(rows: Array, values: Array, gram: Array | None) -> str:
    """Output SQNR of the rounded layer on the calibration rows; that of the weight without any."""
    if gram is None:
        gram, what = np.eye(rows.shape[1]), "weight"
    else:
        what = "output"
    error = output_error(rows, values, gram)
    return f"{what} SQNR {-10 * np.log10(error):.1f} dB" if error > 0 else "exact"


def _key(owner: Solver, rows: Array, moments: Moments | None, fmt: Format, group: int) -> str:
    options = {k: v for k, v in vars(owner).items() if k not in ("cache", "layers")}
    facts = [_VERSION, type(owner).__name__, options, repr(fmt), group, rows.shape]
    digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
    arrays = [rows] if moments is None else [rows, moments.gram, moments.cross]
    for array in arrays:
        digest.update(b"" if array is None else np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _keep(path: Path, weight: RoundedWeight) -> None:
    """Write a finished layer, complete or not at all."""
    alone = RoundedWeights()
    alone.add("layer", weight)
    header, arrays = alone.to_storage()
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_for(path) as temporary:
            np.savez(temporary.file, **arrays)  # type: ignore[arg-type]
            temporary.put_in_place()


def _recall(path: Path) -> RoundedWeight | None:
    if not path.is_file():
        return None
    with reported(path), np.load(path, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    header = json.loads(arrays.pop("header").tobytes())
    return RoundedWeights.from_storage(header, arrays).get("layer")
