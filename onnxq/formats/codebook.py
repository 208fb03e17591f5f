"""Formats whose levels are a table: NF4 and k-means.

A code is an index into ascending levels in [-1, 1]; ``x ~ scale * level[code]`` with
``scale = amax`` of the group. Encoding takes the nearest level, the lower one at a midpoint.

- **NF4** (Dettmers et al., QLoRA, arXiv 2305.14314; bitsandbytes): zero, 7 negative and 8
  positive quantiles of N(0, 1), normalised to +-1. Blocks of 64.
- **k-means** (Han et al., Deep Compression, arXiv 1510.00149): levels that Lloyd's algorithm finds
  for each group, starting from equal steps over [min, max]; kept as float16.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from onnxq.errors import SpecError
from onnxq.formats.base import (
    Float32,
    Format,
    Params,
    amax,
    as_float32,
    refuse_nan,
    require_finite,
    safe_scale,
)
from onnxq.formats.granularity import Array, Granularity, Groups

NF4_BLOCK = 64
NF4_OFFSET = 0.9677083
KMEANS_MAX_ITERATIONS = 100
CODEBOOK_BITS = 16


@functools.cache
def nf4_levels() -> Float32:
    """The 16 levels of NF4, ascending, float32."""
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(NF4_OFFSET, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(NF4_OFFSET, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*negative, 0.0, *positive]))
    table: Float32 = (levels / levels.max()).astype(np.float32)
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class Nf4Format(Format):
    """4-bit NormalFloat; see the module text.

    Args:
        block: elements per scale; 0 when the caller chooses a granularity.

    Raises:
        SpecError: a negative block.
    """

    block: int = NF4_BLOCK

    def __post_init__(self) -> None:
        if self.block < 0:
            raise SpecError("SPEC-FORMAT", f"an NF4 block of {self.block}", "use at least 1")

    def __str__(self) -> str:
        return "nf4" if self.block == NF4_BLOCK else f"nf4g{self.block}"

    @property
    def bits(self) -> int:
        """Always 4."""
        return 4

    @property
    def max(self) -> float:
        """Largest level."""
        return 1.0

    def levels(self) -> npt.NDArray[np.float64]:
        """The 16 levels."""
        return nf4_levels().astype(np.float64)

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """The largest magnitude of each group, float32."""
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        largest = amax(groups)
        require_finite(largest, self)
        return Params(granularity, groups.to_param(safe_scale(largest.astype(np.float64), 1.0)))

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """Index of the nearest level, uint8."""
        values = as_float32(x)
        refuse_nan(values, self)
        if params is not None:
            values = values / as_float32(params.granularity.expand(params.scale, values.shape))
        return nearest(values, nf4_levels())

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Level times scale."""
        values = nf4_levels()[codes]
        if params is None:
            return values
        return np.asarray(values * params.granularity.expand(params.scale, codes.shape))


@dataclass(frozen=True)
class KMeansFormat(Format):
    """Levels found by Lloyd's algorithm for each group; see the module text.

    Args:
        bits: 1 to 8.
        block: elements per codebook along one axis; 0 when the caller chooses a granularity.

    Raises:
        SpecError: a width outside 1 to 8.
    """

    bits: int = 4
    block: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.block < 0:
            raise SpecError("SPEC-FORMAT", f"k-means with {self.bits} bits", "use 1 to 8 bits")

    def __str__(self) -> str:
        return f"kmeans{self.bits}" + (f"g{self.block}" if self.block else "")

    @property
    def max(self) -> float:
        """Bound of the levels, which depend on the data."""
        return 1.0

    def levels(self) -> npt.NDArray[np.float64]:
        """The levels before any data: equal steps over [-1, 1]."""
        return np.linspace(-1.0, 1.0, 1 << self.bits)

    def _group_bits(self, scale_bits: int) -> int:
        return CODEBOOK_BITS * (1 << self.bits) + scale_bits

    def params(
        self,
        x: Array,
        granularity: Granularity | None = None,
        *,
        axis: int = -1,
        weights: Array | None = None,
    ) -> Params:
        """Scale and codebook of each group.

        Args:
            x: values; NaN and Inf raise.
            granularity: which elements share a codebook; default the whole tensor.
            axis: axis of the default granularity.
            weights: importance of each element, shape of ``x`` (for example diag of the Hessian).

        Raises:
            DataError: NaN or Inf in ``x``.
        """
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        largest = amax(groups)
        require_finite(largest, self)
        scale = safe_scale(largest.astype(np.float64), 1.0)
        importance = np.ones(groups.values.shape) if groups.valid is None else groups.valid * 1.0
        if weights is not None:
            broadcast = np.broadcast_to(np.asarray(weights, np.float64), np.shape(x))
            importance = importance * granularity.split(broadcast).values
        codebook = np.stack(
            [
                lloyd(row / s, 1 << self.bits, w)
                for row, s, w in zip(
                    groups.values.astype(np.float64), scale.astype(float), importance, strict=True
                )
            ]
        )
        return Params(granularity, groups.to_param(scale), codebook=codebook.astype(np.float16))

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """Index of the nearest centroid, uint8. Without params: of the initial levels."""
        values = as_float32(x)
        refuse_nan(values, self)
        if params is None or params.codebook is None:
            return nearest(values, self.levels().astype(np.float32))
        groups = params.granularity.split(values)
        rows = groups.values / groups.from_param(params.scale)
        books = params.codebook.astype(np.float32)
        codes = [nearest(row, book) for row, book in zip(rows, books, strict=True)]
        return groups.merge(np.stack(codes))

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Centroid times scale."""
        if params is None or params.codebook is None:
            return self.levels().astype(np.float32)[codes]
        return decode_codebook(codes, params)


def decode_codebook(codes: Array, params: Params) -> Float32:
    """``scale * codebook[group, code]``, float32, for formats with a codebook for each group."""
    assert params.codebook is not None
    groups: Groups = params.granularity.split(codes.astype(np.int64))
    levels = np.take_along_axis(params.codebook.astype(np.float32), groups.values, axis=1)
    return groups.merge(levels * groups.from_param(params.scale))


def nearest(values: Float32, levels: Float32) -> npt.NDArray[np.uint8]:
    """Index of the nearest of ascending ``levels``; the lower one at a midpoint."""
    wide = levels.astype(np.float64)
    middle = (wide[:-1] + wide[1:]) / 2
    return np.searchsorted(middle, values.astype(np.float64), side="left").astype(np.uint8)


def lloyd(
    values: npt.NDArray[np.float64], k: int, weights: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """``k`` ascending centroids of one-dimensional ``values`` (``[L]``), by weighted k-means.

    Starts from equal steps over [min, max] of the values with a weight; a centroid that loses all
    its members stays where it is. Exact sums by prefix, so a step costs O(k log L).
    """
    weights = np.ones(values.shape) if weights is None else weights
    order = np.argsort(values, kind="stable")
    order = order[weights[order] > 0]
    if order.size == 0:
        return np.zeros(k)
    x, w = values[order], weights[order]
    mass = np.concatenate([[0.0], np.cumsum(w)])
    moment = np.concatenate([[0.0], np.cumsum(w * x)])
    centroids = np.linspace(x[0], x[-1], k)
    previous = np.full(k - 1, -1)
    for _ in range(KMEANS_MAX_ITERATIONS):
        cuts = np.searchsorted(x, (centroids[:-1] + centroids[1:]) / 2)
        if np.array_equal(cuts, previous):
            break
        edges = np.concatenate([[0], cuts, [x.size]])
        members = mass[edges[1:]] - mass[edges[:-1]]
        sums = moment[edges[1:]] - moment[edges[:-1]]
        centroids = np.where(members > 0, sums / np.where(members > 0, members, 1), centroids)
        centroids = np.maximum.accumulate(centroids)
        previous = cuts
    return centroids
