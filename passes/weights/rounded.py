"""Weights that a solver has rounded, on their way to the lowering passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.formats import BdrFormat, Format, IntFormat, KMeansFormat, Params
from onnxq.solvers.grid import Solution

Array = npt.NDArray[Any]
ScaleType = Literal["float32", "e8m0", "e4m3"]

_FIELDS = ("codes", "scale", "zero_point", "levels")
_SCALE_TYPES: dict[Any, ScaleType] = {
    np.dtype(ml_dtypes.float8_e8m0fnu): "e8m0",
    np.dtype(ml_dtypes.float8_e4m3fn): "e4m3",
}


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A weight with one row an output channel, in integers or as places in a table of levels.

    Integers: ``factor * scale * (codes - zero_point)``; other formats:
    ``factor * scale * levels[codes]``. All arrays have plain numpy types.

    Args:
        codes: ``[N, K]``; in the type of the integer format (int8 for narrower ones), or unsigned.
        scale: ``[N, G]`` float32, one for each group of ``group`` columns; negative where a
            full-range signed scale puts a positive extreme on the lowest code.
        zero_point: ``[N, G]``, integers of the type of the codes, or float32 (HQQ).
        group: columns that share a scale; the last group may be shorter.
        levels: None for integers; else ``[n]`` float32 for all, or ``[N * G, n]``, a codebook for
            each group.
        factor: of the whole weight (NVFP4's scale of the tensor).
        scale_type: in what type all scales are exact.
    """

    codes: Array
    scale: npt.NDArray[np.float32]
    zero_point: Array
    group: int
    levels: npt.NDArray[np.float32] | None = None
    factor: float = 1.0
    scale_type: ScaleType = "float32"

    @classmethod
    def of(cls, solution: Solution) -> RoundedWeight:
        """From a solver's result."""
        if isinstance(solution.fmt, IntFormat):
            return cls._of_integers(solution)
        fmt, params = solution.fmt, solution.params
        rows, columns = solution.codes.shape
        codes, levels = _table(fmt, solution.codes, params)
        scale = np.ascontiguousarray(params.scale.reshape(rows, -1), np.float32)
        group = params.granularity.size or columns
        scale_type = _SCALE_TYPES.get(params.scale.dtype, "float32")
        if isinstance(fmt, BdrFormat) and params.micro is not None:
            # A microexponent halves the scale of its sub-block: scales by sub-block say the same.
            micro = params.micro.reshape(rows, -1).astype(np.int32)
            scale = np.ldexp(np.repeat(scale, group // fmt.sub_block, axis=1), -micro)
            group = fmt.sub_block
        factor = 1.0 if params.global_scale is None else float(params.global_scale)
        zero = np.zeros(scale.shape, np.uint8)
        return cls(codes, scale.astype(np.float32), zero, group, levels, factor, scale_type)

    @classmethod
    def _of_integers(cls, solution: Solution) -> RoundedWeight:
        rows, columns = solution.codes.shape
        assert isinstance(solution.fmt, IntFormat)
        signed, wide = solution.fmt.signed, solution.fmt.bits > 8
        plain = np.dtype(f"{'i' if signed else 'u'}{2 if wide else 1}")
        scale = solution.params.scale.reshape(rows, -1)
        zero = solution.params.zero_point
        zeros = np.zeros(scale.shape, np.int8) if zero is None else zero.reshape(scale.shape)
        return cls(
            solution.codes.astype(plain),
            np.ascontiguousarray(scale, np.float32),
            zeros.astype(np.float32 if zeros.dtype == np.float32 else plain),
            solution.params.granularity.size or columns,
        )

    def part(self, start: int, stop: int) -> RoundedWeight:
        """Rows ``start`` to ``stop``."""
        rows = slice(start, stop)
        levels = self.levels
        if levels is not None and levels.ndim == 2:
            groups = self.scale.shape[1]
            levels = levels[start * groups : stop * groups]
        return replace(
            self,
            codes=self.codes[rows],
            scale=self.scale[rows],
            zero_point=self.zero_point[rows],
            levels=levels,
        )

    def values(self) -> npt.NDArray[np.float32]:
        """What the codes stand for, ``[N, K]`` float32."""
        rows, columns = self.codes.shape
        spread = np.repeat(np.arange(self.scale.shape[1]), self.group)[:columns]
        scale = (self.scale * np.float32(self.factor))[:, spread]
        if self.levels is None:
            zero = self.zero_point.astype(np.float32)[:, spread]
            return np.asarray((self.codes.astype(np.float32) - zero) * scale, np.float32)
        if self.levels.ndim == 1:
            return np.asarray(self.levels[self.codes] * scale, np.float32)
        book = np.arange(rows)[:, None] * self.scale.shape[1] + spread[None, :]
        return np.asarray(self.levels[book, self.codes] * scale, np.float32)


def _table(fmt: Format, codes: Array, params: Params) -> tuple[Array, npt.NDArray[np.float32]]:
    """Codes as places in a table, and the table."""
    if params.codebook is not None:
        levels = np.asarray(params.codebook, np.float32)
        if isinstance(fmt, KMeansFormat):
            return codes, levels
        return (codes.astype(np.int16) + 1).astype(np.uint8), levels  # ternary codes: -1, 0, 1
    if codes.dtype == np.int8:
        low = -1 if fmt.bits == 2 else -(1 << (fmt.bits - 1))
        every = np.arange(low, 2 if fmt.bits == 2 else -low, dtype=np.int16)
        place = (codes.astype(np.int16) - low).astype(np.uint8)
        return place, np.asarray(fmt.decode(every.astype(np.int8)), np.float32)
    plain = np.dtype(np.uint16 if fmt.bits > 8 else np.uint8)
    every = np.arange(1 << fmt.bits).astype(plain)
    return codes.astype(plain), np.asarray(fmt.decode(every), np.float32)


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
        """Sites and single numbers as JSON, codes and scales as arrays."""
        header = {"sites": [[s, w.group, w.factor, w.scale_type] for s, w in self._by_site.items()]}
        arrays = {
            f"{index}.{field}": getattr(weight, field)
            for index, weight in enumerate(self._by_site.values())
            for field in _FIELDS
            if getattr(weight, field) is not None
        }
        return header, arrays

    @classmethod
    def from_storage(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> RoundedWeights:
        """The inverse of :meth:`to_storage`."""
        found = cls()
        for index, (site, group, factor, scale_type) in enumerate(header["sites"]):
            codes, scale, zero, levels = (arrays.get(f"{index}.{field}") for field in _FIELDS)
            assert codes is not None
            assert scale is not None
            assert zero is not None
            found.add(site, RoundedWeight(codes, scale, zero, group, levels, factor, scale_type))
        return found
