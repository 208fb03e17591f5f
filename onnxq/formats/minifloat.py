"""Floating-point formats of any exponent and mantissa width.

A code is ``sign | exponent | mantissa``. With stored exponent E, mantissa M of m bits and bias b:

- normal (E > 0): ``(-1)**sign * 2**(E - b) * (1 + M / 2**m)``
- subnormal (E = 0): ``(-1)**sign * 2**(1 - b) * M / 2**m``

``specials`` says which codes are no numbers:

=======  ==========================================================================
``ieee``  the largest E holds Inf (M = 0) and NaN
``fn``    finite but for NaN, at E and M all ones (both signs)
``fnuz``  finite but for NaN, at the code of -0; there is no -0
``none``  every code is finite
=======  ==========================================================================

Rounding is to nearest, ties to the even code, in one step from float32. Formats of 8 bits and
less are scaled so that the largest magnitude of a group lands on the largest value, and saturate
(as ONNX ``Cast`` and ``QuantizeLinear`` do); wider ones are cast as IEEE 754 says.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, SpecError
from onnxq.formats.base import Float32, Format, Params, amax, as_float32, require_finite, safe_scale
from onnxq.formats.granularity import Array, Granularity
from onnxq.formats.packing import pack_bits, unpack_bits

Specials = Literal["ieee", "fn", "fnuz", "none"]

TF32_STORAGE_BITS = 32


@dataclass(frozen=True)
class MiniFloat(Format):
    """A floating-point format; see the module text.

    Args:
        e: exponent bits, 1 to 8.
        m: mantissa bits, 0 to 23.
        bias: exponent bias.
        specials: ``ieee``, ``fn``, ``fnuz`` or ``none``.
        signed: whether there is a sign bit.
        block: elements per scale along one axis; 0 when the caller chooses a granularity.

    Raises:
        SpecError: widths or a kind of specials that do not exist.
    """

    e: int
    m: int
    bias: int
    specials: Specials = "none"
    signed: bool = True
    block: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.e <= 8 and 0 <= self.m <= 23 and self.block >= 0):
            raise SpecError(
                "SPEC-FORMAT",
                f"no float with {self.e} exponent bits, {self.m} mantissa bits, block {self.block}",
                "use 1 to 8 exponent bits and 0 to 23 mantissa bits",
            )
        if self.specials not in ("ieee", "fn", "fnuz", "none"):
            raise SpecError(
                "SPEC-FORMAT",
                f"unknown kind of special values {self.specials!r}",
                "use ieee, fn, fnuz or none",
            )
        if (self.specials == "fnuz" and not self.signed) or (self.specials == "fn" and not self.m):
            raise SpecError(
                "SPEC-FORMAT",
                f"{self.specials} needs a sign bit and a mantissa",
                "use none or ieee",
            )

    def __str__(self) -> str:
        affix = f"g{self.block}" if self.block else ""
        plain = replace(self, block=0)
        known = next((name for name, fmt in NAMED_FLOATS.items() if fmt == plain), None)
        if known is not None:
            return known + affix
        head = f"fp{self.bits}e{self.e}m{self.m}" if self.signed else f"ue{self.e}m{self.m}"
        kind = "fin" if self.specials == "none" else self.specials
        return f"{head}{kind}b{self.bias}{affix}"

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa bits."""
        return self.signed + self.e + self.m

    @property
    def scaled(self) -> bool:
        """Whether values are divided by a scale first (8 bits and less)."""
        return self.bits <= 8

    @property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        top = 1 << (self.e + self.m)
        if self.specials == "ieee":
            return top - (1 << self.m) - 1
        return top - 2 if self.specials == "fn" else top - 1

    @property
    def nan_code(self) -> int | None:
        """The positive NaN that encoding writes; None when there is none."""
        if self.specials == "none" or (self.specials == "ieee" and self.m == 0):
            return None
        if self.specials == "fnuz":
            return 1 << (self.e + self.m)
        top = (1 << (self.e + self.m)) - 1
        return top if self.specials == "fn" else self.max_code + 1 + (1 << (self.m - 1))

    @property
    def max(self) -> float:
        """Largest finite value."""
        return float(self._finite_value(np.array(self.max_code)))

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)), the e_max of the MX specification."""
        return (self.max_code >> self.m) - self.bias

    @property
    def smallest_normal(self) -> float:
        """Smallest value with a full mantissa."""
        return float(np.ldexp(1.0, 1 - self.bias))

    @property
    def smallest_subnormal(self) -> float:
        """Smallest value above zero."""
        return float(np.ldexp(1.0, 1 - self.bias - self.m))

    def levels(self) -> npt.NDArray[np.float64]:
        """All distinct finite values; for at most 16 bits.

        Raises:
            SpecError: a wider format, whose levels would not fit in memory.
        """
        if self.bits > 16:
            raise SpecError(
                "SPEC-FORMAT", f"{self} has 2**{self.bits} codes", "levels exist up to 16 bits"
            )
        magnitudes = self._finite_value(np.arange(self.max_code + 1))
        return np.unique(np.concatenate([-magnitudes, magnitudes])) if self.signed else magnitudes

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """Scale ``amax / max`` of each group (1 for the wide formats, which are only cast)."""
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        if not self.scaled:
            return Params(granularity, np.ones(granularity.param_shape(x.shape), np.float32))
        largest = amax(groups).astype(np.float64)
        require_finite(largest, self)
        return Params(granularity, groups.to_param(safe_scale(largest / self.max, self.max)))

    def encode(
        self, x: Array, params: Params | None = None, *, saturate: bool | None = None
    ) -> Array:
        """Codes, uint8, uint16 or uint32.

        Args:
            x: values, any shape.
            params: scales; None for 1.
            saturate: beyond ``max``, infinities included, give ``max`` (default up to 8 bits), or
                Inf, or else NaN (default for wider formats).

        Raises:
            DataError: NaN, or an overflow without saturation, where the format has no code for
                it; a negative value in an unsigned format.
        """
        values = as_float32(x)
        if params is not None and self.scaled:
            with np.errstate(over="ignore", invalid="ignore"):
                scale = as_float32(params.granularity.expand(params.scale, values.shape))
                values = values / scale
        saturate = self.scaled if saturate is None else saturate
        codes = self._round(np.abs(values).astype(np.float64))
        codes = np.where(codes > self.max_code, self._overflow_code(codes, saturate), codes)
        codes = self._add_sign(codes, values)
        nan = np.isnan(values)
        if nan.any():
            codes = np.where(nan, self._require_nan(int(nan.sum())), codes)
        return codes.astype(np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else "u4")

    def _round(self, magnitude: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Codes without sign, not yet bounded by ``max_code``; infinity and NaN give the bound.

        With ``step`` the spacing of values around x, the integer ``rint(x / step)`` counts from
        the binade's start; a carry into the next binade adds up by itself.
        """
        finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
        lowest = 1 - self.bias
        binary = np.where(finite > 0, np.frexp(finite)[1] - 1, lowest)  # frexp(0) is no exponent
        exponent = np.maximum(binary, lowest)
        steps = np.rint(np.ldexp(finite, self.m - exponent)).astype(np.int64)
        codes = steps + ((exponent.astype(np.int64) + self.bias - 1) << self.m)
        return np.where(np.isfinite(magnitude), codes, self.max_code + 1)

    def _overflow_code(self, codes: Array, saturate: bool) -> int:
        if saturate or not (codes > self.max_code).any():
            return self.max_code
        if self.specials == "ieee":
            return self.max_code + 1
        return self._require_nan(int((codes > self.max_code).sum()))

    def _require_nan(self, count: int) -> int:
        if self.nan_code is None:
            raise DataError(
                "DATA-NAN",
                f"{count} values are NaN or overflow; {self} has no code for NaN",
                "remove NaN from the tensor, or saturate",
            )
        return self.nan_code

    def _add_sign(self, codes: Array, values: Float32) -> Array:
        negative = np.signbit(values) & ~np.isnan(values)
        if self.specials == "fnuz":
            negative &= codes != 0
        if self.signed:
            return np.asarray(codes | (negative.astype(np.int64) << (self.e + self.m)))
        if (negative & (values != 0)).any():
            raise DataError(
                "DATA-NEGATIVE",
                f"{int((negative & (values != 0)).sum())} values are negative; {self} is unsigned",
                "use a signed format",
            )
        return codes

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """Values times scales, float32."""
        values = _table(self)[codes] if self.bits <= 16 else self._value(codes)
        if params is None or not self.scaled:
            return np.asarray(values)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(values * params.granularity.expand(params.scale, codes.shape))

    def _finite_value(self, magnitude: Array) -> npt.NDArray[np.float64]:
        """Value of codes without sign, as if every code were finite."""
        stored = magnitude.astype(np.int64) >> self.m
        mantissa = magnitude.astype(np.int64) & ((1 << self.m) - 1)
        significand = mantissa + np.where(stored > 0, 1 << self.m, 0)
        exponent = np.maximum(stored, 1) - self.bias - self.m
        return np.asarray(np.ldexp(significand.astype(np.float64), exponent.astype(np.int32)))

    def _value(self, codes: Array) -> Float32:
        """Value of whole codes, specials included."""
        wide = codes.astype(np.int64)
        sign_bit = 1 << (self.e + self.m)
        magnitude = wide & (sign_bit - 1)
        values = self._finite_value(magnitude)
        if self.specials == "ieee":
            values = np.where(magnitude == self.max_code + 1, np.inf, values)
        values = np.where(magnitude > self.max_code + (self.specials == "ieee"), np.nan, values)
        if self.signed:
            values = np.where(wide & sign_bit, -values, values)
        if self.specials == "fnuz":
            values = np.where(wide == sign_bit, -np.nan, values)
        with np.errstate(over="ignore"):
            return values.astype(np.float32)

    def _group_bits(self, scale_bits: int) -> int:
        return scale_bits if self.scaled else 0

    @property
    def _stored_bits(self) -> int:
        return TF32_STORAGE_BITS if self.bits > 16 else self.bits

    def pack(self, codes: Array) -> bytes:
        """A bit stream; TF32 as the 32 bits of the equal float32, little-endian."""
        if self.bits <= 16:
            return pack_bits(codes, self.bits)
        return pack_bits(codes.astype(np.int64) << (self._stored_bits - self.bits), 32)

    def unpack(self, data: bytes, shape: tuple[int, ...]) -> Array:
        """The inverse of ``pack``."""
        if self.bits <= 16:
            return super().unpack(data, shape)
        wide = unpack_bits(data, shape, self._stored_bits, signed=False)
        return np.asarray(wide >> (self._stored_bits - self.bits)).astype(np.uint32)


NAMED_FLOATS: dict[str, MiniFloat] = {
    "fp32": MiniFloat(8, 23, 127, "ieee"),
    "tf32": MiniFloat(8, 10, 127, "ieee"),
    "fp16": MiniFloat(5, 10, 15, "ieee"),
    "bf16": MiniFloat(8, 7, 127, "ieee"),
    "fp8e4m3": MiniFloat(4, 3, 7, "fn"),
    "fp8e5m2": MiniFloat(5, 2, 15, "ieee"),
    "fp8e3m4": MiniFloat(3, 4, 3, "none"),
    "fp8e2m5": MiniFloat(2, 5, 1, "none"),
    "fp8e4m3fnuz": MiniFloat(4, 3, 8, "fnuz"),
    "fp8e5m2fnuz": MiniFloat(5, 2, 16, "fnuz"),
    "ue5m3": MiniFloat(5, 3, 15, "fn", signed=False),
    "fp6e2m3": MiniFloat(2, 3, 1, "none"),
    "fp6e3m2": MiniFloat(3, 2, 3, "none"),
    "fp4": MiniFloat(2, 1, 1, "none"),
    "fp4ieee": MiniFloat(2, 1, 1, "ieee"),
}

FP4 = NAMED_FLOATS["fp4"]
FP8E4M3 = NAMED_FLOATS["fp8e4m3"]


@functools.cache
def _table(fmt: MiniFloat) -> Float32:
    table = fmt._value(np.arange(1 << fmt.bits))
    table.flags.writeable = False
    return table


def search_minifloat(
    x: Array, bits: int = 8, granularity: Granularity | None = None
) -> tuple[MiniFloat, Params]:
    """The float without special codes, and its scales, of least squared error on ``x``.

    A real-valued exponent bias is the same as a scale, so the search runs over the largest
    representable value c in linspace(0.1, 1.2, 111) * amax and over the mantissa widths 1 to
    ``bits - 2``. Each group votes for its best width; the majority decides for the tensor.
    (Kuzmin et al., "FP8 Quantization: The Power of the Exponent", arXiv 2208.09225.)

    Raises:
        DataError: NaN or Inf in ``x``.
    """
    granularity = granularity or Granularity.per_tensor()
    groups = granularity.split(as_float32(x))
    largest = amax(groups).astype(np.float64)
    candidates = [MiniFloat(bits - 1 - m, m, (1 << (bits - 2 - m)) - 1) for m in range(1, bits - 1)]
    require_finite(largest, candidates[0])
    errors = np.full((len(candidates), largest.size), np.inf)
    scales = np.ones((len(candidates), largest.size), np.float32)
    for i, fmt in enumerate(candidates):
        for fraction in np.linspace(0.1, 1.2, 111):
            scale = safe_scale(fraction * largest / fmt.max, fmt.max)
            values = fmt.decode(fmt.encode(groups.values / scale[:, None])) * scale[:, None]
            error = np.sum((values.astype(np.float64) - groups.values) ** 2, axis=1)
            better = error < errors[i]
            errors[i] = np.where(better, error, errors[i])
            scales[i] = np.where(better, scale, scales[i])
    votes = np.bincount(errors.argmin(axis=0), minlength=len(candidates))
    best = int(votes.argmax())
    return candidates[best], Params(granularity, groups.to_param(scales[best]))
