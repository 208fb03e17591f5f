"""Weights that a solver has rounded, on their way to the lowering passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.solvers.grid import Solution

_FIELDS = ("codes", "scale", "zero_point")


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A weight ``scale * (codes - zero_point)`` with one row an output channel.

    Args:
        codes: [N, K], element type of the format.
        scale: [N, G] float32, one for each group of ``group`` columns; negative where a
            full-range signed scale puts a positive extreme on the lowest code.
        zero_point: [N, G], element type of the codes.
        group: columns that share a scale; the last group may be shorter.
    """

    codes: npt.NDArray[Any]
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[Any]
    group: int

    @classmethod
    def of(cls, solution: Solution) -> RoundedWeight:
        """From a solver's result in an integer format."""
        rows, columns = solution.codes.shape
        scale = solution.params.scale.reshape(rows, -1)
        zero = solution.params.zero_point
        wide = np.zeros(scale.shape) if zero is None else zero.reshape(scale.shape)
        return cls(
            solution.codes,
            np.ascontiguousarray(scale, np.float32),
            wide.astype(solution.codes.dtype),
            solution.params.granularity.size or columns,
        )


class RoundedWeights:
    """Rounded weights by site, each ``[N, K]`` with one row an output channel."""

    def __init__(self) -> None:
        self._by_site: dict[str, RoundedWeight] = {}

    def __len__(self) -> int:
        return len(self._by_site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def get(self, site: str) -> RoundedWeight | None:
        """The weight of ``site``, if a solver rounded it."""
        return self._by_site.get(site)

    def add(self, site: str, weight: RoundedWeight) -> None:
        """Keep the weight of ``site``."""
        self._by_site[site] = weight

    def to_storage(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Sites and groups as JSON, codes and scales as arrays."""
        header = {"sites": [[site, w.group] for site, w in self._by_site.items()]}
        arrays = {
            f"{index}.{field}": getattr(weight, field)
            for index, weight in enumerate(self._by_site.values())
            for field in _FIELDS
        }
        return header, arrays

    @classmethod
    def from_storage(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> RoundedWeights:
        """The inverse of :meth:`to_storage`."""
        found = cls()
        for index, (site, group) in enumerate(header["sites"]):
            codes, scale, zero = (arrays[f"{index}.{field}"] for field in _FIELDS)
            found.add(site, RoundedWeight(codes, scale, zero, group))
        return found
