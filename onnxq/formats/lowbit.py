"""Formats below two and a half bits: binary, ternary, and 2-bit levels without a zero.

=================  ===================================  =========================================
name               levels at scale 1                    scale and threshold (w: a group's weights)
=================  ===================================  =========================================
binary             -1, +1 (0 becomes +1)                mean|w| (XNOR-Net's BWN)
ternary            -1, 0, +1                            zero up to 0.7 mean|w|; scale is the mean
                                                        of what is above (TWN)
ternary-absmean    -1, 0, +1                            mean|w|, zero up to half of it (BitNet)
ternary-elastic    -1, 0, +1                            2/3 max|w|, zero up to half (ParetoQ)
ternary-ttq        -n, 0, +p                            zero up to 0.05 max|w|; p and n are the
                                                        means above, for each sign (TTQ)
seq2               -3/4, -1/4, +1/4, +3/4               max|w| (ParetoQ's stretched elastic)
=================  ===================================  =========================================

Storage: binary one bit, 1 means +1, first in the lowest bit; ternary five codes in a byte, base 3;
seq2 two bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
from onnxq.formats.codebook import decode_codebook
from onnxq.formats.granularity import Array, Granularity, Groups
from onnxq.formats.packing import TRITS_PER_BYTE, pack_trits, unpack_trits

TernaryRule = Literal["twn", "absmean", "elastic", "ttq"]
TERNARY_RULES: tuple[TernaryRule, ...] = ("twn", "absmean", "elastic", "ttq")

TWN_THRESHOLD = 0.7
TTQ_THRESHOLD = 0.05
ELASTIC_LEVEL = 2 / 3
SEQ2_STEP = 0.5
SEQ2_MAX = 0.75


@dataclass(frozen=True)
class BinaryFormat(Format):
    """-1 or +1 times mean|w|; see the module text.

    Args:
        block: elements per scale along one axis; 0 when the caller chooses a granularity.
    """

    block: int = 0

    def __str__(self) -> str:
        return "binary" + (f"g{self.block}" if self.block else "")

    @property
    def bits(self) -> int:
        """Always 1."""
        return 1

    @property
    def max(self) -> float:
        """Always 1."""
        return 1.0

    def levels(self) -> npt.NDArray[np.float64]:
        """-1 and +1."""
        return np.array([-1.0, 1.0])

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """mean|x| of each group, which minimises the squared error for these signs."""
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        require_finite(groups.values, self)
        return Params(granularity, groups.to_param(safe_scale(_mean_magnitude(groups), 1.0)))

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """1 for +1 (zero included), 0 for -1; uint8. Scales do not matter."""
        values = as_float32(x)
        refuse_nan(values, self)
        del params
        return (values >= 0).astype(np.uint8)

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """-1 or +1 times scale."""
        return _scaled(codes.astype(np.float32) * 2 - 1, params)


@dataclass(frozen=True)
class TernaryFormat(Format):
    """-1, 0 or +1 times a scale; see the module text.

    Args:
        rule: ``twn``, ``absmean``, ``elastic`` or ``ttq``.
        block: elements per scale along one axis; 0 when the caller chooses a granularity.

    Raises:
        SpecError: an unknown rule.
    """

    rule: TernaryRule = "twn"
    block: int = 0

    def __post_init__(self) -> None:
        if self.rule not in TERNARY_RULES:
            raise SpecError(
                "SPEC-FORMAT",
                f"no ternary rule {self.rule!r}",
                f"use {', '.join(TERNARY_RULES)}",
            )

    def __str__(self) -> str:
        affix = f"g{self.block}" if self.block else ""
        return f"ternary{affix}" + ("" if self.rule == "twn" else f"-{self.rule}")

    @property
    def bits(self) -> int:
        """Bits of an unpacked code; packed, five codes take a byte."""
        return 2

    @property
    def _stored_bits(self) -> float:
        return 8 / TRITS_PER_BYTE

    @property
    def max(self) -> float:
        """Always 1."""
        return 1.0

    def levels(self) -> npt.NDArray[np.float64]:
        """-1, 0 and +1."""
        return np.array([-1.0, 0.0, 1.0])

    def _group_bits(self, scale_bits: int) -> int:
        return scale_bits * (2 if self.rule == "ttq" else 1)

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """Scale and threshold of each group; with TTQ a codebook ``[-n, 0, p] / scale``."""
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        require_finite(groups.values, self)
        magnitude = np.abs(groups.values.astype(np.float64))
        mean, largest = _mean_magnitude(groups), amax(groups).astype(np.float64)
        codebook = None
        if self.rule == "twn":
            threshold = TWN_THRESHOLD * mean
            scale = _mean_where(magnitude, magnitude > threshold[:, None])
        elif self.rule == "absmean":
            threshold, scale = mean / 2, mean
        elif self.rule == "elastic":
            threshold, scale = ELASTIC_LEVEL * largest / 2, ELASTIC_LEVEL * largest
        else:
            threshold, scale = TTQ_THRESHOLD * largest, largest
            codebook = _two_sided(groups.values.astype(np.float64), threshold, largest)
        return Params(
            granularity,
            groups.to_param(safe_scale(scale, 1.0)),
            codebook=codebook,
            threshold=groups.to_param(threshold.astype(np.float32)),
        )

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """-1, 0 or +1, int8. Without params the threshold is one half."""
        values = as_float32(x)
        refuse_nan(values, self)
        threshold: Array = np.array(0.5, np.float32)
        if params is not None and params.threshold is not None:
            threshold = params.granularity.expand(params.threshold, values.shape)
        return (np.sign(values) * (np.abs(values) > threshold)).astype(np.int8)

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Code times scale, or TTQ's level."""
        if params is not None and params.codebook is not None:
            return decode_codebook(codes.astype(np.int8) + 1, params)
        return _scaled(codes.astype(np.float32), params)

    def pack(self, codes: Array) -> bytes:
        """Five codes a byte, base 3."""
        return pack_trits(codes)

    def unpack(self, data: bytes, shape: tuple[int, ...]) -> Array:
        """The inverse of ``pack``, int8."""
        return unpack_trits(data, shape)


@dataclass(frozen=True)
class Seq2Format(Format):
    """Four levels without a zero, +-1/4 and +-3/4 of max|w|; see the module text.

    Args:
        block: elements per scale along one axis; 0 when the caller chooses a granularity.
    """

    block: int = 0

    def __str__(self) -> str:
        return "seq2" + (f"g{self.block}" if self.block else "")

    @property
    def bits(self) -> int:
        """Always 2."""
        return 2

    @property
    def max(self) -> float:
        """Largest level."""
        return SEQ2_MAX

    def levels(self) -> npt.NDArray[np.float64]:
        """The four levels."""
        return np.array([-0.75, -0.25, 0.25, 0.75])

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """max|x| of each group."""
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        largest = amax(groups).astype(np.float64)
        require_finite(largest, self)
        return Params(granularity, groups.to_param(safe_scale(largest, 1.0)))

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """0 to 3, uint8: ``floor(2 x / scale) + 2``, bounded."""
        values = as_float32(x)
        refuse_nan(values, self)
        if params is not None:
            values = values / as_float32(params.granularity.expand(params.scale, values.shape))
        return np.asarray(np.clip(np.floor(values / SEQ2_STEP) + 2, 0, 3), np.uint8)

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Level times scale."""
        return _scaled((codes.astype(np.float32) - np.float32(1.5)) * np.float32(SEQ2_STEP), params)


def _scaled(values: Float32, params: Params | None) -> Float32:
    if params is None:
        return values
    return np.asarray(values * params.granularity.expand(params.scale, values.shape))


def _mean_magnitude(groups: Groups) -> npt.NDArray[np.float64]:
    total = np.abs(groups.values).sum(axis=1, dtype=np.float64)
    return np.asarray(total / np.maximum(groups.count()[:, 0], 1))


def _mean_where(values: npt.NDArray[np.float64], mask: Array) -> npt.NDArray[np.float64]:
    return np.asarray((values * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1))


def _two_sided(
    values: npt.NDArray[np.float64],
    threshold: npt.NDArray[np.float64],
    largest: npt.NDArray[np.float64],
) -> npt.NDArray[np.float16]:
    """``[-n, 0, p]`` relative to the largest magnitude; 0 for a sign that has no members."""
    relative = values / np.where(largest > 0, largest, 1)[:, None]
    bound = (threshold / np.where(largest > 0, largest, 1))[:, None]
    negative = _mean_where(relative, relative < -bound)
    positive = _mean_where(relative, relative > bound)
    return np.stack([negative, np.zeros_like(negative), positive], axis=1).astype(np.float16)
