"""Learned rotations: the gradient against finite differences, orthogonality, and the gain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxq.formats import Granularity, parse_format
from onnxq.solvers.hadamard import fixing_ones, random_orthogonal, randomized_hadamard
from onnxq.solvers.learn_rotation import (
    UNIFORM_KURTOSIS,
    cayley,
    kurtosis_objective,
    learn_rotation,
    normalized,
    range_objective,
)

RNG = np.random.default_rng(0)


def mixed(n: int, width: int, seed: int = 1) -> np.ndarray:
    """Uniform sources behind a random rotation, which a learned one can undo."""
    rng = np.random.default_rng(seed)
    sources = rng.uniform(-1, 1, (n, width))
    return sources @ random_orthogonal(width, rng)


def distance(y: np.ndarray) -> float:
    return float(np.abs(np.mean(y**4, axis=1) - UNIFORM_KURTOSIS).mean())


def squared_range(y: np.ndarray) -> float:
    return float(np.square(np.ptp(y, axis=1)).mean())


@pytest.mark.parametrize(
    ("objective", "of_rows"), [(kurtosis_objective, distance), (range_objective, squared_range)]
)
def test_the_gradient_is_that_of_the_objective(objective: Any, of_rows: Any) -> None:
    rows, matrix = normalized(RNG.standard_normal((50, 12))), random_orthogonal(12, RNG)

    def exact(r: np.ndarray) -> float:
        return float(of_rows(rows.astype(np.float64) @ r))

    value, gradient = objective(rows, matrix)
    assert value == pytest.approx(exact(matrix), rel=1e-5)
    for _ in range(5):
        direction = RNG.standard_normal((12, 12))
        step = 1e-6
        slope = (exact(matrix + step * direction) - exact(matrix - step * direction)) / (2 * step)
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-3)


def test_cayley_is_orthogonal_and_turns_by_the_skew_matrix() -> None:
    a = RNG.standard_normal((9, 9))
    skew = a - a.T
    np.testing.assert_allclose(cayley(skew) @ cayley(skew).T, np.eye(9), atol=1e-12)
    tiny = 1e-4 * skew
    np.testing.assert_allclose(cayley(tiny), np.eye(9) - tiny, atol=1e-5)


@pytest.mark.parametrize("width", [16, 24, 64])
def test_it_finds_flat_coordinates_and_stays_orthogonal(width: int) -> None:
    rows = mixed(2000, width)
    found = learn_rotation(rows, randomized_hadamard(width, RNG), steps=60)
    error = np.abs(found.matrix @ found.matrix.T - np.eye(width)).max()
    assert error < 1e-10
    # Mixtures of uniform sources look Gaussian (3); undone they are uniform (1.8).
    assert found.before > 0.8
    assert found.after < 0.75 * found.before
    y = normalized(rows) @ found.matrix
    assert abs(np.mean(y**4, axis=1) - UNIFORM_KURTOSIS).mean() == pytest.approx(
        found.after, rel=1e-3
    )


def test_the_range_shrinks_where_loud_rows_count() -> None:
    """An integer grid over each row errs less, by what the objective says."""
    rows = mixed(2000, 32) * RNG.lognormal(0, 1, (2000, 1))
    start = randomized_hadamard(32, RNG)
    found = learn_rotation(rows, start, steps=60, objective="range")
    fmt = parse_format("int4-asym")

    def noise(matrix: np.ndarray) -> float:
        y = (rows @ matrix).astype(np.float32)
        return float(np.square(fmt.fake_quant(y, Granularity.per_channel(0)) - y).mean())

    assert found.before == pytest.approx(squared_range(rows @ start), rel=1e-5)
    assert found.after < 0.8 * found.before
    assert noise(found.matrix) / noise(start) == pytest.approx(found.after / found.before, rel=0.05)


def test_the_same_rows_give_the_same_bits() -> None:
    start = randomized_hadamard(16, np.random.default_rng(5))
    one, two = (learn_rotation(mixed(300, 16), start, steps=20) for _ in range(2))
    np.testing.assert_array_equal(one.matrix, two.matrix)


def test_the_vector_of_ones_is_kept_where_a_layernorm_needs_it() -> None:
    start = fixing_ones(randomized_hadamard(16, RNG))
    found = learn_rotation(mixed(500, 16), start, steps=40, keep_ones=True)
    np.testing.assert_allclose(found.matrix @ np.ones(16), np.ones(16), atol=1e-10)
    assert found.after < found.before


@pytest.mark.parametrize("rows", [np.zeros((4, 8)), np.full((3, 8), np.nan), np.zeros((0, 8))])
def test_nothing_to_learn_from_keeps_the_start(rows: np.ndarray) -> None:
    start = randomized_hadamard(8, RNG)
    np.testing.assert_array_equal(learn_rotation(rows, start, steps=5).matrix, start)
