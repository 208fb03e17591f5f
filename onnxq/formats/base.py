"""The interface of every number format."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, SpecError
from onnxq.formats.granularity import Array, Granularity, Groups
from onnxq.formats.packing import pack_bits, unpack_bits

MIN_NORMAL = float(np.finfo(np.float32).smallest_normal)
MAX_FLOAT = float(np.finfo(np.float32).max)
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Params:
    """What a tensor needs beside its codes. Shapes: see :mod:`onnxq.formats.granularity`.

    Attributes:
        granularity: which elements share a scale.
        scale: per group; float32, or ``float8_e8m0fnu`` / ``float8_e4m3fn`` where the format
            stores its scales so. ``x ~ scale * value(code)``.
        zero_point: per group; the code of zero, in the dtype of the codes. None means 0.
        global_scale: float32 factor of the whole tensor (NVFP4, MX with the 4/3 rule).
        codebook: float16 ``[G, n]``, the n levels of each group (k-means, TTQ); times ``scale``.
        micro: uint8 ``[G, block / sub_block]``, microexponents of MX9, MX6 and MX4.
        threshold: per group; magnitudes up to it become zero (ternary). Used by ``encode`` only.
    """

    granularity: Granularity
    scale: Array
    zero_point: Array | None = None
    global_scale: np.float32 | None = None
    codebook: Array | None = None
    micro: Array | None = None
    threshold: Array | None = None


class Format(abc.ABC):
    """A number format: how reals become codes, and codes bytes.

    A format is a frozen dataclass; ``str(fmt)`` is the name that :func:`parse_format` reads back.
    ``params`` looks at a tensor and chooses scales, ``encode`` and ``decode`` use them,
    ``fake_quant`` does all three. Arrays come as any float dtype and are taken as float32.
    """

    if TYPE_CHECKING:

        @property
        def bits(self) -> int:
            """Bits of one code."""

        @property
        def block(self) -> int:
            """Elements that share a scale along one axis; 0 when the caller chooses."""

    fixed_block: ClassVar[bool] = False
    """The block is a part of the format: no other granularity is possible."""

    tensor_bits: ClassVar[int] = 0
    """Bits that the whole tensor shares."""

    def default_granularity(self, axis: int = -1) -> Granularity:
        """Blocks along ``axis`` if the format has a block size, else one scale per tensor."""
        return Granularity.block(axis, self.block) if self.block else Granularity.per_tensor()

    def resolve_granularity(self, granularity: Granularity | None, axis: int = -1) -> Granularity:
        """The granularity to use when the caller asked for ``granularity`` (None: the default).

        Raises:
            SpecError: the format's block is fixed and the caller asked for something else.
        """
        if granularity is None:
            return self.default_granularity(axis)
        if self.fixed_block and (granularity.kind, granularity.size) != ("block", self.block):
            raise SpecError(
                "SPEC-GRANULARITY",
                f"{self} has blocks of {self.block} along one axis; it cannot take {granularity}",
                f"use block(axis,{self.block}), or leave the granularity out",
            )
        return granularity

    @abc.abstractmethod
    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """Scales (and what else the format needs) for ``x``.

        Raises:
            DataError: NaN or Inf in ``x`` where the format cannot represent it.
            SpecError: a granularity that the format cannot take.
        """

    @abc.abstractmethod
    def encode(self, x: Array, params: Params | None = None) -> Array:
        """Codes of ``x``, same shape. Without ``params`` the scale is 1.

        Raises:
            DataError: NaN where the format has no code for it.
        """

    @abc.abstractmethod
    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Values of ``codes``, same shape, float32."""

    def fake_quant(
        self, x: Array, granularity: Granularity | None = None, *, axis: int = -1
    ) -> Float32:
        """``decode(encode(x))`` with parameters from ``x`` itself."""
        params = self.params(x, granularity, axis=axis)
        return self.decode(self.encode(x, params), params)

    def sqnr_db(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> float:
        """Signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - q(x))^2); float64."""
        exact = np.asarray(x, np.float32).astype(np.float64)
        noise = float(np.sum((exact - self.fake_quant(x, granularity, axis=axis)) ** 2))
        return float("inf") if noise == 0 else 10 * float(np.log10(np.sum(exact**2) / noise))

    @property
    @abc.abstractmethod
    def max(self) -> float:
        """Largest finite magnitude at scale 1."""

    @abc.abstractmethod
    def levels(self) -> npt.NDArray[np.float64]:
        """All distinct finite values at scale 1, ascending."""

    def bits_per_element(
        self,
        shape: tuple[int, ...],
        granularity: Granularity | None = None,
        *,
        axis: int = -1,
        scale_bits: int = 32,
    ) -> float:
        """Storage of a tensor of ``shape`` per element: codes, and what groups and tensor share.

        Args:
            shape: of the tensor.
            granularity: which elements share a scale; by default the format's own.
            axis: of the blocks.
            scale_bits: bits of a scale where the format leaves them open.
        """
        groups = self.resolve_granularity(granularity, axis).groups(shape)
        shared = self._group_bits(scale_bits) * groups + self.tensor_bits
        return self._stored_bits + shared / max(1, math.prod(shape))

    @property
    def _stored_bits(self) -> float:
        """Bits that a code takes in storage."""
        return self.bits

    def _group_bits(self, scale_bits: int) -> int:
        """Bits that a group shares: its scale, and what else it has."""
        return scale_bits

    def pack(self, codes: Array) -> bytes:
        """Codes as bytes: a little-endian bit stream (:mod:`onnxq.formats.packing`)."""
        return pack_bits(codes, self.bits)

    def unpack(self, data: bytes, shape: tuple[int, ...]) -> Array:
        """The inverse of ``pack``.

        Raises:
            DataError: ``data`` is too short or too long for ``shape``.
        """
        return unpack_bits(data, shape, self.bits, signed=False).astype(
            np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32
        )


def as_float32(x: Any) -> Float32:
    """``x`` as a float32 array; values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float32, copy=False)


def require_finite(values: Array, fmt: Format) -> None:
    """Refuse NaN and Inf.

    Raises:
        DataError: some of ``values`` are not finite.
    """
    if not np.isfinite(values).all():
        raise DataError(
            "DATA-NOT-FINITE",
            f"NaN or Inf in the values to quantize to {fmt}",
            "remove them from the weights, or mask them before the range is taken",
        )


def refuse_nan(values: Array, fmt: Format) -> None:
    """Refuse NaN.

    Raises:
        DataError: some of ``values`` are NaN.
    """
    if np.isnan(values).any():
        raise DataError("DATA-NAN", f"NaN in a tensor; {fmt} has no code for it", "remove it")


def safe_scale(scale: Array, reach: Array | float) -> Float32:
    """``scale`` (float64) as float32: 1 for 0, never subnormal, ``reach`` times it stays finite."""
    bounded = np.where(scale == 0, 1.0, np.clip(scale, MIN_NORMAL, MAX_FLOAT))
    rounded = np.asarray(bounded).astype(np.float32)
    with np.errstate(over="ignore"):
        overflows = ~np.isfinite(rounded * np.asarray(reach).astype(np.float32))
        highest = np.nextafter(np.asarray(MAX_FLOAT / reach).astype(np.float32), np.float32(0))
    return np.asarray(np.where(overflows, highest, rounded), np.float32)


def amax(groups: Groups) -> Float32:
    """Largest magnitude of each group, ``[G]``; NaN when the group has one."""
    return np.asarray(np.abs(groups.values).max(axis=1, initial=0), np.float32)
