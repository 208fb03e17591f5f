"""One sweep over the calibration samples that answers every request.

Ranges and channel statistics are reduced inside the session. Histograms, row samples and moments
need the elements: those values leave the session, one copy at a time, in as many sweeps as it
takes to keep the ones alive at once under a limit. Nothing that is kept grows with the samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.calibration.observe import (
    FLOATS,
    MASK_THRESHOLD,
    ChannelOutputs,
    Observers,
    RangeOutputs,
    named_values,
)
from onnxq.calibration.requests import StatRequest
from onnxq.calibration.sessions import Session, Workspace
from onnxq.calibration.statistics import (
    AnyStat,
    ChannelStat,
    Histogram,
    MomentStat,
    RangeStat,
    RowsStat,
    Scratch,
    Statistics,
)
from onnxq.errors import DataError, InternalError, UnsupportedError

Feeds: TypeAlias = Mapping[str, np.ndarray]
Shape: TypeAlias = tuple[int, ...]
Progress: TypeAlias = Callable[[str, int, int | None], None]

MEMORY_LIMIT_MB = 64
"""Default limit on the observed values that are alive at once."""

_RAW = ("histogram", "rows", "moment")
_MB = 1 << 20


class Samples(Protocol):
    """What a sweep needs of calibration data."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def collect(
    model: ir.Model,
    requests: Iterable[StatRequest],
    data: Samples | Sequence[Feeds],
    *,
    threads: int = 1,
    progress: Progress | None = None,
    memory_limit_mb: float = MEMORY_LIMIT_MB,
) -> Statistics:
    """Run ``model`` on every sample of ``data`` and answer ``requests``; equal ones count once.

    Args:
        model: is not changed. Its outputs need not include the values asked for.
        requests: on values of the main graph of a float type.
        data: samples, one dict of feeds each; iterated once per sweep.
        threads: of onnxruntime.
        progress: called as ``progress("calibrate", done, total)``.
        memory_limit_mb: the elements of histograms' values that may be alive at once; more
            values mean more sweeps. A single larger value is still taken, alone.

    Raises:
        DataError: CALIB-EMPTY for no samples, CALIB-RUN when a sample fails, CALIB-NO-SPACE.
        UnsupportedError: STAT-IN-SUBGRAPH, STAT-NOT-FLOAT, STAT-MASK-SHAPE, STAT-AXIS,
            STAT-CHANNELS, CALIB-OPSET or CALIB-SESSION.
        InternalError: STAT-UNKNOWN-VALUE for a name that the model does not have.
    """
    wanted = list(dict.fromkeys(requests))
    source = str(getattr(data, "source", ""))
    if not wanted:
        return Statistics(source=source)
    total = len(data)
    first = next(iter(data), None)
    if first is None:
        raise DataError(
            "CALIB-EMPTY",
            "there is not a single calibration sample",
            "give at least one sample; a few dozen are usual",
        )
    _check_values(model, wanted)
    with Workspace(model, threads) as workspace:
        shapes = _Shapes(workspace, wanted, first)
        sweeps = _plan(wanted, shapes, memory_limit_mb * _MB)
        answers: dict[StatRequest, AnyStat] = {}
        samples = 0
        for number, part in enumerate(sweeps):
            sweep = _Sweep(workspace, part, shapes)
            samples = 0
            for samples, feeds in enumerate(data, start=1):
                sweep.add(feeds, samples - 1)
                if progress is not None:
                    progress("calibrate", number * total + samples, total * len(sweeps))
            answers.update(sweep.answers())
    return Statistics({r: answers[r] for r in wanted}, samples=samples, source=source)


def _check_values(model: ir.Model, wanted: Sequence[StatRequest]) -> None:
    known = named_values(model.graph)
    inner = {
        v.name
        for graph in model.graph.subgraphs()
        if graph is not model.graph
        for node in graph
        for v in node.outputs
    }
    for request in wanted:
        for name in (request.value, request.mask):
            if name is None:
                continue
            if name not in known:
                if name in inner:
                    raise UnsupportedError(
                        "STAT-IN-SUBGRAPH",
                        f"`{name}` is inside the body of an If, Loop or Scan; a sweep sees only"
                        " values of the main graph",
                        "leave nodes inside such bodies in float",
                    )
                raise InternalError(
                    "STAT-UNKNOWN-VALUE", f"the model has no value `{name}` to observe"
                )
            dtype = known[name].dtype
            allowed = FLOATS if name == request.value else (*FLOATS, ir.DataType.BOOL)
            if dtype is not None and dtype not in allowed:
                raise UnsupportedError(
                    "STAT-NOT-FLOAT",
                    f"`{name}` has type {dtype.name}; statistics are of float values",
                    "ask for the float value that it was made from",
                )


class _Shapes:
    """Shapes of the requested values and masks in the first sample."""

    def __init__(self, workspace: Workspace, wanted: Sequence[StatRequest], first: Feeds) -> None:
        names = dict.fromkeys(
            name for r in wanted for name in (r.value, r.mask) if name is not None
        )
        values = named_values(workspace.model.graph)
        self._shapes: dict[str, Shape] = {}
        unknown: list[str] = []
        for name in names:
            shape = values[name].shape
            if shape is not None and shape.is_static():
                self._shapes[name] = tuple(int(d) for d in shape.numpy())
            else:
                unknown.append(name)
        if unknown:
            self._probe(workspace, unknown, first)

    def __getitem__(self, name: str) -> Shape:
        return self._shapes[name]

    def _probe(self, workspace: Workspace, names: Sequence[str], first: Feeds) -> None:
        observers = Observers(workspace.model)
        outputs = [observers.shape(name) for name in names]
        found = workspace.session(observers.model).run(outputs, first, 0)
        for name, value in zip(names, found, strict=True):
            self._shapes[name] = tuple(int(d) for d in value.numpy())

    def axis(self, request: StatRequest) -> int:
        """The request's axis, non-negative."""
        rank = len(self[request.value])
        if not -rank <= request.axis < rank:
            raise UnsupportedError(
                "STAT-AXIS",
                f"`{request.value}` has {rank} dimensions; there is no axis {request.axis}",
                "ask for a statistic of the whole value",
            )
        return request.axis % rank

    def check_mask(self, request: StatRequest) -> None:
        """The mask must broadcast to the value's shape and not widen it."""
        if request.mask is None:
            return
        shape, mask = self[request.value], self[request.mask]
        try:
            fits = np.broadcast_shapes(shape, mask) == shape
        except ValueError:
            fits = False
        if not fits:
            raise UnsupportedError(
                "STAT-MASK-SHAPE",
                f"mask `{request.mask}` of shape {list(mask)} does not broadcast to"
                f" `{request.value}` of shape {list(shape)}",
                "name the mask that is added to this value",
            )


@dataclass
class _Part:
    """The requests of one sweep."""

    reduced: list[StatRequest] = field(default_factory=list)
    raw: dict[str, list[StatRequest]] = field(default_factory=dict)


def _plan(wanted: Sequence[StatRequest], shapes: _Shapes, limit: float) -> list[_Part]:
    """Spread requests over sweeps: all reduced ones in the first, raw values as they fit."""
    parts = [_Part()]
    raw: dict[str, list[StatRequest]] = {}
    for request in wanted:
        shapes.check_mask(request)
        if request.kind in _RAW:
            raw.setdefault(request.value, []).append(request)
        else:
            parts[0].reduced.append(request)
    used = 0.0
    for name, requests in raw.items():
        size = 4.0 * float(np.prod(shapes[name], dtype=np.float64))
        if parts[-1].raw and used + size > limit:
            parts.append(_Part())
            used = 0.0
        parts[-1].raw[name] = requests
        used += size
    return parts


class _Sweep:
    """The session of one sweep and the statistics that grow in it.

    Reductions start in their plain form. When one meets an element that is not finite, the
    session is built again with the guarded form for that request, and the sample is repeated
    for it.
    """

    def __init__(self, workspace: Workspace, part: _Part, shapes: _Shapes) -> None:
        self._workspace, self._part, self._shapes = workspace, part, shapes
        self._guarded = {r for r in part.reduced if r.mask is not None}
        self._stats: dict[StatRequest, AnyStat] = {}
        self._scratch = Scratch()
        self._takes_rows = any(r.kind == "rows" for rs in part.raw.values() for r in rs)
        self._build()

    def answers(self) -> dict[StatRequest, AnyStat]:
        """The statistics so far; a request that met no element at all is an error.

        Raises:
            DataError: CALIB-NOTHING-SEEN.
        """
        for request in (*self._part.reduced, *(r for rs in self._part.raw.values() for r in rs)):
            if request not in self._stats:
                raise DataError(
                    "CALIB-NOTHING-SEEN",
                    f"no sample gave `{request.value}` a single finite, unmasked element",
                    "check that the samples are valid inputs of this model",
                )
        return self._stats

    def add(self, feeds: Feeds, sample: int) -> None:
        """Run one sample and count it."""
        results = self._run(self._fetches(), feeds, sample)
        dirty = [r for r in self._part.reduced if not self._reduce(r, results)]
        self._observe_raw(results, feeds)
        if dirty:
            self._guarded.update(dirty)
            del results
            self._build()
            again = self._run(self._fetches_of(dirty), feeds, sample)
            for request in dirty:
                self._reduce(request, again)

    def _build(self) -> None:
        observers = Observers(self._workspace.model)
        self._observers: dict[StatRequest, RangeOutputs | ChannelOutputs] = {}
        for request in self._part.reduced:
            guarded = request in self._guarded
            name, mask = request.value, request.mask
            if request.kind == "range":
                self._observers[request] = observers.range(name, mask, guarded=guarded)
                continue
            axis, rank = self._shapes.axis(request), len(self._shapes[name])
            self._observers[request] = observers.channel(name, axis, rank, mask, guarded=guarded)
        self._raw = {
            name: observers.raw(name)
            for value, requests in self._part.raw.items()
            for name in dict.fromkeys([value, *(r.mask for r in requests if r.mask)])
        }
        self._session: Session = self._workspace.session(observers.model)

    def _fetches_of(self, requests: Iterable[StatRequest]) -> list[str]:
        return [
            name
            for request in requests
            for name in vars(self._observers[request]).values()
            if name is not None
        ]

    def _fetches(self) -> list[str]:
        return [*self._fetches_of(self._part.reduced), *self._raw.values()]

    def _run(self, names: Sequence[str], feeds: Feeds, sample: int) -> dict[str, Any]:
        names = list(dict.fromkeys(names))
        return dict(zip(names, self._session.run(names, feeds, sample), strict=True))

    def _reduce(self, request: StatRequest, results: Mapping[str, Any]) -> bool:
        """Count the reductions of ``request``; False if they met a non-finite element."""
        outputs = self._observers[request]
        if isinstance(outputs, RangeOutputs):
            return self._reduce_range(request, outputs, results)
        return self._reduce_channel(request, outputs, results)

    def _reduce_range(
        self, request: StatRequest, outputs: RangeOutputs, results: Mapping[str, Any]
    ) -> bool:
        if outputs.total is not None and not np.isfinite(results[outputs.total].numpy()):
            return False
        lo, hi = float(results[outputs.lo].numpy()), float(results[outputs.hi].numpy())
        if lo <= hi:
            stat = self._stats.setdefault(request, RangeStat())
            assert isinstance(stat, RangeStat)
            stat.add(lo, hi)
        return True

    def _reduce_channel(
        self, request: StatRequest, outputs: ChannelOutputs, results: Mapping[str, Any]
    ) -> bool:
        lo, hi, total, total_abs, total_sq = (
            results[name].numpy().reshape(-1).astype(np.float64)
            for name in (outputs.lo, outputs.hi, outputs.sum, outputs.sum_abs, outputs.sum_sq)
        )
        if outputs.count is not None:
            count = np.rint(results[outputs.count].numpy()).astype(np.int64).reshape(-1)
        elif np.isfinite(total).all():
            elements = int(np.prod(results[outputs.shape].numpy()))
            count = np.full(lo.size, elements // max(1, lo.size))
        else:
            return False
        if count.any():
            batch = ChannelStat(lo, hi, total, total_abs, total_sq, count)
            before = self._stats.get(request)
            assert before is None or isinstance(before, ChannelStat)
            self._stats[request] = batch if before is None else before.merge(batch)
        return True

    def _observe_raw(self, results: dict[str, Any], feeds: Feeds) -> None:
        key = _sample_key(feeds) if self._takes_rows else np.uint64(0)
        masks: dict[str, npt.NDArray[np.bool_]] = {}
        for value, requests in self._part.raw.items():
            array = results[self._raw[value]].numpy()
            for mask in {r.mask for r in requests} - {None, *masks}:
                assert mask is not None
                masks[mask] = unmasked(results[self._raw[mask]].numpy())
            if not array.size:
                continue
            extremes = float(array.min()), float(array.max())
            for request in requests:
                good = None if request.mask is None else masks[request.mask]
                if request.kind == "histogram":
                    self._count(request, array, good, extremes)
                elif request.kind == "rows":
                    self._sample_rows(request, array, good, key)
                else:
                    self._add_moment(request, array, good)

    def _count(
        self,
        request: StatRequest,
        array: np.ndarray,
        good: npt.NDArray[np.bool_] | None,
        extremes: tuple[float, float],
    ) -> None:
        if good is not None:
            array = array[np.broadcast_to(good, array.shape)]
        elif np.isfinite(extremes).all():
            stat = self._stats.setdefault(request, Histogram())
            assert isinstance(stat, Histogram)
            stat.add_finite(array.reshape(-1), *extremes, self._scratch)
            return
        array = array[np.isfinite(array)]
        if array.size:
            stat = self._stats.setdefault(request, Histogram())
            assert isinstance(stat, Histogram)
            stat.add(array, self._scratch)

    def _sample_rows(
        self,
        request: StatRequest,
        array: np.ndarray,
        good: npt.NDArray[np.bool_] | None,
        key: np.uint64,
    ) -> None:
        rows, fine = self._rows(request, array, good)
        keys = _row_keys(key, len(rows))
        if not fine.all():
            rows, keys = rows[fine], keys[fine]
        if len(rows):
            stat = self._stats.setdefault(request, RowsStat.zeros(rows.shape[1], request.limit))
            assert isinstance(stat, RowsStat)
            stat.add(rows, keys)

    def _add_moment(
        self, request: StatRequest, array: np.ndarray, good: npt.NDArray[np.bool_] | None
    ) -> None:
        rows, fine = self._rows(request, array, good)
        if not fine.all():
            rows = rows[fine]
        if len(rows):
            stat = self._stats.setdefault(request, MomentStat.zeros(rows.shape[1]))
            assert isinstance(stat, MomentStat)
            stat.add(rows)

    def _rows(
        self, request: StatRequest, array: np.ndarray, good: npt.NDArray[np.bool_] | None
    ) -> tuple[np.ndarray, npt.NDArray[np.bool_]]:
        """The rows ``[m, C]`` along the request's axis, and which of them count."""
        axis = self._shapes.axis(request)
        rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
        fine = np.isfinite(rows).all(axis=1)
        if good is not None:
            spread = np.moveaxis(np.broadcast_to(good, array.shape), axis, -1)
            fine &= spread.reshape(rows.shape).all(axis=1)
        return rows, fine


def unmasked(mask: np.ndarray) -> npt.NDArray[np.bool_]:
    """Where a mask lets elements count: True of a boolean mask, above the threshold otherwise."""
    if mask.dtype == np.bool_:
        return mask
    with np.errstate(invalid="ignore"):
        return np.asarray((mask > MASK_THRESHOLD) & np.isfinite(mask))


def _sample_key(feeds: Feeds) -> np.uint64:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(feeds):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(feeds[name]).tobytes())
    return np.uint64(int.from_bytes(digest.digest(), "little"))


def _row_keys(key: np.uint64, count: int) -> npt.NDArray[np.uint64]:
    """Keys of the rows of one sample: SplitMix64 of ``key + row * golden ratio``."""
    z = key + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
