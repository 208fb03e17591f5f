"""NVFP4: blocks of 16 FP4 elements, an E4M3 scale for each block, a float32 scale for the tensor.

With amax of the tensor and of a block:

- ``g = amax / (6 * 448)`` (``global_scale``), ``s = E4M3(amax_block / (6 g))``,
  ``q = E2M1(x / (s g))`` and ``x ~ q * (s * g)``: two chained ``DequantizeLinear``. The elements
  are rounded with the block scale as it was rounded.
- *Four over six* (Cook et al., arXiv 2512.02010): each block also tries to put its extreme on 4,
  with a scale 1.5 times as large, and keeps what has the smaller squared error (6 on a tie). Then
  ``g = amax / (6 * 256)``, so that 1.5 times the largest scale is still an E4M3 number.

A block whose scale rounds to zero becomes zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.errors import SpecError
from onnxq.formats.base import (
    Float32,
    Format,
    Params,
    amax,
    as_float32,
    require_finite,
    safe_scale,
)
from onnxq.formats.granularity import Array, Granularity
from onnxq.formats.minifloat import FP4, FP8E4M3

NV_BLOCK = 16
SCALE_BITS = 8
GLOBAL_SCALE_BITS = 32
FOUR_OVER_SIX_MAX_SCALE = 256.0
FOUR_OVER_SIX_EXPANSION = 1.5


@dataclass(frozen=True)
class NvFp4Format(Format):
    """NVFP4; see the module text.

    Args:
        four_over_six: choose per block whether its extreme lands on 6 or on 4.
        block: elements per scale; 16.

    Raises:
        SpecError: a block below 1.
    """

    four_over_six: bool = False
    block: int = NV_BLOCK
    fixed_block: ClassVar[bool] = True
    tensor_bits: ClassVar[int] = GLOBAL_SCALE_BITS

    def __post_init__(self) -> None:
        if self.block < 1:
            raise SpecError("SPEC-FORMAT", f"an NVFP4 block of {self.block}", "use at least 1")

    def __str__(self) -> str:
        affix = "" if self.block == NV_BLOCK else f"g{self.block}"
        return "nvfp4" + affix + ("-46" if self.four_over_six else "")

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return FP4.bits

    @property
    def max(self) -> float:
        """Largest element."""
        return FP4.max

    def levels(self) -> npt.NDArray[np.float64]:
        """Values of an element."""
        return FP4.levels()

    def _group_bits(self, scale_bits: int) -> int:
        return SCALE_BITS

    def params(
        self,
        x: Array,
        granularity: Granularity | None = None,
        *,
        axis: int = -1,
        tensor_amax: float | None = None,
    ) -> Params:
        """Block scales (``float8_e4m3fn``) and the scale of the tensor.

        Args:
            x: values; NaN and Inf raise.
            granularity: blocks of 16 along some axis.
            axis: axis of the default granularity.
            tensor_amax: range of the tensor when it is not that of ``x``: tensors that share a
                scale (q, k, v), or an activation's calibrated range.

        Raises:
            DataError: NaN or Inf in ``x``.
        """
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        largest = amax(groups).astype(np.float64)
        require_finite(largest, self)
        top_scale = FOUR_OVER_SIX_MAX_SCALE if self.four_over_six else FP8E4M3.max
        whole = largest.max(initial=0) if tensor_amax is None else tensor_amax
        reach = FP4.max * top_scale
        factor = np.float32(safe_scale(np.asarray(whole / reach, np.float64), reach))
        codes = FP8E4M3.encode(largest / FP4.max / np.float64(factor))
        if self.four_over_six:
            wide = FOUR_OVER_SIX_EXPANSION * largest / FP4.max / np.float64(factor)
            codes = _least_error(groups.values, codes, FP8E4M3.encode(wide), factor)
        scale = np.ascontiguousarray(groups.to_param(codes)).view(ml_dtypes.float8_e4m3fn)
        return Params(granularity, scale, global_scale=factor)

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """Codes of the elements, uint8 below 16."""
        values = as_float32(x)
        if params is None:
            return FP4.encode(values)
        return _element_codes(values, params.granularity.expand(_scales(params), values.shape))

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """``q * (s * g)`` in float32."""
        values = FP4.decode(codes)
        if params is None:
            return values
        return values * params.granularity.expand(_scales(params), codes.shape)


def _scales(params: Params) -> Float32:
    factor = np.float32(1) if params.global_scale is None else params.global_scale
    return params.scale.astype(np.float32) * factor


def _element_codes(values: Float32, scale: Float32) -> Array:
    safe = np.where(scale == 0, np.float32(1), scale)
    with np.errstate(over="ignore"):
        return FP4.encode(np.where(scale == 0, np.float32(0), values / safe))


def _least_error(values: Float32, six: Array, four: Array, factor: np.float32) -> Array:
    """Of two scale codes for each row of ``values``, the one of smaller squared error."""
    errors = []
    for codes in (six, four):
        scale = (FP8E4M3.decode(codes) * factor)[:, None]
        decoded = FP4.decode(_element_codes(values, scale)) * scale
        errors.append(np.sum((decoded.astype(np.float64) - values) ** 2, axis=1))
    return np.where(errors[1] < errors[0], four, six)
