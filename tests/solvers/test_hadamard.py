"""Hadamard matrices against scipy's and the definition; rotations against orthogonality."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from onnxq.errors import UnsupportedError
from onnxq.solvers.hadamard import (
    fixing_ones,
    hadamard_factors,
    hadamard_matrix,
    has_hadamard,
    random_rotation,
    transform,
)

ORDERS = [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 52, 60, 68, 76, 108, 140, 384, 576, 960, 1536]
"""QuaRot's tabulated cores that Paley reaches, and the widths of small models."""

UNKNOWN = [92, 116, 156, 172, 184, 188, 232, 236]
"""Multiples of 4 below 260 that need other constructions (Williamson, Baumert-Hall)."""


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs(order: int) -> None:
    matrix = hadamard_matrix(order).astype(np.float64)  # whole numbers: sums are exact
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [2, 8, 64, 512])
def test_powers_of_two_are_sylvesters(order: int) -> None:
    np.testing.assert_array_equal(hadamard_matrix(order), scipy.linalg.hadamard(order))


def test_which_orders_there_are() -> None:
    assert [n for n in range(4, 260, 4) if not has_hadamard(n)] == UNKNOWN
    assert not any(has_hadamard(n) for n in (0, 3, 5, 6, 18, 90))
    assert hadamard_factors(576) == (36, 4)
    assert hadamard_factors(1536) == (12, 7)
    with pytest.raises(UnsupportedError, match="92"):
        hadamard_matrix(92)


@pytest.mark.parametrize(("order", "block"), [(64, 0), (576, 0), (96, 12), (128, 32)])
def test_the_fast_transform_is_the_matrix(order: int, block: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, order))
    size = block or order
    dense = np.kron(np.eye(order // size), hadamard_matrix(size) / np.sqrt(size))
    np.testing.assert_allclose(transform(x, block), x @ dense, atol=1e-12)


@pytest.mark.parametrize("order", [36, 64, 92, 7])
def test_random_rotations(order: int) -> None:
    rotation = random_rotation(order, np.random.default_rng(0))
    assert rotation.kind == ("hadamard" if has_hadamard(order) else "orthogonal")
    identity = np.eye(order)
    np.testing.assert_allclose(rotation.matrix @ rotation.matrix.T, identity, atol=1e-12)
    fixed = fixing_ones(rotation.matrix)
    np.testing.assert_allclose(fixed @ fixed.T, identity, atol=1e-12)
    np.testing.assert_allclose(fixed @ np.ones(order), 1, atol=1e-12)
    np.testing.assert_array_equal(fixing_ones(identity), identity)


def test_orders_beyond_every_layer_are_answered_at_once() -> None:
    assert has_hadamard(1 << 40)
    assert not has_hadamard(12345678910111213 * 4)
