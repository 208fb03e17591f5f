"""Shared microexponents (MX9, MX6, MX4): block floating point on two levels.

Rouhani et al., "With Shared Microexponents, A Little Shifting Goes a Long Way",
arXiv 2302.08007; older than, and not the same as, the OCP formats of :mod:`onnxq.formats.mx`.

A block of 16 shares the exponent ``E = floor(log2 amax)`` (8 bits); each pair in it shares a
microexponent ``t = min(1, E - floor(log2 amax of the pair))`` (1 bit); elements are a sign and m
magnitude bits: ``x ~ +-k * 2**(E - t - m + 1)``, ``k = rint(|x| * 2**(m - 1 - E + t))`` bounded by
``2**m - 1``. Bits per element: ``1 + m + 8/16 + 1/2``.

A code is ``sign << m | k``. The exponent is kept as E8M0, with NaN for a block that has NaN or
Inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.errors import SpecError
from onnxq.formats.base import Float32, Format, Params, amax, as_float32
from onnxq.formats.granularity import Array, Granularity
from onnxq.formats.mx import SCALE_BIAS, SCALE_BITS, SCALE_NAN


@dataclass(frozen=True)
class BdrFormat(Format):
    """Two-level block floating point; see the module text.

    Args:
        m: magnitude bits of an element; 7, 4 and 2 for MX9, MX6 and MX4.
        block: elements that share an exponent.
        sub_block: elements that share a microexponent; divides ``block``.

    Raises:
        SpecError: sizes that do not fit together.
    """

    m: int
    block: int = 16
    sub_block: int = 2
    fixed_block: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (1 <= self.m <= 7 and self.sub_block >= 1 and self.block % self.sub_block == 0):
            raise SpecError(
                "SPEC-FORMAT",
                f"shared microexponents with m={self.m}, {self.block} and {self.sub_block}",
                "use m from 1 to 7 and a sub-block that divides the block",
            )

    def __str__(self) -> str:
        known = _NAMES.get((self.m, self.block, self.sub_block))
        return known or f"bdr{self.m}g{self.block}s{self.sub_block}"

    @property
    def bits(self) -> int:
        """Sign and magnitude bits."""
        return 1 + self.m

    @property
    def max(self) -> float:
        """Largest element when E = 0 and t = 0; below 2."""
        return math.ldexp((1 << self.m) - 1, 1 - self.m)

    def levels(self) -> npt.NDArray[np.float64]:
        """Values at E = 0 and t = 0."""
        top = (1 << self.m) - 1
        return np.asarray(np.ldexp(np.arange(-top, top + 1.0), 1 - self.m))

    def _group_bits(self, scale_bits: int) -> int:
        return SCALE_BITS + self.block // self.sub_block

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """Block exponents (``scale``, ``float8_e8m0fnu``) and microexponents (``micro``)."""
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        largest = amax(groups).astype(np.float64)
        pairs = np.abs(groups.values).reshape(len(largest), -1, self.sub_block).max(axis=2)
        exponent = _floor_log2(largest)
        micro = np.clip(exponent[:, None] - _floor_log2(pairs.astype(np.float64)), 0, 1)
        codes = np.where(np.isfinite(largest), exponent + SCALE_BIAS, SCALE_NAN).astype(np.uint8)
        scale = np.ascontiguousarray(groups.to_param(codes)).view(ml_dtypes.float8_e8m0fnu)
        return Params(granularity, scale, micro=micro.astype(np.uint8))

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """Codes, uint8. Without params the exponents are 0. In a NaN block all codes are 0."""
        values = as_float32(x).astype(np.float64)
        exponent, is_nan = self._exponents(params, values.shape)
        values = np.where(is_nan, 0.0, values)
        top = (1 << self.m) - 1
        magnitude = np.clip(np.rint(np.ldexp(np.abs(values), self.m - 1 - exponent)), 0, top)
        sign = np.signbit(values) & (magnitude > 0)
        return magnitude.astype(np.uint8) | (sign.astype(np.uint8) << np.uint8(self.m))

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Values, float32; NaN in a NaN block."""
        exponent, is_nan = self._exponents(params, codes.shape)
        magnitude = (codes & ((1 << self.m) - 1)).astype(np.float64)
        signed = np.where(codes >> self.m, -magnitude, magnitude)
        values = np.ldexp(signed, exponent + (1 - self.m))
        return np.where(is_nan, np.nan, values).astype(np.float32)

    def _exponents(
        self, params: Params | None, shape: tuple[int, ...]
    ) -> tuple[npt.NDArray[np.int32], Array]:
        """E - t of every element, and whether its block is NaN."""
        if params is None or params.micro is None:
            return np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        groups = params.granularity.split(np.empty(shape, np.bool_))
        codes = groups.from_param(params.scale.view(np.uint8)).astype(np.int32)
        micro = np.repeat(params.micro, self.sub_block, axis=1).astype(np.int32)
        is_nan = np.broadcast_to(codes == SCALE_NAN, micro.shape)
        return groups.merge(codes - SCALE_BIAS - micro), groups.merge(is_nan)


_NAMES = {(7, 16, 2): "mx9", (4, 16, 2): "mx6", (2, 16, 2): "mx4"}


def _floor_log2(x: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """floor(log2 x), bounded to the range of E8M0; the lowest for 0, and for Inf and NaN."""
    positive = np.isfinite(x) & (x > 0)
    exponent = np.frexp(np.where(positive, x, 1.0))[1].astype(np.int64) - 1
    return np.where(positive, np.maximum(exponent, -SCALE_BIAS), -SCALE_BIAS)
