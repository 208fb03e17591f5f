"""Activations of all calibration samples at one place of a model, on disk.

One file a value and sample, so that memory holds those of a single sample, and other processes can
compute some of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration.sessions import Session
from onnxq.graph.atomic import reported
from onnxq.passes.lower.activations import rounded_values
from onnxq.passes.plan import ActivationPlan
from onnxq.passes.weights.tasks import Moments

Array = npt.NDArray[Any]
Rounding = Sequence[tuple[str, ActivationPlan]]
"""Values, and how layers that read them round them at run time."""


class Stream:
    """The values that lie between the stages of one run of the model.

    Args:
        folder: where the files go; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def put_rounded(self, sample: int, values: Mapping[str, Array], rounding: Rounding) -> None:
        """Keep ``values`` also as the layers read them that round their input."""
        wanted = [(name, plan) for name, plan in rounding if name in values]
        self.put(
            sample, {rounded_name(n, plan): rounded_values(values[n], plan) for n, plan in wanted}
        )

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
        return self.folder / f"{key}.{sample}.npy"


def rounded_name(value: str, plan: ActivationPlan) -> str:
    """Under which a stream keeps ``value`` as layers read it that round their input."""
    return f"{value}::{plan.format}:{plan.clip}"


@dataclass(frozen=True)
class StageTask:
    """Some samples to run through one stage.

    Args:
        model: path of the stage's model.
        folder: of the stream that its inputs come from and its outputs go to.
        inputs, outputs: names of values.
        samples: which.
        threads: for onnxruntime.
        rounding: outputs that are kept rounded as well.
    """

    model: str
    folder: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    samples: range
    threads: int
    rounding: Rounding


def run_stage(task: StageTask) -> None:
    """Compute the outputs of a stage."""
    stream = Stream(Path(task.folder))
    session = Session(Path(task.model), task.threads)
    for sample in task.samples:
        feeds = {name: stream.get(sample, name) for name in task.inputs}
        found = session.run(task.outputs, feeds, sample)
        values = {n: v.numpy() for n, v in zip(task.outputs, found, strict=True)}
        stream.put(sample, values)
        stream.put_rounded(sample, values, task.rounding)


@dataclass(frozen=True)
class MomentTask:
    """Some samples whose second moments are wanted.

    Args:
        rounded: folder of the stream through the rounded layers.
        exact: that of the float model; empty to do without.
        value: name of the value in the float model.
        met: name in the first stream of what the layer meets; ``value``, or a rounded copy.
        samples: which.
        cap: most energy of a token, in medians of its sample; 0 for no limit.
    """

    rounded: str
    exact: str
    value: str
    met: str
    samples: range
    cap: float


def sum_moments(task: MomentTask) -> Moments:
    """The moments of these samples, in float64."""
    rounded = Stream(Path(task.rounded))
    exact = Stream(Path(task.exact)) if task.exact else None
    total: Moments | None = None
    for sample in task.samples:
        array = rounded.get(sample, task.met)
        rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
        weighted = rows * token_weights(rows, task.cap)[:, None] if task.cap else rows
        cross: Array | None = None
        with np.errstate(over="ignore", invalid="ignore"):  # the sum is checked by who asked
            gram = (weighted.T @ rows).astype(np.float64)
            if exact is not None:
                other = exact.get(sample, task.value).reshape(rows.shape)
                cross = (other.astype(np.float32, copy=False).T @ weighted).astype(np.float64)
        part = Moments(gram, cross)
        total = part if total is None else total.plus(part)
    assert total is not None
    return total


def token_weights(rows: Array, cap: float) -> Array:
    """``min(1, cap * median / energy)`` of each row, ``[T]`` float32.

    A few tokens of a decoder carry activations hundreds of times as large as all others. They
    leave their mark on the residual stream, whose norm then divides by it, so that an error counts
    relative to their size; in a plain sum of squares they would outvote all other tokens.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        energy = np.square(rows, dtype=np.float64).sum(axis=1)
        limit = cap * np.median(energy)
        weights = np.where(energy > limit, limit / np.where(energy > 0, energy, 1), 1.0)
    return np.asarray(weights if limit > 0 else np.ones(len(rows)), np.float32)
