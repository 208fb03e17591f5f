from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.calibration.requests import StatRequest
from onnxq.calibration.statistics import (
    BINS,
    MOMENTUM,
    ChannelStat,
    Histogram,
    MomentStat,
    RangeStat,
    RowsStat,
    Statistics,
)
from onnxq.errors import DataError, InternalError, UnsupportedError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BATCHES = st.lists(st.lists(FLOATS, min_size=1, max_size=40), min_size=1, max_size=6)


def histogram_of(*batches: list[float] | np.ndarray) -> Histogram:
    found = Histogram()
    for batch in batches:
        found.add(np.asarray(batch, np.float32))
    return found


def same_histogram(a: Histogram, b: Histogram) -> bool:
    return (a.exponent, a.lo, a.hi) == (b.exponent, b.lo, b.hi) and bool(
        (a.counts == b.counts).all()
    )


@given(BATCHES)
@settings(max_examples=150, deadline=None)
def test_histogram_equals_numpys_on_its_own_edges(batches: list[list[float]]) -> None:
    found = histogram_of(*batches)
    everything = np.array(list(itertools.chain(*batches)), np.float32).astype(np.float64)
    # numpy closes the last bin on the right; one more edge keeps ours half open.
    edges = np.append(found.edges(), np.inf)
    expected, _ = np.histogram(everything, edges)
    np.testing.assert_array_equal(found.counts, expected[:BINS])
    assert expected[BINS] == 0
    assert (found.lo, found.hi) == (everything.min(), everything.max())


@given(BATCHES)
@settings(max_examples=150, deadline=None)
def test_histogram_does_not_depend_on_order_or_grouping(batches: list[list[float]]) -> None:
    streamed = histogram_of(*batches)
    assert same_histogram(streamed, histogram_of(*reversed(batches)))
    assert same_histogram(streamed, histogram_of(list(itertools.chain(*batches))))
    parts = [histogram_of(batch) for batch in batches]
    left = parts[0]
    for part in parts[1:]:
        left = left.merge(part)
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = part.merge(right)
    assert same_histogram(streamed, left)
    assert same_histogram(streamed, right)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_histogram_resolves_any_magnitude(scale: float, rng: np.random.Generator) -> None:
    x = (rng.uniform(-1, 1, 5000) * scale).astype(np.float32)
    found = histogram_of(x)
    assert found.total == x.size
    used = np.flatnonzero(found.counts)
    if scale > 1e-40:  # subnormal numbers have too few values to fill bins
        assert used[-1] - used[0] + 1 > BINS // 4


def test_histogram_of_float64_and_of_power_of_two_ends() -> None:
    found = Histogram()
    found.add(np.array([-4096.0, 4095.999999999]))
    assert found.width == 1.0
    found.add(np.array([4096.0]))
    assert found.width == 2.0
    assert found.total == 3


def test_histogram_leaves_out_what_is_not_finite() -> None:
    found = histogram_of([np.nan, -np.inf, 1.0, np.inf, -2.0])
    assert (found.total, found.lo, found.hi) == (2, -2.0, 1.0)
    assert histogram_of([np.nan]).empty


def test_zeros_do_not_decide_the_width() -> None:
    found = histogram_of(np.zeros(10), [1e-6])
    assert found.counts[BINS // 2] == 10
    assert found.width < 1e-9


def test_moving_average_is_the_normalised_exponential_sum() -> None:
    highs = [1.0, 3.0, 2.0, 5.0]
    stat = RangeStat()
    for hi in highs:
        stat.add(-1.0, hi)
    weights = MOMENTUM ** np.arange(len(highs))[::-1]
    assert stat.moving == pytest.approx((-1.0, np.average(highs, weights=weights)))
    assert stat.mean == (-1.0, np.mean(highs))
    assert (stat.lo, stat.hi) == (-1.0, 5.0)


def test_range_merge_is_associative_and_equals_streaming() -> None:
    values = [(-1.0, 2.0), (-3.0, 1.0), (0.5, 7.0), (-0.25, 0.5), (-8.0, 1.5)]
    parts = []
    streamed = RangeStat()
    for lo, hi in values:
        streamed.add(lo, hi)
        parts.append(RangeStat())
        parts[-1].add(lo, hi)
    a, b, c, d, e = parts
    left = a.merge(b).merge(c).merge(d).merge(e)
    right = a.merge(b.merge(c.merge(d.merge(e))))
    for merged in (left, right):
        assert (merged.lo, merged.hi, merged.batches) == (-8.0, 7.0, 5)
        assert merged.moving == pytest.approx(streamed.moving, rel=1e-12)
        assert merged.mean == pytest.approx(streamed.mean, rel=1e-12)


def test_rows_are_a_uniform_sample_that_ignores_order(rng: np.random.Generator) -> None:
    rows = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    keys = rng.integers(0, 2**63, 1000).astype(np.uint64)
    whole = RowsStat.zeros(3, 50)
    whole.add(rows, keys)
    parts = []
    for k in rng.permutation(10):
        part = RowsStat.zeros(3, 50)
        part.add(rows[k * 100 : k * 100 + 100], keys[k * 100 : k * 100 + 100])
        parts.append(part)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    expected = rows[np.argsort(keys)[:50]]
    np.testing.assert_array_equal(whole.rows, expected)
    np.testing.assert_array_equal(merged.rows, expected)
    assert merged.seen == whole.seen == 1000


def test_changing_channel_counts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="channels") as caught:
        ChannelStat.zeros(3).merge(ChannelStat.zeros(4))
    assert caught.value.code == "STAT-CHANNELS"


def everything() -> Statistics:
    channel = ChannelStat.zeros(2)
    channel.lo[:] = -1
    rows = RowsStat.zeros(2, 4)
    rows.add(np.ones((3, 2), np.float32), np.array([5, 1, 9], np.uint64))
    moment = MomentStat.zeros(2)
    moment.add(np.ones((7, 2), np.float32))
    ranged = RangeStat()
    ranged.add(-1, 4)
    return Statistics(
        {
            StatRequest("a", "range"): ranged,
            StatRequest("a", "channel", axis=1, mask="m"): channel,
            StatRequest("b/c", "histogram"): histogram_of([1.0, 2.0]),
            StatRequest("a", "rows", limit=4): rows,
            StatRequest("a", "moment"): moment,
        },
        samples=3,
        source="here",
    )


def test_storage_gives_everything_back() -> None:
    before = everything()
    header, arrays = before.to_storage()
    after = Statistics.from_storage(json.loads(json.dumps(header)), arrays)
    assert after.requests() == before.requests()
    assert (after.samples, after.source) == (3, "here")
    for request in before.requests():
        (h1, a1), (h2, a2) = before.get(request).to_storage(), after.get(request).to_storage()
        assert h1 == h2
        for name in a1:
            np.testing.assert_array_equal(a1[name], a2[name])
            assert a1[name].dtype == a2[name].dtype


def test_damaged_storage_is_refused() -> None:
    header, arrays = everything().to_storage()
    for bad in ({**header, "version": 0}, {**header, "stats": [{"request": {}}]}):
        with pytest.raises(DataError) as caught:
            Statistics.from_storage(bad, arrays)
        assert caught.value.code == "STAT-STORAGE"


def test_only_what_was_requested_can_be_read() -> None:
    stats = everything()
    assert stats.range("a").hi == 4
    assert stats.channel("a").lo[0] == -1
    assert stats.moment("a").count == 7
    for read in (
        lambda: stats.range("b/c"),
        lambda: stats.histogram("a"),
        lambda: stats.channel("a", axis=0),
        lambda: stats.get(StatRequest("a", "range", mask="m")),
    ):
        with pytest.raises(InternalError) as caught:
            read()
        assert caught.value.code == "STAT-NOT-REQUESTED"


def test_two_statistics_that_fit_are_ambiguous() -> None:
    stats = Statistics(
        {
            StatRequest("a", "channel", axis=0): ChannelStat.zeros(1),
            StatRequest("a", "channel", axis=1): ChannelStat.zeros(2),
        }
    )
    with pytest.raises(InternalError, match="more than one"):
        stats.channel("a")
    assert stats.channel("a", axis=1).lo.size == 2


def test_statistics_merge_counts_samples() -> None:
    merged = everything().merge(everything())
    assert merged.samples == 6
    assert merged.moment("a").count == 14
    assert merged.histogram("b/c").total == 4


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(InternalError, match="limit"):
        StatRequest("a", "rows")
    with pytest.raises(InternalError, match="no statistic"):
        StatRequest("a", "median")  # type: ignore[arg-type]
