"""What a calibration sweep found out: one class per kind of statistic, and the set of them.

Every statistic can be merged with another one of the same value: sums, extremes, histograms and
row samples do not depend on how the samples were spread over workers. Only floating-point sums
depend on the order of merging, by rounding, and the moving average by definition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from onnxq.calibration.requests import StatKind, StatRequest
from onnxq.errors import DataError, InternalError, UnsupportedError

Array: TypeAlias = npt.NDArray[Any]
Float64: TypeAlias = npt.NDArray[np.float64]
Header: TypeAlias = dict[str, Any]

MOMENTUM = 0.95
"""Weight that the moving average gives to the batches before the newest one."""

BINS = 8192
"""Bins of a histogram, half of them below zero. At least a quarter lie between lo and hi."""

MIN_EXPONENT = -160
"""Bins are never narrower than 2**MIN_EXPONENT: below float32's smallest number times BINS."""

_STORAGE_VERSION = 2


class Stat(Protocol):
    """What all statistics can do."""

    def merge(self, other: Any) -> Any:
        """The statistic of the samples of both, ``self``'s first."""
        ...

    def to_storage(self) -> tuple[Header, dict[str, Array]]:
        """A JSON-serialisable header and named arrays."""
        ...


@dataclass
class RangeStat:
    """Extremes of a whole value.

    Attributes:
        lo: smallest finite element; +inf while nothing was seen.
        hi: largest finite element; -inf while nothing was seen.
        batches: number of batches with at least one element that counts.
        sum_lo: sum over batches of the batch's smallest element.
        sum_hi: the same of the largest.
        ema_lo: sum over batches i of ``MOMENTUM**(batches - 1 - i) * lo_i``.
        ema_hi: the same of the largest.
    """

    lo: float = np.inf
    hi: float = -np.inf
    batches: int = 0
    sum_lo: float = 0.0
    sum_hi: float = 0.0
    ema_lo: float = 0.0
    ema_hi: float = 0.0

    def add(self, lo: float, hi: float) -> None:
        """Count a batch whose elements lie in ``[lo, hi]``."""
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.batches += 1
        self.sum_lo += lo
        self.sum_hi += hi
        self.ema_lo = MOMENTUM * self.ema_lo + lo
        self.ema_hi = MOMENTUM * self.ema_hi + hi

    @property
    def empty(self) -> bool:
        """No element was seen."""
        return self.batches == 0

    @property
    def mean(self) -> tuple[float, float]:
        """Mean over batches of the smallest and of the largest element."""
        n = max(1, self.batches)
        return self.sum_lo / n, self.sum_hi / n

    @property
    def moving(self) -> tuple[float, float]:
        """Moving averages of the extremes, corrected for the start (weights sum to one)."""
        weight = (1 - MOMENTUM**self.batches) / (1 - MOMENTUM) or 1.0
        return self.ema_lo / weight, self.ema_hi / weight

    def merge(self, other: RangeStat) -> RangeStat:
        """The statistic of both; the moving average takes ``other``'s batches as the newer."""
        decay = MOMENTUM**other.batches
        return RangeStat(
            min(self.lo, other.lo),
            max(self.hi, other.hi),
            self.batches + other.batches,
            self.sum_lo + other.sum_lo,
            self.sum_hi + other.sum_hi,
            decay * self.ema_lo + other.ema_lo,
            decay * self.ema_hi + other.ema_hi,
        )

    def to_storage(self) -> tuple[Header, dict[str, Array]]:
        """See :class:`Stat`."""
        values = np.array([self.lo, self.hi, *_tail(self)], np.float64)
        return {"batches": self.batches}, {"values": values}

    @classmethod
    def from_storage(cls, header: Header, arrays: Mapping[str, Array]) -> Self:
        """The inverse of :meth:`to_storage`."""
        lo, hi, *tail = (float(v) for v in arrays["values"])
        return cls(lo, hi, int(header["batches"]), *tail)


def _tail(stat: RangeStat) -> tuple[float, float, float, float]:
    return stat.sum_lo, stat.sum_hi, stat.ema_lo, stat.ema_hi


@dataclass
class ChannelStat:
    """Extremes and sums for each index of one axis.

    Attributes:
        lo: ``[C]`` float64, smallest finite element; +inf where nothing was seen.
        hi: ``[C]`` float64, largest finite element; -inf where nothing was seen.
        sum: ``[C]`` float64.
        sum_abs: ``[C]`` float64, sum of ``|x|``.
        sum_sq: ``[C]`` float64, sum of ``x**2``.
        count: ``[C]`` int64, elements that count.
    """

    lo: Float64
    hi: Float64
    sum: Float64
    sum_abs: Float64
    sum_sq: Float64
    count: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, channels: int) -> Self:
        """The statistic of no samples."""
        zero = np.zeros(channels)
        return cls(
            np.full(channels, np.inf),
            np.full(channels, -np.inf),
            zero.copy(),
            zero.copy(),
            zero.copy(),
            np.zeros(channels, np.int64),
        )

    @property
    def mean(self) -> Float64:
        """``[C]``; 0 where nothing was seen."""
        return self.sum / np.maximum(self.count, 1)

    @property
    def mean_abs(self) -> Float64:
        """``[C]``, mean of ``|x|``; 0 where nothing was seen."""
        return self.sum_abs / np.maximum(self.count, 1)

    @property
    def mean_sq(self) -> Float64:
        """``[C]``, mean of ``x**2``; 0 where nothing was seen."""
        return self.sum_sq / np.maximum(self.count, 1)

    @property
    def amax(self) -> Float64:
        """``[C]``, largest magnitude; 0 where nothing was seen."""
        return np.where(self.count > 0, np.maximum(-self.lo, self.hi), 0.0)

    def merge(self, other: ChannelStat) -> ChannelStat:
        """The statistic of both.

        Raises:
            UnsupportedError: STAT-CHANNELS when the numbers of channels differ.
        """
        _same_channels(self.lo.size, other.lo.size)
        return ChannelStat(
            np.minimum(self.lo, other.lo),
            np.maximum(self.hi, other.hi),
            self.sum + other.sum,
            self.sum_abs + other.sum_abs,
            self.sum_sq + other.sum_sq,
            self.count + other.count,
        )

    def to_storage(self) -> tuple[Header, dict[str, Array]]:
        """See :class:`Stat`."""
        return {}, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_storage(cls, header: Header, arrays: Mapping[str, Array]) -> Self:
        """The inverse of :meth:`to_storage`."""
        return cls(**{f.name: arrays[f.name] for f in dataclasses.fields(cls)})


@dataclass
class Histogram:
    """A two-sided histogram whose bins have a power-of-two width and start at a multiple of it.

    Bin i covers ``[lo_edge + i * width, lo_edge + (i + 1) * width)``, with ``lo_edge`` equal to
    ``-BINS / 2 * width``, so that zero is always an edge. The width is the smallest power of two
    with which all elements fit. When an element does not fit, the width doubles and neighbouring
    bins are added up; floor(floor(x / w) / 2) = floor(x / 2w), so the result does not depend on
    the order in which elements came, and merging histograms is exact.

    Attributes:
        exponent: ``width = 2**exponent``.
        counts: ``[BINS]`` int64.
        lo: smallest finite element, exactly; +inf while nothing was seen.
        hi: largest finite element, exactly; -inf while nothing was seen.
    """

    exponent: int = MIN_EXPONENT
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    lo: float = np.inf
    hi: float = -np.inf

    @property
    def width(self) -> float:
        """Width of a bin."""
        return float(2.0**self.exponent)

    @property
    def lo_edge(self) -> float:
        """Left edge of the first bin."""
        return -BINS // 2 * self.width

    @property
    def total(self) -> int:
        """Number of elements."""
        return int(self.counts.sum())

    @property
    def empty(self) -> bool:
        """No element was seen."""
        return self.lo > self.hi

    def edges(self) -> Float64:
        """``[BINS + 1]`` edges of the bins."""
        return np.arange(-BINS // 2, BINS // 2 + 1, dtype=np.float64) * self.width

    def add(self, values: Array, scratch: Scratch | None = None) -> None:
        """Count the finite elements of ``values``, float32 or float64 of any shape."""
        flat = values.reshape(-1)
        if flat.size == 0:
            return
        lo, hi = float(flat.min()), float(flat.max())
        if not (np.isfinite(lo) and np.isfinite(hi)):
            self.add(flat[np.isfinite(flat)], scratch)
            return
        self.add_finite(flat, lo, hi, scratch)

    def add_finite(self, flat: Array, lo: float, hi: float, scratch: Scratch | None = None) -> None:
        """Count ``flat`` ``[n]``, all finite, n > 0, with extremes ``lo`` and ``hi``."""
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self._widen(_exponent_for(self.lo, self.hi))
        self.counts += (scratch or Scratch()).count(flat, self.exponent)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of the elements of both."""
        merged = Histogram(self.exponent, self.counts.copy(), self.lo, self.hi)
        finer = Histogram(other.exponent, other.counts.copy(), other.lo, other.hi)
        merged._widen(other.exponent)
        finer._widen(self.exponent)
        merged.counts += finer.counts
        merged.lo, merged.hi = min(self.lo, other.lo), max(self.hi, other.hi)
        return merged

    def _widen(self, exponent: int) -> None:
        """Make bins at least ``2**exponent`` wide."""
        doublings = exponent - self.exponent
        if doublings <= 0:
            return
        self.exponent = exponent
        used = np.flatnonzero(self.counts)
        if used.size:
            target = ((used - BINS // 2) >> min(doublings, 62)) + BINS // 2
            counts = np.zeros_like(self.counts)
            np.add.at(counts, target, self.counts[used])
            self.counts = counts

    def to_storage(self) -> tuple[Header, dict[str, Array]]:
        """See :class:`Stat`."""
        return {"exponent": self.exponent}, {
            "counts": self.counts,
            "range": np.array([self.lo, self.hi]),
        }

    @classmethod
    def from_storage(cls, header: Header, arrays: Mapping[str, Array]) -> Self:
        """The inverse of :meth:`to_storage`."""
        lo, hi = (float(v) for v in arrays["range"])
        return cls(int(header["exponent"]), arrays["counts"], lo, hi)


def _exponent_for(lo: float, hi: float) -> int:
    """Smallest e with ``-BINS/2 <= floor(x / 2**e) < BINS/2`` for x in ``[lo, hi]``."""
    half = BINS // 2
    if lo == hi == 0:
        return MIN_EXPONENT
    # frexp: |x| = m * 2**e with 0.5 <= m < 1, so |x| < 2**e and |x| >= 2**(e - 1).
    exponent = int(np.frexp(max(-lo, hi))[1]) - half.bit_length()
    while hi >= half * 2.0**exponent or lo < -half * 2.0**exponent:
        exponent += 1
    return max(MIN_EXPONENT, exponent)


class Scratch:
    """Buffers for counting bins, small enough to stay in the processor's second-level cache."""

    CHUNK: ClassVar[int] = 1 << 15

    def __init__(self) -> None:
        self._scaled: dict[str, Array] = {
            kind: np.empty(self.CHUNK, kind) for kind in ("float32", "float64")
        }
        self._index = np.empty(self.CHUNK, np.intp)

    def count(self, flat: Array, exponent: int) -> npt.NDArray[np.int64]:
        """``[BINS]`` counts of ``floor(x / 2**exponent) + BINS / 2``; all must fall inside."""
        # Scaling up is exact in float32. Scaling down could lose the sign of a subnormal number
        # and with it the bin, which would then depend on the order of the samples.
        kind = "float32" if flat.dtype == np.float32 and -120 < exponent <= 0 else "float64"
        scaled_all, counts = self._scaled[kind], np.zeros(BINS, np.int64)
        factor = scaled_all.dtype.type(2.0**-exponent)
        for start in range(0, flat.size, self.CHUNK):
            part = flat[start : start + self.CHUNK]
            scaled, index = scaled_all[: part.size], self._index[: part.size]
            np.multiply(part, factor, out=scaled)
            np.floor(scaled, out=scaled)
            scaled += BINS // 2
            np.copyto(index, scaled, casting="unsafe")
            counts += np.bincount(index, minlength=BINS)
        return counts


@dataclass
class RowsStat:
    """A sample of rows that does not depend on the order in which they came.

    Every row has a 64-bit key, a hash of the feeds it belongs to and of its place; the rows with
    the smallest keys are kept (bottom-k sampling), so merging is exact.

    Attributes:
        limit: the most rows to keep.
        rows: ``[n, C]`` float32, n <= limit, in the order of their keys.
        keys: ``[n]`` uint64.
        seen: number of rows that were offered.
    """

    limit: int
    rows: npt.NDArray[np.float32]
    keys: npt.NDArray[np.uint64]
    seen: int = 0

    @classmethod
    def zeros(cls, channels: int, limit: int) -> Self:
        """The statistic of no samples."""
        return cls(limit, np.zeros((0, channels), np.float32), np.zeros(0, np.uint64))

    def add(self, rows: Array, keys: npt.NDArray[np.uint64]) -> None:
        """Offer ``rows`` ``[m, C]`` with ``keys`` ``[m]``."""
        _same_channels(self.rows.shape[1], rows.shape[1])
        self.seen += len(rows)
        if len(self.keys) == self.limit:
            better = keys < self.keys[-1]
            rows, keys = rows[better], keys[better]
        if not len(keys):
            return
        if len(keys) > self.limit:
            smallest = np.argpartition(keys, self.limit - 1)[: self.limit]
            rows, keys = rows[smallest], keys[smallest]
        all_keys = np.concatenate([self.keys, keys])
        kept = np.argsort(all_keys, kind="stable")[: self.limit]
        self.rows = np.concatenate([self.rows, rows.astype(np.float32)])[kept]
        self.keys = all_keys[kept]

    def merge(self, other: RowsStat) -> RowsStat:
        """The sample of the rows offered to either."""
        if self.limit != other.limit:
            raise InternalError("STAT-MERGE", "row samples with different limits")
        merged = RowsStat(self.limit, self.rows, self.keys, self.seen)
        merged.add(other.rows, other.keys)
        merged.seen = self.seen + other.seen
        return merged

    def to_storage(self) -> tuple[Header, dict[str, Array]]:
        """See :class:`Stat`."""
        return {"limit": self.limit, "seen": self.seen}, {"rows": self.rows, "keys": self.keys}

    @classmethod
    def from_storage(cls, header: Header, arrays: Mapping[str, Array]) -> Self:
        """The inverse of :meth:`to_storage`."""
        return cls(int(header["limit"]), arrays["rows"], arrays["keys"], int(header["seen"]))


@dataclass
class MomentStat:
    """Second moment of the rows of a value, kept in a quarter of what float64 would take.

    A sample's products are summed in float32 either way; adding the samples up in float32 too
    costs less accuracy than a solver's smallest damping.

    Attributes:
        upper: ``[C, C]`` float32 in column-major order; the upper triangle of the sum over rows of
            the outer product ``x x.T``. The rest is zero.
        count: number of rows.
    """

    upper: npt.NDArray[np.float32]
    count: int = 0

    @classmethod
    def zeros(cls, channels: int) -> Self:
        """The statistic of no samples."""
        return cls(np.zeros((channels, channels), np.float32, order="F"))

    @property
    def gram(self) -> Float64:
        """The whole symmetric matrix ``X.T @ X``, ``[C, C]`` float64."""
        full = self.upper.astype(np.float64, order="C")
        full += np.triu(full, 1).T
        return full

    def add(self, rows: npt.NDArray[np.float32]) -> None:
        """Count ``rows`` ``[m, C]``, all finite."""
        from scipy.linalg import blas

        _same_channels(len(self.upper), rows.shape[1])
        columns = np.ascontiguousarray(rows).T
        self.upper = blas.ssyrk(1.0, columns, beta=1.0, c=self.upper, overwrite_c=1)
        self.count += len(rows)

    def merge(self, other: MomentStat) -> MomentStat:
        """The statistic of both."""
        _same_channels(len(self.upper), len(other.upper))
        return MomentStat(self.upper + other.upper, self.count + other.count)

    def to_storage(self) -> tuple[Header, dict[str, Array]]:
        """See :class:`Stat`."""
        return {"count": self.count}, {"upper": self.upper}

    @classmethod
    def from_storage(cls, header: Header, arrays: Mapping[str, Array]) -> Self:
        """The inverse of :meth:`to_storage`."""
        return cls(np.asfortranarray(arrays["upper"]), int(header["count"]))


def _same_channels(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise UnsupportedError(
            "STAT-CHANNELS",
            f"the number of channels of a value changes between samples: {ours} and {theirs}",
            "ask for a statistic per tensor, or make the samples equal in that dimension",
        )


AnyStat: TypeAlias = RangeStat | ChannelStat | Histogram | RowsStat | MomentStat

_CLASSES: dict[StatKind, type[AnyStat]] = {
    "range": RangeStat,
    "channel": ChannelStat,
    "histogram": Histogram,
    "rows": RowsStat,
    "moment": MomentStat,
}

S = TypeVar("S", RangeStat, ChannelStat, Histogram, RowsStat, MomentStat)


class Statistics:
    """The answers to the requests of a sweep.

    Args:
        stats: one statistic for each request.
        samples: number of samples that were run.
        source: where the samples came from, for reports.
    """

    def __init__(
        self,
        stats: Mapping[StatRequest, AnyStat] | None = None,
        *,
        samples: int = 0,
        source: str = "",
    ) -> None:
        self._stats: dict[StatRequest, AnyStat] = dict(stats or {})
        self.samples = samples
        self.source = source

    def __contains__(self, request: StatRequest) -> bool:
        return request in self._stats

    def __len__(self) -> int:
        return len(self._stats)

    def __iter__(self) -> Iterator[StatRequest]:
        return iter(self._stats)

    def requests(self) -> list[StatRequest]:
        """What was asked for, in the order of asking."""
        return list(self._stats)

    def get(self, request: StatRequest) -> AnyStat:
        """The answer to ``request``.

        Raises:
            InternalError: STAT-NOT-REQUESTED.
        """
        try:
            return self._stats[request]
        except KeyError:
            raise InternalError(
                "STAT-NOT-REQUESTED", f"{request} was read but never requested"
            ) from None

    def range(self, value: str, *, mask: str | None = None) -> RangeStat:
        """The range of ``value``.

        Raises:
            InternalError: STAT-NOT-REQUESTED or STAT-AMBIGUOUS.
        """
        return self._only(value, "range", RangeStat, mask=mask)

    def channel(
        self, value: str, *, axis: int | None = None, mask: str | None = None
    ) -> ChannelStat:
        """The statistic per channel of ``value``; ``axis`` as it was requested."""
        return self._only(value, "channel", ChannelStat, axis=axis, mask=mask)

    def histogram(self, value: str, *, mask: str | None = None) -> Histogram:
        """The histogram of ``value``."""
        return self._only(value, "histogram", Histogram, mask=mask)

    def rows(self, value: str, *, axis: int | None = None, mask: str | None = None) -> RowsStat:
        """The row sample of ``value``."""
        return self._only(value, "rows", RowsStat, axis=axis, mask=mask)

    def moment(self, value: str, *, axis: int | None = None, mask: str | None = None) -> MomentStat:
        """The second moment of the rows of ``value``."""
        return self._only(value, "moment", MomentStat, axis=axis, mask=mask)

    def _only(
        self,
        value: str,
        kind: StatKind,
        cls: type[S],
        *,
        axis: int | None = None,
        mask: str | None = None,
    ) -> S:
        """The one statistic that fits; ``axis`` and ``mask`` of None fit any."""
        found = [
            (request, stat)
            for request, stat in self._stats.items()
            if (request.value, request.kind) == (value, kind)
            and axis in (None, request.axis)
            and mask in (None, request.mask)
        ]
        if not found:
            raise InternalError(
                "STAT-NOT-REQUESTED", f"the {kind} statistic of `{value}` was never requested"
            )
        if len(found) > 1:
            listed = ", ".join(str(request) for request, _ in found)
            raise InternalError(
                "STAT-AMBIGUOUS", f"more than one {kind} statistic of `{value}`: {listed}"
            )
        stat = found[0][1]
        assert isinstance(stat, cls)
        return stat

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of the samples of both; a request of one of them only is kept.

        Raises:
            UnsupportedError: STAT-CHANNELS when a value has different channel counts.
        """
        merged = dict(self._stats)
        for request, stat in other._stats.items():
            ours: Any = merged.get(request)
            merged[request] = stat if ours is None else ours.merge(stat)
        source = (
            self.source
            if other.source in ("", self.source)
            else (f"{self.source} + {other.source}" if self.source else other.source)
        )
        return Statistics(merged, samples=self.samples + other.samples, source=source)

    def to_storage(self) -> tuple[Header, dict[str, Array]]:
        """A JSON-serialisable header and named arrays; see ``Storable`` in the pass contract."""
        entries, arrays = [], {}
        for number, (request, stat) in enumerate(self._stats.items()):
            header, parts = stat.to_storage()
            entries.append({"request": dataclasses.asdict(request), "header": header})
            arrays.update({f"{number}/{name}": part for name, part in parts.items()})
        return {
            "version": _STORAGE_VERSION,
            "samples": self.samples,
            "source": self.source,
            "stats": entries,
        }, arrays

    @classmethod
    def from_storage(cls, header: Header, arrays: Mapping[str, Array]) -> Self:
        """The inverse of :meth:`to_storage`.

        Raises:
            DataError: STAT-STORAGE when the file was written by another version or is damaged.
        """
        if header.get("version") != _STORAGE_VERSION:
            raise DataError(
                "STAT-STORAGE",
                f"stored statistics have version {header.get('version')}, not {_STORAGE_VERSION}",
                "run the calibration again",
            )
        grouped: dict[int, dict[str, Array]] = {}
        for key, array in arrays.items():
            place, name = key.split("/", 1)
            grouped.setdefault(int(place), {})[name] = array
        stats: dict[StatRequest, AnyStat] = {}
        try:
            for number, entry in enumerate(header["stats"]):
                request = StatRequest(**entry["request"])
                parts = grouped.get(number, {})
                stats[request] = _CLASSES[request.kind].from_storage(entry["header"], parts)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "STAT-STORAGE", f"stored statistics are damaged: {error!r}", "calibrate again"
            ) from error
        return cls(stats, samples=header["samples"], source=header["source"])
