"""Integer arithmetic in numpy, exactly as the integer-only operators define it.

Everything is int64 with values far inside of it, so nothing here can wrap or round unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

POWERS = np.left_shift(1, np.arange(63, dtype=np.int64))
"""2^0 to 2^62: bodies look them up, as ONNX shifts unsigned numbers only."""


def wrap32(x: Array) -> Array:
    """int64 modulo 2^32, as a sum of two int32 numbers comes out."""
    return x.astype(np.int32).astype(np.int64)


def round_shift(x: Array, shift: Array | int) -> Array:
    """``x / 2^shift`` to the nearest integer, halves up; ``shift`` from 1 to 62, ``|x| < 2^62``."""
    shift = np.asarray(shift, np.int64)
    rounded: Array = (x + np.left_shift(np.int64(1), shift - 1)) >> shift
    return rounded


def rescale(x: Array, multiplier: Array | int, shift: Array | int) -> Array:
    """``x * multiplier / 2^shift`` to the nearest integer, halves up; x of 32 bits."""
    return round_shift(x.astype(np.int64) * np.asarray(multiplier, np.int64), shift)


def columns16(x: Array, bias: Array, multiplier: Array, shift: Array) -> Array:
    """A linear layer's sum with its bias, each column at its factor, within 16 bits."""
    total = wrap32(x.astype(np.int64) + bias)
    return np.clip(rescale(total, multiplier, shift), -32767, 32767)


def requantized(x: Array, zero_point: Array, attributes: Mapping[str, int]) -> Array:
    """``x`` at the factor and within the limits of a node, in the type of its zero point."""
    moved = rescale(x, attributes["out_multiplier"], attributes["out_shift"]) + int(zero_point)
    clipped: Array = np.clip(moved, attributes["low"], attributes["high"])
    return clipped.astype(zero_point.dtype)


def polynomial(x: Array, p: Sequence[int], s: Sequence[int]) -> Array:
    """Horner's rule with a right shift after each product; p4 to p0 and s3 to s0."""
    z: Array = np.full_like(x, p[0])
    for coefficient, shift in zip(p[1:], s, strict=True):
        z = (z * x >> shift) + coefficient
    return z


def exponential(x: Array, attributes: dict[str, int]) -> Array:
    """32767 exp(scale x) for x <= 0; larger x count as 0."""
    ln2 = attributes["ln2"]
    distance = np.minimum(-np.minimum(x, 0), 30 * ln2)
    halvings = distance // ln2
    remainder = halvings * ln2 - distance
    z = polynomial(remainder, *coefficients(attributes))
    shift = np.minimum(attributes["shift"] + halvings, 62)
    return rescale(z, attributes["multiplier"], shift)


def erf(x: Array, attributes: dict[str, int]) -> Array:
    """The error function of ``scale * x`` in steps of the operator's output scale."""
    bound = attributes["bound"]
    distance = np.minimum(np.abs(x), bound) - bound
    z = polynomial(distance, *coefficients(attributes))
    result: Array = np.sign(x) * z >> attributes["erf_shift"]
    return result


def coefficients(attributes: dict[str, int]) -> tuple[list[int], list[int]]:
    """p4 to p0 and s3 to s0 of a node's attributes."""
    return [attributes[f"p{i}"] for i in (4, 3, 2, 1, 0)], [
        attributes[f"s{i}"] for i in (3, 2, 1, 0)
    ]


def square_root(x: Array) -> Array:
    """The largest integer whose square is at most x, for ``0 <= x < 2^62``."""
    bits = (x[..., None] >= POWERS).sum(axis=-1)
    root = POWERS[(bits + 1) // 2]
    for _ in range(ROOT_STEPS):
        root = np.minimum(root, (root + x // np.maximum(root, 1)) // 2)
    result: Array = root
    return result


def normalized(v: Array, shift: int, epsilon: int) -> Array:
    """Rows over the root of their sum of squares, in steps of 2^-30; see IntegerLayerNorm."""
    squares = ((v >> shift) ** 2).sum(axis=-1, keepdims=True)
    deviation = np.maximum(square_root(squares + epsilon), 1) << shift
    normal: Array = v * ((1 << 31) // deviation) >> 1
    return normal


ROOT_STEPS = 6
"""Newton's steps from 2^ceil(bits / 2): enough for every number below 2^62."""
