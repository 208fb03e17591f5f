"""The oracles: brute force over the data, and the algorithms as published, in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from onnxq.calibration.ranges import Method, _least_divergence, choose_range, weight_range
from onnxq.calibration.statistics import Histogram, RangeStat
from onnxq.errors import DataError, InternalError, SpecError, UnsupportedError
from onnxq.formats.integer import IntFormat, affine_params, dequantize, quantize

S8, U8, U4 = IntFormat(8, True), IntFormat(8, False), IntFormat(4, False)

# The histogram blurs elements over bins of 1/2048 to 1/4096 of the largest magnitude.
MSE_SLACK = 1.01


def histogram_of(x: np.ndarray) -> Histogram:
    found = Histogram()
    found.add(x.astype(np.float32))
    return found


def sample(kind: str, rng: np.random.Generator) -> np.ndarray:
    n = 40_000
    x = {
        "normal": lambda: rng.normal(size=n),
        "shifted": lambda: rng.normal(loc=1.5, size=n),
        "laplace": lambda: rng.laplace(size=n),
        "relu": lambda: np.maximum(rng.normal(size=n), 0),
        "gelu-like": lambda: np.where(
            rng.random(n) < 0.7, -0.17 * rng.random(n), 5 * rng.random(n)
        ),
        "outlier": lambda: np.append(rng.normal(size=n), [40.0, -9.0]),
        "negative": lambda: -rng.gamma(2.0, size=n),
    }[kind]()
    return x.astype(np.float32)


KINDS = ("normal", "shifted", "laplace", "relu", "gelu-like", "outlier", "negative")


def error_of(x: np.ndarray, bounds: tuple[float, float], fmt: IntFormat, symmetric: bool) -> float:
    scale, zero = affine_params(*bounds, fmt, symmetric=symmetric)
    restored = dequantize(quantize(x, scale, zero, fmt), scale, zero)
    return float(np.mean((restored.astype(np.float64) - x) ** 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fmt", "symmetric"), [(S8, True), (U8, False), (U4, False)])
def test_mse_is_as_good_as_a_brute_force_search_on_the_data(
    kind: str, fmt: IntFormat, symmetric: bool, rng: np.random.Generator
) -> None:
    x = sample(kind, rng)
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    shrink = np.linspace(0.05, 1, 20)
    if symmetric:
        tried = [(-a, a) for a in shrink * max(-lo, hi)]
    else:
        tried = [(a, b) for a in shrink * lo for b in shrink * hi]
    best = min(error_of(x, bounds, fmt, symmetric) for bounds in tried)
    found = choose_range(histogram_of(x), "mse", fmt, symmetric=symmetric)
    assert error_of(x, found, fmt, symmetric) <= best * MSE_SLACK


def published_entropy(counts: np.ndarray, width: float, bits: int) -> float:
    """The search of Wu et al. as modelopt and TensorRT describe it, one candidate at a time."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    levels = 1 << (bits - 1)
    divergences = []
    candidates = range(128, len(bins) + 1)
    for i in candidates:
        reference = bins[:i].copy()
        reference[-1] += bins[i:].sum()
        group = np.digitize(np.arange(i), np.linspace(0, i, levels + 1)) - 1
        coarse = np.zeros(i)
        for level in range(levels):
            members = (group == level) & (bins[:i] > 0)
            if members.any():
                coarse[members] = bins[:i][group == level].sum() / members.sum()
        divergences.append(scipy.stats.entropy(reference, coarse))
    best = min(divergences)
    last = max(k for k, d in enumerate(divergences) if d <= best + 1e-10)
    return candidates[last] * width


@pytest.mark.parametrize("kind", ["normal", "laplace", "outlier", "relu"])
def test_symmetric_entropy_is_the_published_search(kind: str, rng: np.random.Generator) -> None:
    # Few enough bins for the loops: magnitudes just above a power of two fill 2049 of them.
    x = sample(kind, rng)
    x = x / np.abs(x).max() * 1.01
    stat = histogram_of(x)
    folded, _ = np.histogram(np.abs(x).astype(np.float64), np.arange(2100) * stat.width)
    folded = folded[: np.flatnonzero(folded)[-1] + 1]
    _, found = choose_range(stat, "entropy", S8, symmetric=True)
    assert found == pytest.approx(min(published_entropy(folded, stat.width, 8), np.abs(x).max()))


def test_entropy_ties_go_to_the_widest_range() -> None:
    counts = np.zeros(300)
    counts[:10] = 4.0  # every candidate restores this exactly
    assert _least_divergence(counts, 0.0, 128) == 300


@pytest.mark.parametrize("kind", ["normal", "laplace", "outlier"])
def test_asymmetric_entropy_clips_like_onnxruntimes(kind: str, rng: np.random.Generator) -> None:
    """Their search keeps both ends equally far from zero; ours is free, so only sizes compare."""
    x = sample(kind, rng)
    lo, hi = choose_range(histogram_of(x), "entropy", U8)
    assert x.min() <= lo < -2
    assert 2 < hi <= x.max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentile_agrees_with_onnxruntime(
    symmetric: bool, percentile: float, rng: np.random.Generator
) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    x = sample("laplace", rng)[:-7]  # no percentile falls exactly between two elements
    collector = calibrate.HistogramCollector(
        method="percentile",
        symmetric=symmetric,
        num_bins=4096,
        num_quantized_bins=128,
        percentile=percentile,
        scenario="same",
    )
    collector.collect({"x": [x]})
    theirs = collector.compute_percentile()["x"]
    lo, hi = choose_range(
        histogram_of(x), "percentile", U8, symmetric=symmetric, percentile=percentile
    )
    bin_width = float(x.max() - x.min()) / 2048
    assert float(theirs[0]) == pytest.approx(lo, abs=2 * bin_width)
    assert float(theirs[1]) == pytest.approx(hi, abs=2 * bin_width)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.9])
def test_percentile_keeps_that_share_and_not_a_bin_more(
    percentile: float, rng: np.random.Generator
) -> None:
    x = rng.normal(size=40_000).astype(np.float32)
    stat = histogram_of(x)
    lo, hi = choose_range(stat, "percentile", U8, percentile=percentile)
    tail = (100 - percentile) / 200
    assert np.mean(x < lo) <= tail < np.mean(x < lo + stat.width)
    assert np.mean(x > hi) <= tail <= np.mean(x >= hi - stat.width)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "values",
    [[0.0], [3.0], [-3.0], [0.0] * 999 + [1e6], [1e-30, -1e-30], [3e38, -3e38], [1e-44]],
    ids=str,
)
def test_sparse_and_extreme_histograms_give_a_sane_range(
    method: Method, symmetric: bool, values: list[float]
) -> None:
    x = np.array(values, np.float32)
    lo, hi = choose_range(histogram_of(x), method, U8, symmetric=symmetric)
    widest = np.abs(x).max() * 1.01
    assert -widest <= lo <= 0 <= hi <= widest
    assert not symmetric or lo == -hi
    if len(values) == 1:  # nothing to clip
        assert max(-lo, hi) == pytest.approx(abs(values[0]), rel=0.01)


def test_sixteen_bits_keep_the_whole_range(rng: np.random.Generator) -> None:
    x = sample("normal", rng)
    stat = histogram_of(x)
    assert choose_range(stat, "entropy", IntFormat(16, False)) == (stat.lo, stat.hi)
    lo, hi = choose_range(stat, "mse", IntFormat(16, False))
    assert hi - lo > 0.97 * (stat.hi - stat.lo)


def test_range_statistics_serve_minmax_and_moving_average() -> None:
    stat = RangeStat()
    stat.add(-1.0, 2.0)
    stat.add(-3.0, 8.0)
    assert choose_range(stat, "minmax", U8) == (-3.0, 8.0)
    assert choose_range(stat, "minmax", U8, symmetric=True) == (-8.0, 8.0)
    lo, hi = choose_range(stat, "moving-average", U8)
    assert (lo, hi) == pytest.approx((-(0.95 + 3) / 1.95, (0.95 * 2 + 8) / 1.95))


def test_misuse_is_named() -> None:
    filled = RangeStat()
    filled.add(0, 1)
    with pytest.raises(DataError) as empty:
        choose_range(Histogram(), "minmax", U8)
    assert empty.value.code == "RANGE-EMPTY"
    with pytest.raises(InternalError) as wrong:
        choose_range(filled, "entropy", U8)
    assert wrong.value.code == "RANGE-STATISTIC"
    with pytest.raises(SpecError) as unknown:
        choose_range(filled, "median", U8)  # type: ignore[arg-type]
    assert unknown.value.code == "RANGE-METHOD"
    with pytest.raises(SpecError) as share:
        choose_range(filled, "minmax", U8, percentile=0)
    assert share.value.code == "RANGE-PERCENTILE"


@pytest.mark.parametrize(("fmt", "symmetric"), [(IntFormat(4, True), True), (U4, False)])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_weight_mse_is_near_the_full_grid_of_gptq(
    fmt: IntFormat, symmetric: bool, axis: int | None, rng: np.random.Generator
) -> None:
    w = rng.standard_t(4, size=(24, 96)).astype(np.float32)
    lo, hi = weight_range(w, axis, "mse", fmt, symmetric=symmetric)
    rows = w.reshape(1, -1) if axis is None else np.moveaxis(w, axis, 0)
    assert np.shape(lo) == (() if axis is None else (len(rows),))
    gained = 0
    for row, a, b in zip(rows, np.atleast_1d(lo), np.atleast_1d(hi), strict=True):
        low, high = min(0.0, row.min()), max(0.0, row.max())

        def loss(bounds: tuple[float, float], row: np.ndarray = row) -> float:
            s, z = affine_params(*bounds, fmt, symmetric=symmetric)
            return float((np.abs(dequantize(quantize(row, s, z, fmt), s, z) - row) ** 2.4).sum())

        if symmetric:
            high = max(-low, high)
            low = -high
        grid = [loss((low * p, high * p)) for p in 1 - np.arange(80) / 100]
        assert loss((a, b)) <= min(grid) * 1.05
        gained += loss((a, b)) < 0.98 * grid[0]
    assert gained > len(rows) / 2


def test_weight_minmax_and_percentile(rng: np.random.Generator) -> None:
    w = rng.normal(size=(3, 5, 7))
    lo, hi = weight_range(w, 1, "minmax", U8, symmetric=False)
    np.testing.assert_allclose(lo, w.min(axis=(0, 2)), rtol=1e-6)
    np.testing.assert_allclose(hi, w.max(axis=(0, 2)), rtol=1e-6)
    lo, hi = weight_range(w, None, "percentile", S8, percentile=90.0)
    assert float(hi) == pytest.approx(np.percentile(np.abs(w), 90, method="higher"))
    assert lo == -hi


def test_weight_misuse_is_named() -> None:
    with pytest.raises(UnsupportedError) as method:
        weight_range(np.ones((2, 2)), 0, "entropy", S8)
    assert method.value.code == "RANGE-WEIGHT-METHOD"
    with pytest.raises(DataError) as nan:
        weight_range(np.array([[np.nan]]), 0, "minmax", S8)
    assert nan.value.code == "RANGE-NOT-FINITE"
