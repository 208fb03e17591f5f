"""Intervals of integers, and what the integer functions can yield with the constants of a node.

Polynomials are evaluated on at most 2^16 integers, so bounds are exact. Numbers that an
implementation in 32 bits could not hold are reported as a reach beyond int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.custom_ops.integer_math import coefficients, rescale

Array = np.ndarray[Any, Any]
Int64 = npt.NDArray[np.int64]

BEYOND = 1 << 31
"""The least magnitude that int32 cannot hold on both sides."""


@dataclass(frozen=True)
class Interval:
    """What a value can hold: ``lo <= x <= hi``, for all or for each column of the last axis."""

    lo: Array
    hi: Array

    @property
    def extremes(self) -> tuple[int, int]:
        """The least and the largest of all columns."""
        return int(self.lo.min()), int(self.hi.max())


def interval(lo: int, hi: int) -> Interval:
    """One for all columns."""
    return Interval(np.array([lo], object), np.array([hi], object))


def of_constant(array: Array) -> Interval:
    """Column by column for what has columns, else over all."""
    wide = array.astype(object) if array.dtype != bool else array.astype(np.int64).astype(object)
    if wide.ndim == 1:
        return Interval(wide, wide)
    return interval(int(array.min()), int(array.max()))


def combined(op_type: str, ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """The interval of an elementwise operator."""
    (a, b), (c, d) = ranges[0], ranges[-1]
    if op_type == "Add":
        return a + c, b + d
    if op_type == "Sub":
        return a - d, b - c
    if op_type == "Mul":
        products = (a * c, a * d, b * c, b * d)
        return min(products), max(products)
    if op_type in ("Div", "Mod"):
        return min(a, -abs(b), -abs(d)), max(b, abs(a), abs(d))
    return min(lo for lo, _ in ranges), max(hi for _, hi in ranges)


def _values(attributes: Mapping[str, int], extent: int) -> tuple[Int64, int]:
    """The polynomial at ``-extent`` to 0, and the largest magnitude on the way there."""
    p, s = coefficients(dict(attributes))
    x = np.arange(-extent, 1, dtype=np.int64)
    z, reach = np.full_like(x, p[0]), abs(p[0])
    for coefficient, shift in zip(p[1:], s, strict=True):
        product = z * x
        z = (product >> shift) + coefficient
        reach = max(reach, int(np.abs(product).max()), int(np.abs(z).max()))
        if reach >= BEYOND:
            break
    return z, reach


def exp_range(attributes: Mapping[str, int], prefix: str = "") -> tuple[int, int, int]:
    """Least and largest exponential, and the largest magnitude within the polynomial.

    Args:
        attributes: of IntegerExp or IntegerSoftmax; of IntegerSilu with ``prefix="exp_"``.
        prefix: of the names ``multiplier`` and ``shift``.
    """
    z, reach = _values(attributes, attributes["ln2"] - 1)
    if reach >= BEYOND:
        return 0, 0, reach
    first = rescale(z, attributes[f"{prefix}multiplier"], attributes[f"{prefix}shift"])
    # Halvings bring later ones towards 0.
    return min(0, int(first.min())), max(0, int(first.max())), reach


def erf_range(attributes: Mapping[str, int]) -> tuple[int, int, int]:
    """Least and largest erf, and the largest magnitude within the polynomial."""
    z, reach = _values(attributes, attributes["bound"])
    if reach >= BEYOND:
        return 0, 0, reach
    both = np.concatenate([z, -z]) >> attributes["erf_shift"]
    return int(both.min()), int(both.max()), reach
