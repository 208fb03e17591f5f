"""How far two outputs are apart: arrays, or sequences, maps and optionals of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

Path: TypeAlias = tuple[Any, ...]


def leaves(value: Any) -> Iterator[tuple[Path, np.ndarray]]:
    """The arrays in an output of onnxruntime, each with its place in sequences and maps.

    An array is its own only leaf, at ``()``; an optional without a value has none.
    """
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from (((index, *place), array) for place, array in leaves(entry))
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from (((key, *place), array) for place, array in leaves(entry))
    elif value is not None:
        yield (), np.asarray(value)


def relative_error(reference: Any, other: Any) -> float:
    """The largest :func:`array_error` over the leaves; inf when sequences or maps are not alike."""
    ours, theirs = dict(leaves(reference)), dict(leaves(other))
    if ours.keys() != theirs.keys():
        return math.inf
    return max((array_error(array, theirs[place]) for place, array in ours.items()), default=0.0)


def array_error(reference: np.ndarray, other: np.ndarray) -> float:
    """``||reference - other|| / ||reference||`` in float64; inf when shapes or non-finites differ.

    Positions where both hold the same infinity, or both a NaN, count as equal.
    """
    if reference.shape != other.shape:
        return math.inf
    if reference.size == 0:
        return 0.0
    if reference.dtype.kind not in "fiub" or other.dtype.kind not in "fiub":
        return 0.0 if bool(np.all(reference == other)) else math.inf
    a, b = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return math.inf
    a, b = a[finite], b[finite]
    distance, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
    if distance == 0.0:
        return 0.0
    return distance / norm if norm > 0.0 else math.inf


def cosine(reference: np.ndarray, other: np.ndarray) -> float:
    """Cosine of the angle between the flattened arrays, in float64.

    Two all-zero arrays have 1, one of them 0; NaN when an element is not finite.
    """
    a = reference.astype(np.float64).ravel()
    b = other.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if norms == 0.0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.clip(np.dot(a, b) / norms, -1.0, 1.0))


def sqnr_db(signal_energy: float, error_energy: float) -> float:
    """Signal to quantization noise ratio ``10 log10(signal / error)`` in dB; inf for no error."""
    if error_energy == 0.0:
        return math.inf
    if signal_energy == 0.0:
        return -math.inf
    return 10.0 * math.log10(signal_energy / error_energy)
