"""OCP Microscaling (MX): a block of 32 small elements times a power of two.

Specification v1.0 and Rouhani et al., "Microscaling Data Formats for Deep Learning",
arXiv 2310.10537. The scale is an E8M0 number, ``2**(code - 127)``, code 255 is NaN. With
``e_max = floor(log2(element max))``, a block of largest magnitude amax gets the exponent

=========  ==================================================================================
``floor``  ``floor(log2 amax) - e_max``: the specification's rule; the default. Values beyond
           the element's maximum saturate.
``ceil``   the smallest e with ``amax <= max * 2**e``: nothing saturates ("RCEIL")
``even``   like floor, but amax is first rounded to the element's mantissa
``4/3``    like floor, and all is multiplied by 4/3, kept as one factor of the tensor
           (FP-Quant): brings ``[4, 8)`` to ``[3, 6)`` for 4-bit elements
``auto``   the least squared error among floor, one less and one more
=========  ==================================================================================

bounded to ``[-127, 127]``. A NaN or Inf in a block makes its scale, and so the whole block, NaN.
A block of zeros has the code 0 and decodes to zeros. Blocks run along one axis (the reduction
axis of the matrix product); the last may be shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.errors import SpecError
from onnxq.formats.base import Float32, Format, Params, amax, as_float32
from onnxq.formats.granularity import Array, Granularity, Groups
from onnxq.formats.minifloat import NAMED_FLOATS, MiniFloat
from onnxq.formats.packing import unpack_bits

ScaleRule = Literal["floor", "ceil", "even", "4/3", "auto"]
SCALE_RULES: tuple[ScaleRule, ...] = ("floor", "ceil", "even", "4/3", "auto")

MX_ELEMENTS = ("fp8e4m3", "fp8e5m2", "fp6e2m3", "fp6e3m2", "fp4", "int8")
MX_BLOCK = 32
SCALE_BITS = 8
SCALE_BIAS = 127
SCALE_NAN = 255
INT8_FRACTION_BITS = 6
INT8_MAX_CODE = 127
FOUR_THIRDS = np.float32(4 / 3)


@dataclass(frozen=True)
class MxFormat(Format):
    """A microscaling format; see the module text.

    Args:
        element: ``fp8e4m3``, ``fp8e5m2``, ``fp6e2m3``, ``fp6e3m2``, ``fp4`` or ``int8`` (a fixed
            point number with 6 fraction bits, +-127/64).
        scale_rule: how a block's exponent is chosen; changes values, not the layout.
        block: elements per scale; 32 in the specification.

    Raises:
        SpecError: an element, rule or block that does not exist.
    """

    element: str
    scale_rule: ScaleRule = "floor"
    block: int = MX_BLOCK
    fixed_block: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.element not in MX_ELEMENTS:
            raise SpecError(
                "SPEC-FORMAT", f"no MX element {self.element!r}", f"use {', '.join(MX_ELEMENTS)}"
            )
        if self.scale_rule not in SCALE_RULES:
            raise SpecError(
                "SPEC-FORMAT",
                f"no MX scale rule {self.scale_rule!r}",
                f"use {', '.join(SCALE_RULES)}",
            )
        if self.block < 1:
            raise SpecError("SPEC-FORMAT", f"an MX block of {self.block}", "use at least 1")

    def __str__(self) -> str:
        rule = "" if self.scale_rule == "floor" else "-" + self.scale_rule.replace("/", "")
        affix = "" if self.block == MX_BLOCK else f"g{self.block}"
        return f"mx{self.element}{affix}{rule}"

    @property
    def float_element(self) -> MiniFloat | None:
        """The element as a float format; None for MXINT8."""
        return NAMED_FLOATS.get(self.element)

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return 8 if self.float_element is None else self.float_element.bits

    @property
    def max(self) -> float:
        """Largest finite element."""
        if self.float_element is None:
            return math.ldexp(INT8_MAX_CODE, -INT8_FRACTION_BITS)
        return self.float_element.max

    @property
    def max_exponent(self) -> int:
        """e_max: floor(log2(max))."""
        return math.frexp(self.max)[1] - 1

    @property
    def _mantissa_bits(self) -> int:
        return INT8_FRACTION_BITS if self.float_element is None else self.float_element.m

    def levels(self) -> npt.NDArray[np.float64]:
        """Values of an element."""
        if self.float_element is None:
            steps = np.arange(-INT8_MAX_CODE, INT8_MAX_CODE + 1.0)
            return np.asarray(np.ldexp(steps, -INT8_FRACTION_BITS))
        return self.float_element.levels()

    def _group_bits(self, scale_bits: int) -> int:
        return SCALE_BITS

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """Block scales as ``float8_e8m0fnu``; ``global_scale`` 4/3 with that rule.

        NaN and Inf in ``x`` are no error: the block's scale becomes NaN.
        """
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        largest = amax(groups).astype(np.float64)
        exponents = self._exponents(largest, groups)
        codes = np.clip(exponents, -SCALE_BIAS, SCALE_BIAS) + SCALE_BIAS
        codes = np.where(np.isfinite(largest), codes, SCALE_NAN).astype(np.uint8)
        scale = np.ascontiguousarray(groups.to_param(codes)).view(ml_dtypes.float8_e8m0fnu)
        factor = FOUR_THIRDS if self.scale_rule == "4/3" else None
        return Params(granularity, scale, global_scale=factor)

    def _exponents(self, largest: npt.NDArray[np.float64], groups: Groups) -> npt.NDArray[np.int64]:
        finite = np.where(np.isfinite(largest), largest, 0.0)
        fraction, binary = np.frexp(finite)
        floor = np.where(finite > 0, binary.astype(np.int64) - 1 - self.max_exponent, -SCALE_BIAS)
        if self.scale_rule == "ceil":
            return np.asarray(floor + (finite > np.ldexp(self.max, floor.astype(np.int32))))
        if self.scale_rule == "even":
            # fraction is in [0.5, 1): rounded to m + 1 bits it reaches 1 where amax carries over.
            full = 1 << (self._mantissa_bits + 1)
            return np.asarray(floor + (np.rint(fraction * full) == full))
        if self.scale_rule == "auto":
            return self._least_error(np.maximum(floor, -SCALE_BIAS), groups)
        return floor

    def _least_error(self, floor: npt.NDArray[np.int64], groups: Groups) -> npt.NDArray[np.int64]:
        best, least = floor, np.full(floor.shape, np.inf)
        values = np.where(np.isfinite(groups.values), groups.values, 0).astype(np.float64)
        for shift in (0, -1, 1):
            exponent = np.clip(floor + shift, -SCALE_BIAS, SCALE_BIAS)
            column = exponent[:, None].astype(np.int32)
            rounded = self._element_values(self._element_codes(np.ldexp(values, -column)))
            error = np.sum((np.ldexp(rounded, column) - values) ** 2, axis=1)
            best = np.where(error < least, exponent, best)
            least = np.minimum(error, least)
        return best

    def _element_codes(self, values: npt.NDArray[np.float64]) -> Array:
        if self.float_element is not None:
            return self.float_element.encode(values, saturate=True)
        steps = np.rint(np.ldexp(values, INT8_FRACTION_BITS))
        return np.clip(steps, -INT8_MAX_CODE, INT8_MAX_CODE).astype(np.int8)

    def _element_values(self, codes: Array) -> npt.NDArray[np.float64]:
        if self.float_element is not None:
            return self.float_element.decode(codes).astype(np.float64)
        return np.ldexp(codes.astype(np.float64), -INT8_FRACTION_BITS)

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """Element codes (uint8; int8 for MXINT8). In a NaN block all are 0."""
        values = as_float32(x).astype(np.float64)
        if params is None:
            return self._element_codes(values)
        exponent, is_nan = self._scales(params, values.shape)
        values = np.where(is_nan, 0.0, values)
        if params.global_scale is not None:
            values = values / np.float64(params.global_scale)
        return self._element_codes(np.ldexp(values, -exponent))

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Element times scale (times ``global_scale``); NaN in a NaN block."""
        values = self._element_values(codes)
        if params is None:
            return values.astype(np.float32)
        exponent, is_nan = self._scales(params, codes.shape)
        values = np.ldexp(values, exponent)
        if params.global_scale is not None:
            values = values * np.float64(params.global_scale)
        with np.errstate(over="ignore"):
            return np.where(is_nan, np.nan, values).astype(np.float32)

    @staticmethod
    def _scales(params: Params, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.int32], Array]:
        codes: npt.NDArray[Any] = params.scale.view(np.uint8)
        codes = params.granularity.expand(codes, shape)
        return codes.astype(np.int32) - SCALE_BIAS, codes == SCALE_NAN

    def unpack(self, data: bytes, shape: tuple[int, ...]) -> Array:
        """The inverse of ``pack``."""
        if self.float_element is not None:
            return super().unpack(data, shape)
        return unpack_bits(data, shape, self.bits, signed=True).astype(np.int8)
