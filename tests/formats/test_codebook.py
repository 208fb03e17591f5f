"""NF4 against its published levels, k-means against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from onnxq.errors import DataError, SpecError
from onnxq.formats import Granularity, KMeansFormat, Nf4Format
from onnxq.formats.codebook import lloyd, nf4_levels

# The table that QLoRA's authors published.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_levels_are_the_published_ones() -> None:
    np.testing.assert_allclose(nf4_levels(), PUBLISHED_NF4, atol=5e-7, rtol=0)


def test_nf4_takes_the_nearest_level_and_every_code_survives() -> None:
    fmt = Nf4Format()
    codes = np.arange(16).astype(np.uint8)
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes)), codes)
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 5000).astype(np.float32)
    brute = np.abs(x[:, None].astype(float) - fmt.levels()).argmin(axis=1)
    np.testing.assert_array_equal(fmt.encode(x), brute)


def test_nf4_blocks_scale_by_their_extreme() -> None:
    x = np.random.default_rng(1).standard_normal((3, 130)).astype(np.float32)
    fmt = Nf4Format()
    params = fmt.params(x)
    assert params.scale.shape == (3, 3)
    np.testing.assert_array_equal(params.scale[:, 2], np.abs(x[:, 128:]).max(axis=1))
    codes = fmt.encode(x, params)
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes, params), params), codes)
    np.testing.assert_array_equal(fmt.unpack(fmt.pack(codes), codes.shape), codes)
    assert not fmt.fake_quant(np.zeros(70)).any()
    assert fmt.bits_per_element((64, 64)) == 4.5


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_lloyd_matches_scipy_from_the_same_start(bits: int) -> None:
    x = np.random.default_rng(2).standard_normal(3000)
    start = np.linspace(x.min(), x.max(), 1 << bits)
    expected, _ = kmeans2(x[:, None], start[:, None].copy(), iter=100, minit="matrix")
    np.testing.assert_allclose(lloyd(x, 1 << bits), expected[:, 0], atol=1e-9)


def test_weights_count_as_repeated_values() -> None:
    rng = np.random.default_rng(3)
    x, repeats = rng.standard_normal(200), rng.integers(0, 4, 200)
    # The start is the range of values that count, so both see the same one.
    np.testing.assert_allclose(lloyd(x, 8, repeats * 1.0), lloyd(np.repeat(x, repeats), 8))


def test_kmeans_beats_equal_steps_and_is_idempotent() -> None:
    fmt = KMeansFormat(4)
    x = np.random.default_rng(4).standard_normal((4, 500)).astype(np.float32)
    for granularity in (None, Granularity.per_channel(0), Granularity.block(1, 200)):
        params = fmt.params(x, granularity)
        codes = fmt.encode(x, params)
        values = fmt.decode(codes, params)
        np.testing.assert_array_equal(fmt.decode(fmt.encode(values, params), params), values)
        np.testing.assert_array_equal(fmt.unpack(fmt.pack(codes), codes.shape), codes)
        assert params.codebook is not None
        assert params.codebook.dtype == np.float16
        step = np.ptp(x) / 15
        assert np.mean((values - x) ** 2) < 0.75 * step**2 / 12


def test_kmeans_weights_move_levels_to_what_matters() -> None:
    fmt = KMeansFormat(2)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 400)).astype(np.float32)
    weights = np.where(x > 1, 100.0, 1.0)
    plain = fmt.fake_quant(x)
    params = fmt.params(x, weights=weights)
    weighted = fmt.decode(fmt.encode(x, params), params)
    assert np.sum(weights * (weighted - x) ** 2) < 0.8 * np.sum(weights * (plain - x) ** 2)


def test_degenerate_groups() -> None:
    fmt = KMeansFormat(4)
    assert not fmt.fake_quant(np.zeros((2, 5)), Granularity.per_channel(0)).any()
    constant = np.full(7, 70000.0, np.float32)  # beyond float16: the scale carries it
    np.testing.assert_array_equal(fmt.fake_quant(constant), constant)
    assert fmt.fake_quant(np.array([1e-42, -1e-42])).size == 2


def test_bad_input() -> None:
    for fmt in (Nf4Format(), KMeansFormat()):
        with pytest.raises(DataError, match="DATA-NOT-FINITE"):
            fmt.params(np.array([1, np.inf]))
        with pytest.raises(DataError, match="DATA-NAN"):
            fmt.encode(np.array([np.nan]))
    with pytest.raises(SpecError):
        KMeansFormat(9)
    with pytest.raises(SpecError):
        Nf4Format(-1)
