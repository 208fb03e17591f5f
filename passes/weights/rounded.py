"""Weights that a solver has rounded, on their way to the lowering passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from onnxq.solvers.grid import Rounded

_FIELDS = ("codes", "scale", "zero_point")


class RoundedWeights:
    """Rounded weights by site, each ``[N, K]`` with one row an output channel."""

    def __init__(self) -> None:
        self._by_site: dict[str, Rounded] = {}

    def __len__(self) -> int:
        return len(self._by_site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def get(self, site: str) -> Rounded | None:
        """The weight of ``site``, if a solver rounded it."""
        return self._by_site.get(site)

    def add(self, site: str, weight: Rounded) -> None:
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
            found.add(site, Rounded(*(arrays[f"{index}.{field}"] for field in _FIELDS), group))
        return found
