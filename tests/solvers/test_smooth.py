"""Smoothing scales against the published formula, and the search on data with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.formats import IntFormat
from onnxq.solvers.smooth import MIN_ROWS, search_smoothing, smoothing_scale

UINT8, INT8 = IntFormat(8, signed=False), IntFormat(8, signed=True)


def published(amax: np.ndarray, wmax: np.ndarray, alpha: float) -> np.ndarray:
    """SmoothQuant, arXiv 2211.10438, eq. 4."""
    return amax.astype(np.float64) ** alpha / wmax.astype(np.float64) ** (1 - alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_scale_is_the_published_one_up_to_a_common_factor(alpha: float) -> None:
    rng = np.random.default_rng(0)
    wmax = rng.uniform(0.1, 2.0, 64).astype(np.float32)
    amax = np.full(64, 3.0, np.float32)
    amax[:20] = rng.uniform(4.0, 60.0, 20)  # at or above the median, where the floor is idle
    s = smoothing_scale(amax, wmax, alpha).astype(np.float64)
    ratio = s / published(amax, wmax, alpha)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert np.exp(np.log(s).mean()) == pytest.approx(1.0, rel=1e-6)


def test_channels_below_the_median_count_as_the_median() -> None:
    wmax = np.ones(5, np.float32)
    low = smoothing_scale(np.array([0, 1e-6, 2, 4, 8], np.float32), wmax, 0.5)
    lifted = smoothing_scale(np.array([2, 2, 2, 4, 8], np.float32), wmax, 0.5)
    np.testing.assert_array_equal(low, lifted)


@pytest.mark.parametrize("amax", [np.zeros(8), np.array([0, 0, 0, 0, 0, 0, 0, 5.0])])
def test_dead_channels_and_dead_weights_give_finite_scales(amax: np.ndarray) -> None:
    wmax = np.array([0, 0, 1, 1, 1, 1, 1, 1], np.float32)
    s = smoothing_scale(amax.astype(np.float32), wmax, 0.5)
    assert np.isfinite(s).all()
    assert (s > 0).all()


def rows_with_outliers(factor: float, count: int = 400, width: int = 32) -> np.ndarray:
    rows = np.random.default_rng(1).standard_normal((count, width)).astype(np.float32)
    rows[:, 3] *= factor
    return rows


def weight(width: int = 32, outputs: int = 24) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((width, outputs)).astype(np.float32)


def test_the_search_finds_what_outliers_need() -> None:
    rows, w = rows_with_outliers(100.0), weight()
    found = search_smoothing(rows, np.abs(rows).max(axis=0), w, UINT8, INT8)
    assert found.alpha is not None
    assert found.gain_db > 10
    assert found.scale[3] > 5 * np.median(found.scale)
    # measured again here, on rows that the search has not seen
    fresh = np.random.default_rng(9).standard_normal((300, 32)).astype(np.float32)
    fresh[:, 3] *= 100.0
    plain = fake_product_error(fresh, w, np.ones(32, np.float32))
    assert 10 * np.log10(plain / fake_product_error(fresh, w, found.scale)) > 8


def fake_product_error(x: np.ndarray, w: np.ndarray, s: np.ndarray) -> float:
    """Error of an asymmetric uint8 by symmetric int8 per-column product, written out."""
    xs, ws = (x / s).astype(np.float64), (w * s[:, None]).astype(np.float64)
    step = (xs.max() - xs.min()) / 255
    zero = np.rint(-xs.min() / step)
    xq = (np.clip(np.rint(xs / step) + zero, 0, 255) - zero) * step
    column = np.abs(ws).max(axis=0) / 127
    wq = np.clip(np.rint(ws / column), -127, 127) * column
    return float(np.square(xq @ wq - x.astype(np.float64) @ w).sum())


def test_even_channels_are_left_alone() -> None:
    rows = rows_with_outliers(1.0)
    found = search_smoothing(rows, np.abs(rows).max(axis=0), weight(), UINT8, INT8)
    assert found.alpha is None
    np.testing.assert_array_equal(found.scale, np.ones(32, np.float32))
    assert found.gain_db == 0


def test_an_outlier_that_only_one_half_shows_is_no_ground_for_a_scale() -> None:
    """Cross-validation: what one half suggests must hold on the other."""
    rows = rows_with_outliers(1.0)
    rows[0, 3] = 30.0
    found = search_smoothing(rows, np.abs(rows).max(axis=0), weight(), UINT8, INT8)
    assert found.alpha is None or found.gain_db < 3


@pytest.mark.parametrize("count", range(MIN_ROWS))
def test_too_few_rows_leave_the_site_alone(count: int) -> None:
    rows = rows_with_outliers(100.0, count)
    found = search_smoothing(rows, np.full(32, 3, np.float32), weight(), UINT8, INT8)
    assert found.alpha is None


def test_the_search_gives_the_same_answer_twice() -> None:
    rows = rows_with_outliers(50.0)
    amax = np.abs(rows).max(axis=0)
    one, two = (search_smoothing(rows, amax, weight(), UINT8, INT8) for _ in range(2))
    np.testing.assert_array_equal(one.scale, two.scale)
