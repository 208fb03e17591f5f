"""Levels that are powers of 2 or of its square root (Miyashita et al., arXiv 1603.01025).

A code is ``sign << (b - 1) | k``. ``k = 0`` is zero; otherwise the magnitude is
``beta**(k - K)`` with K the largest k, so that levels run from 1 down to ``beta**(1 - K)``. The
scale is a power of beta too, ``beta**rint(log_beta amax)``: with beta = 2 all is shifts.

``log`` rounds the logarithm, as hardware does; ``linear`` takes the nearest level. They differ:
between 1 and 2 the first changes over at sqrt(2), the second at 1.5. Magnitudes below half the
smallest level become zero in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, SpecError
from onnxq.formats.base import (
    MAX_FLOAT,
    MIN_NORMAL,
    Float32,
    Format,
    Params,
    amax,
    as_float32,
    refuse_nan,
    require_finite,
)
from onnxq.formats.granularity import Array, Granularity

Rounding = Literal["log", "linear"]


@dataclass(frozen=True)
class LogFormat(Format):
    """Logarithmic levels; see the module text.

    Args:
        bits: 2 to 8, the sign included.
        steps: levels per factor of two: 1 for beta = 2, 2 for beta = sqrt(2).
        signed: whether there is a sign bit (softmax outputs need none).
        rounding: ``log`` or ``linear``.
        block: elements per scale along one axis; 0 when the caller chooses a granularity.

    Raises:
        SpecError: a combination that does not exist.
    """

    bits: int = 4
    steps: int = 1
    signed: bool = True
    rounding: Rounding = "log"
    block: int = 0

    def __post_init__(self) -> None:
        valid = 2 <= self.bits <= 8 and self.steps in (1, 2) and self.block >= 0
        if not valid or self.rounding not in ("log", "linear"):
            raise SpecError(
                "SPEC-FORMAT",
                f"no logarithmic format of {self.bits} bits, {self.steps} levels per octave, "
                f"rounding {self.rounding!r}",
                "use 2 to 8 bits, 1 or 2 levels, rounding log or linear",
            )

    def __str__(self) -> str:
        return (
            ("" if self.signed else "u")
            + ("log2" if self.steps == 1 else "logsqrt2")
            + ("" if self.bits == 4 else f"b{self.bits}")
            + (f"g{self.block}" if self.block else "")
            + ("-linear" if self.rounding == "linear" else "")
        )

    @property
    def top(self) -> int:
        """Largest magnitude code, that of the level 1."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def max(self) -> float:
        """Largest level."""
        return 1.0

    def _magnitudes(self) -> npt.NDArray[np.float64]:
        return np.concatenate([[0.0], 2.0 ** (np.arange(1 - self.top, 1) / self.steps)])

    def levels(self) -> npt.NDArray[np.float64]:
        """Zero and the powers, with both signs if signed."""
        magnitudes = self._magnitudes()
        return np.unique(np.concatenate([-magnitudes, magnitudes])) if self.signed else magnitudes

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """Scale of each group: the power of beta nearest to amax in the logarithm; 1 for zero."""
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        largest = amax(groups).astype(np.float64)
        require_finite(largest, self)
        power = np.rint(self.steps * np.log2(np.where(largest > 0, largest, 1.0)))
        lowest, highest = math.log2(MIN_NORMAL), math.floor(math.log2(MAX_FLOAT))
        scale = 2.0 ** np.clip(power / self.steps, lowest, highest)
        return Params(granularity, groups.to_param(scale.astype(np.float32)))

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """Codes, uint8; magnitudes above 1 saturate.

        Raises:
            DataError: NaN, or a negative value when unsigned.
        """
        values = as_float32(x).astype(np.float64)
        refuse_nan(values, self)
        if not self.signed and (values < 0).any():
            raise DataError(
                "DATA-NEGATIVE", f"negative values; {self} is unsigned", "use the signed format"
            )
        if params is not None:
            values = values / params.granularity.expand(params.scale, values.shape)
        codes = np.searchsorted(self._thresholds(), np.abs(values), side="left").astype(np.uint8)
        sign = np.signbit(values) & (codes > 0)
        return codes | (sign.astype(np.uint8) << np.uint8(self.bits - 1))

    def _thresholds(self) -> npt.NDArray[np.float64]:
        """Magnitudes up to which each code goes; the first is half the smallest level."""
        magnitudes = self._magnitudes()
        if self.rounding == "linear":
            return (magnitudes[:-1] + magnitudes[1:]) / 2
        between = np.sqrt(magnitudes[1:-1] * magnitudes[2:])
        return np.concatenate([[magnitudes[1] / 2], between])

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Level times scale."""
        magnitude = self._magnitudes().astype(np.float32)[codes & self.top]
        values = np.where(codes > self.top, -magnitude, magnitude)
        if params is None:
            return np.asarray(values)
        return np.asarray(values * params.granularity.expand(params.scale, codes.shape))
