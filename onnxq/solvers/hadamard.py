"""Hadamard and random rotations, as matrices and as fast transforms.

A Hadamard matrix has entries +1 and -1 and orthogonal rows, ``H H' = n I``; ``H / sqrt(n)`` is a
rotation that spreads one large coordinate evenly over all n (QuaRot, Ashkboos et al.,
arXiv 2404.00456). Orders are built from three rules:

* Sylvester: ``H_2n = [[H_n, H_n], [H_n, -H_n]]``;
* Paley I: order q + 1 for a prime power ``q = 3 mod 4``;
* Paley II: order 2 (q + 1) for a prime power ``q = 1 mod 4`` (Paley 1933, both).

Together they give every order that a transformer is likely to have (12, 20, 28, 36, 52, 60 times
powers of two, and many more), but not all: 92, 116, 156, 172 need searched tables. Where a rotation
of such a size is wanted, :func:`random_rotation` draws a Haar-random orthogonal matrix instead and
says so.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxq.errors import UnsupportedError

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Signs = npt.NDArray[np.int8]

RotationKind = Literal["hadamard", "orthogonal"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix and how it was made.

    Attributes:
        matrix: ``[n, n]`` float64, ``matrix @ matrix.T = I``; rows multiply it: ``y = x @ matrix``.
        kind: ``hadamard`` (randomized) or ``orthogonal`` (Haar-random).
    """

    matrix: Float64
    kind: RotationKind


# Construction ---------------------------------------------------------------------------------

MAX_CORE = 1 << 12
"""Largest order that is made without doubling; its field's table has as many squared entries."""


def hadamard_matrix(n: int) -> Signs:
    """A Hadamard matrix of order n, ``[n, n]`` int8 of +1 and -1.

    Raises:
        UnsupportedError: ``UNSUPPORTED-HADAMARD``: none is known to the three rules.
    """
    core, doublings = hadamard_factors(n)
    matrix = _core(core)
    for _ in range(doublings):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix.astype(np.int8)


def has_hadamard(n: int) -> bool:
    """Whether :func:`hadamard_matrix` can make order n."""
    return _factors_or_none(n) is not None


def hadamard_factors(n: int) -> tuple[int, int]:
    """``(K, m)`` with ``n = K * 2^m``, the smallest order K that a rule gives without doubling.

    Raises:
        UnsupportedError: ``UNSUPPORTED-HADAMARD``.
    """
    found = _factors_or_none(n)
    if found is None:
        raise UnsupportedError(
            "UNSUPPORTED-HADAMARD",
            f"no Hadamard matrix of order {n} can be constructed",
            "orders are 1, 2 and multiples of 4; use a block size, or a random orthogonal matrix",
        )
    return found


@functools.cache
def _factors_or_none(n: int) -> tuple[int, int] | None:
    if n < 1:
        return None
    odd, twos = n, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    if odd == 1:
        return 1, twos
    for used in range(2, twos + 1):
        if odd << used > MAX_CORE:
            return None
        if _rule(odd << used) is not None:
            return odd << used, twos - used
    return None


def _rule(n: int) -> Callable[[], Array] | None:
    """How to make a matrix of order n without doubling one, if a rule does."""
    if n == 1:
        return lambda: np.ones((1, 1), np.int64)
    if n % 4 == 0 and (n - 1) % 4 == 3 and _prime_power(n - 1):
        return lambda: _paley_one(n - 1)
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1):
        return lambda: _paley_two(n // 2 - 1)
    return None


def _core(n: int) -> Array:
    make = _rule(n)
    assert make is not None
    return make()


def _paley_one(q: int) -> Array:
    """``I + S`` with the skew conference matrix S of order q + 1."""
    jacobsthal = _jacobsthal(q)
    skew = np.zeros((q + 1, q + 1), np.int64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = jacobsthal
    return skew + np.eye(q + 1, dtype=np.int64)


def _paley_two(q: int) -> Array:
    """The symmetric conference matrix of order q + 1, with 2 x 2 blocks for 0, +1 and -1."""
    conference = np.zeros((q + 1, q + 1), np.int64)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _jacobsthal(q)
    on_zero, on_one = np.array([[1, -1], [-1, -1]]), np.array([[1, 1], [1, -1]])
    return np.kron(conference, on_one) + np.kron(np.eye(q + 1, dtype=np.int64), on_zero)


def _jacobsthal(q: int) -> Array:
    """``chi(a - b)`` for all a, b of GF(q); chi is 1 on squares, -1 on the rest, 0 on 0."""
    subtract, squares = _field(q)
    chi = np.full(q, -1, np.int64)
    chi[list(squares)] = 1
    chi[0] = 0
    matrix: Array = chi[subtract]
    return matrix


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q = p^k``, p an odd prime."""
    p = next((d for d in range(3, int(q**0.5) + 1, 2) if q % d == 0), q)
    if q < 3 or q % 2 == 0:
        return None
    power, k = p, 1
    while power < q:
        power, k = power * p, k + 1
    return (p, k) if power == q else None


def _field(q: int) -> tuple[Array, set[int]]:
    """GF(q): the table of differences of element numbers, and the numbers of nonzero squares.

    Element number ``sum c_i p^i`` is the polynomial with coefficients c.
    """
    found = _prime_power(q)
    assert found is not None
    p, k = found
    digits = np.array(list(itertools.product(range(p), repeat=k)))[:, ::-1]
    weights = p ** np.arange(k)
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    modulus = _irreducible(p, k)
    squares = {_number(_times(tuple(a), tuple(a), modulus, p), p) for a in digits[1:].tolist()}
    return difference @ weights, squares


def _number(coefficients: tuple[int, ...], p: int) -> int:
    return sum(c * p**i for i, c in enumerate(coefficients))


def _times(
    a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int
) -> tuple[int, ...]:
    """``a b`` modulo the monic ``x^k + sum modulus_i x^i``, coefficients from low to high."""
    k = len(a)
    product = [0] * (2 * k - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] = (product[i + j] + x * y) % p
    for top in range(2 * k - 2, k - 1, -1):
        lead = product[top]
        for i, m in enumerate(modulus):
            product[top - k + i] = (product[top - k + i] - lead * m) % p
    return tuple(product[:k])


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Low coefficients of a monic polynomial of degree k <= 3 without roots in GF(p)."""
    if k == 1:
        return (0,)
    if k > 3:
        raise UnsupportedError(
            "UNSUPPORTED-HADAMARD", f"fields of order {p}^{k} are not built", "use a block size"
        )
    for low in itertools.product(range(p), repeat=k):
        values = (pow(x, k, p) + sum(c * pow(x, i, p) for i, c in enumerate(low)) for x in range(p))
        if all(value % p for value in values):
            return low
    raise AssertionError("an irreducible polynomial of every degree exists")


# Rotations ------------------------------------------------------------------------------------


def randomized_hadamard(n: int, rng: np.random.Generator) -> Float64:
    """``diag(+-1) H / sqrt(n)`` with random signs, ``[n, n]``."""
    signs = rng.choice(np.array([-1.0, 1.0]), size=n)
    return np.asarray(signs[:, None] * hadamard_matrix(n) / np.sqrt(n), np.float64)


def random_orthogonal(n: int, rng: np.random.Generator) -> Float64:
    """An orthogonal matrix drawn from the Haar measure, ``[n, n]`` (Mezzadri, math-ph/0609050)."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return np.asarray(q * np.sign(np.diag(r)), np.float64)


def random_rotation(
    n: int, rng: np.random.Generator, *, prefer: RotationKind = "hadamard"
) -> Rotation:
    """A randomized Hadamard matrix where the order has one, else a random orthogonal matrix."""
    if prefer == "hadamard" and has_hadamard(n):
        return Rotation(randomized_hadamard(n, rng), "hadamard")
    return Rotation(random_orthogonal(n, rng), "orthogonal")


def fixing_ones(matrix: Float64) -> Float64:
    """``G R``, an orthogonal matrix that maps the vector of ones to itself, ``(G R) 1 = 1``.

    R is ``matrix``, G the Householder reflection that takes ``R 1`` to 1. A LayerNorm without
    gamma and beta commutes with such a rotation: it keeps both the mean over channels and the
    norm of what is left.
    """
    ones = np.ones(len(matrix))
    moved = matrix @ ones
    axis = moved - ones
    length = float(axis @ axis)
    if length < 1e-24:
        return matrix
    return matrix - np.outer(axis, (2.0 / length) * (axis @ matrix))


def transform(x: Array, block: int = 0) -> Array:
    """``x H / sqrt(n)`` along the last axis, by the fast algorithm where n has powers of two.

    Args:
        x: ``[..., n]``, any float type; computed in it.
        block: size of the blocks that are transformed one by one; 0 for the whole axis.
    """
    n = block or x.shape[-1]
    core, doublings = hadamard_factors(n)
    y: Array = x.reshape(-1, n)
    half = n
    for _ in range(doublings):
        half //= 2
        y = y.reshape(-1, 2, half)
        y = np.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], axis=1)
    y = y.reshape(-1, core) @ _core(core).astype(x.dtype)
    scaled = y * x.dtype.type(1 / np.sqrt(n))
    return np.asarray(scaled.reshape(x.shape))
