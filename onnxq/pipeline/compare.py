"""Compare two models: their outputs, their inner values, their size and their speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir

from onnxq.errors import DataError
from onnxq.graph import io
from onnxq.graph.tensors import model_nbytes
from onnxq.passes.contract import Progress, no_progress
from onnxq.runtime.caches import is_quantized_cache, with_empty_caches
from onnxq.runtime.difference import LayerDiff, OutputDiff, Tally
from onnxq.runtime.workspace import Sample, Workspace, run_samples

if TYPE_CHECKING:
    import os

    import onnxruntime as ort

    ModelLike = ir.Model | str | os.PathLike[str]

VALUES_A_SWEEP: Final = 48
"""Inner values that leave the session together; bounds the memory of a layer-wise comparison."""


NOISY: Final = 0.3


@dataclass(frozen=True)
class Latency:
    """Interleaved runs of several models on one sample.

    Args:
        seconds: median of each model's runs, by label.
        rounds: runs of each model.
        threads: inside one operator.
        shapes: of the sample's inputs, for example ``input_ids 1x24``.
        spread: interquartile range of a model's runs as a share of its median, the largest of
            all models; above :data:`NOISY` other work on the machine drowns the ratio.
    """

    seconds: Mapping[str, float]
    rounds: int
    threads: int
    shapes: str = ""
    spread: float = 0.0

    @property
    def is_noisy(self) -> bool:
        """Whether the times differ too much from run to run to be quoted."""
        return self.spread > NOISY


@dataclass(frozen=True)
class Comparison:
    """A candidate beside its reference.

    Args:
        outputs: one entry for each output of the reference.
        reference_bytes, candidate_bytes: of the files with their external data; of the weights for
            models in memory.
        latency: with the labels ``reference`` and ``candidate``, or None where not measured.
    """

    outputs: tuple[OutputDiff, ...]
    reference_bytes: int
    candidate_bytes: int
    latency: Latency | None = None

    @property
    def worst(self) -> OutputDiff | None:
        """The output with the least mean cosine, a NaN first."""
        return min(
            self.outputs,
            key=lambda o: -2.0 if math.isnan(o.cosine_mean) else o.cosine_mean,
            default=None,
        )

    @property
    def flagged(self) -> tuple[OutputDiff, ...]:
        """The outputs that are plainly broken."""
        return tuple(o for o in self.outputs if o.flags)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the reference the candidate is."""
        if self.latency is None:
            return None
        return self.latency.seconds["reference"] / self.latency.seconds["candidate"]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data."""
        return {
            "outputs": [o.to_json() for o in self.outputs],
            "reference_bytes": self.reference_bytes,
            "candidate_bytes": self.candidate_bytes,
            "size_ratio": self.reference_bytes / max(1, self.candidate_bytes),
            "speedup": self.speedup,
            "latency_ms": None
            if self.latency is None
            else {k: v * 1e3 for k, v in self.latency.seconds.items()},
            "threads": None if self.latency is None else self.latency.threads,
            "latency_shapes": None if self.latency is None else self.latency.shapes,
            "latency_spread": None if self.latency is None else self.latency.spread,
        }


def compare_models(
    reference: ModelLike,
    candidate: ModelLike,
    data: Iterable[Sample],
    *,
    threads: int = 1,
    seconds: float = 1.0,
    repeats: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models on the samples, then in turns against the clock.

    Args:
        reference: a model or the path of one; its outputs are what is asked for.
        candidate: the same.
        data: samples, by input name.
        threads: inside one operator.
        seconds: time for the measurement of speed, both models together; 0 leaves it out.
        repeats: runs of each model instead of a time.
        limit: compare at most this many samples.
        progress: called after every sample.

    Raises:
        DataError: ``DATA-NO-SAMPLES``; ``DATA-COMPARE-OUTPUTS``: the candidate lacks an output of
            the reference; ``DATA-ORT-REFUSED``, ``DATA-ORT-RUN``.
    """
    tell = progress or no_progress
    samples = islice(data, limit)
    with ExitStack() as stack:
        old = stack.enter_context(_session(reference, threads))
        new = stack.enter_context(_session(candidate, threads))
        names = _shared_outputs(old, new)
        tallies = {name: Tally() for name in names}
        longest: Sample | None = None
        for count, sample in enumerate(samples, start=1):
            longest = sample if longest is None else max(longest, sample, key=_elements)
            (before,), (after,) = run_samples(old, [sample]), run_samples(new, [sample])
            for name, tally in tallies.items():
                tally.add(before[name], after[name])
            tell("compare with the reference", count, limit)
        if longest is None:
            raise DataError(
                "DATA-NO-SAMPLES", "there are no samples to compare the models on", "give --calib"
            )
        latency = None
        if seconds > 0 or repeats:
            both = {"reference": old, "candidate": new}
            latency = measure(both, longest, threads=threads, seconds=seconds, repeats=repeats)
    return Comparison(
        tuple(tally.output(name) for name, tally in tallies.items()),
        _bytes(reference),
        _bytes(candidate),
        latency,
    )


@contextmanager
def _session(model: ModelLike, threads: int) -> Iterator[ort.InferenceSession]:
    """A session as a user of the file would have it."""
    from onnxq.runtime import session

    if not isinstance(model, ir.Model):
        yield session(model, threads=threads)
        return
    with io.session_source(model) as source:
        opened = session(source, threads=threads)
    yield opened


def _shared_outputs(old: ort.InferenceSession, new: ort.InferenceSession) -> list[str]:
    theirs = {o.name for o in new.get_outputs()}
    # A cache that is kept in codes is no output to compare; what it does shows in the others.
    names = [o.name for o in old.get_outputs() if not is_quantized_cache(o.name, theirs)]
    missing = [n for n in names if n not in theirs]
    if missing:
        raise DataError(
            "DATA-COMPARE-OUTPUTS",
            f"the candidate has no output `{missing[0]}`, which the reference has",
            "compare two forms of one model",
        )
    return names


def _elements(sample: Sample) -> int:
    """Size of a sample: the largest one shows the compute, not the overhead of a run."""
    return sum(int(array.size) for array in sample.values())


def _bytes(model: ModelLike) -> int:
    return model_nbytes(model) if isinstance(model, ir.Model) else io.size_on_disk(model)


def measure(
    sessions: Mapping[str, ort.InferenceSession],
    feeds: Sample,
    *,
    threads: int,
    seconds: float = 1.0,
    repeats: int | None = None,
    warmup: int = 2,
) -> Latency:
    """Median time of a run of each session, A B A B; who goes first changes every round.

    Args:
        sessions: by label.
        feeds: one sample.
        threads: that the sessions were made with, for the record.
        seconds: for all sessions together; at least three rounds are run.
        repeats: number of rounds instead.
        warmup: runs of each session that do not count.
    """
    labels = list(sessions)
    inputs = {label: with_empty_caches(session, feeds) for label, session in sessions.items()}
    for label in labels:
        for _ in run_samples(sessions[label], [feeds] * warmup):
            pass
    times: dict[str, list[float]] = {label: [] for label in labels}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < (repeats or 3) or (repeats is None and time.perf_counter() < end):
        turn = rounds % len(labels)
        for label in labels[turn:] + labels[:turn]:
            began = time.perf_counter()
            sessions[label].run(None, inputs[label])
            times[label].append(time.perf_counter() - began)
        rounds += 1
    return Latency(
        {k: statistics.median(v) for k, v in times.items()},
        rounds,
        threads,
        ", ".join(f"{k} {'x'.join(map(str, v.shape)) or 'scalar'}" for k, v in feeds.items()),
        max(_spread(v) for v in times.values()),
    )


def _spread(times: Sequence[float]) -> float:
    """Interquartile range as a share of the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def per_layer(
    reference: ModelLike,
    candidate: ModelLike,
    data: Iterable[Sample],
    *,
    threads: int = 1,
    limit: int = 4,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[LayerDiff]:
    """SQNR and cosine of every float value of the main graph that both models have.

    Values are the same when their names are; a candidate whose provenance has a ``values`` table
    (name in the reference -> name in the candidate) can have renamed them. Values leave the
    sessions a few at a time and are not kept. Neither graph is optimised by onnxruntime, so that
    no value disappears.

    Args:
        reference: a model or the path of one.
        candidate: the same.
        data: samples, by input name.
        threads: inside one operator.
        limit: samples used.
        names: only these values of the reference.
        progress: called as values are done.

    Returns:
        One entry a value, in the order of the reference graph.
    """
    tell = progress or no_progress
    old = reference if isinstance(reference, ir.Model) else io.load(Path(reference))
    new = candidate if isinstance(candidate, ir.Model) else io.load(Path(candidate))
    shared = _shared_values(old, new, names)
    samples = list(islice(data, limit))
    found: list[LayerDiff] = []
    with Workspace() as space:
        for start in range(0, len(shared), VALUES_A_SWEEP):
            tell("compare layers", start, len(shared))
            chunk = shared[start : start + VALUES_A_SWEEP]
            before = space.session(old, threads=threads, outputs=[name for name, _, _ in chunk])
            after = space.session(new, threads=threads, outputs=[name for _, name, _ in chunk])
            found.extend(_compare_values(before, after, chunk, samples))
    tell("compare layers", len(shared), len(shared))
    return found


def _compare_values(
    before: ort.InferenceSession,
    after: ort.InferenceSession,
    chunk: Sequence[tuple[str, str, str]],
    samples: Sequence[Sample],
) -> Iterator[LayerDiff]:
    """The values of ``chunk``: (name in the reference, name in the candidate, operator)."""
    tallies = [Tally() for _ in chunk]
    for left, right in zip(run_samples(before, samples), run_samples(after, samples), strict=True):
        for tally, (name, other, _) in zip(tallies, chunk, strict=True):
            tally.add(left[name], right[other])
    for tally, (name, _, op) in zip(tallies, chunk, strict=True):
        if tally.is_float:
            yield tally.layer(name, op)


def _shared_values(
    old: ir.Model, new: ir.Model, names: Sequence[str] | None
) -> list[tuple[str, str, str]]:
    """(name in the reference, name in the candidate, operator) of float values in both."""
    renamed = io.get_provenance(new).get("values", {})
    theirs = {v.name for node in new.graph for v in node.outputs if v.name}
    wanted = None if names is None else set(names)
    found: list[tuple[str, str, str]] = []
    for node in old.graph:
        for value in node.outputs:
            name = value.name
            if not name or node.op_type == "Constant" or not _may_be_float(value):
                continue
            other = renamed.get(name, name)
            if other in theirs and (wanted is None or name in wanted):
                found.append((name, other, node.op_type))
    return found


def _may_be_float(value: ir.Value) -> bool:
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    return value.dtype is None or value.dtype.is_floating_point()
