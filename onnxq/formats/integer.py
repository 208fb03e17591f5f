"""Integer formats and the affine maps between reals and integers.

``q = clip(rint(x / s) + z, qmin, qmax)`` and ``x ~ s * (q - z)``, with ``rint`` rounding half to
even and the division done in float32, as ONNX ``QuantizeLinear`` and ``DequantizeLinear`` do.

Schemes (b bits; amax the largest magnitude of a group):

- ``sym``: ``s = amax / (2**(b-1) - 1)``, ``z = 0`` (``2**(b-1)`` for unsigned codes). The most
  negative code is reachable by rounding only, or never with ``narrow``.
- ``asym``: ``lo = min(x, 0)``, ``hi = max(x, 0)``, ``s = (hi - lo) / (2**b - 1)``,
  ``z = qmin - rint(lo / s)``; zero is exact (padding and ReLU need that).
- ``full``: ``s = m / -2**(b-1)`` where m is the element of largest magnitude with its sign; s may
  be negative. The extreme lands on the extra code. (llama.cpp ``q4_0``, AutoRound ``int_sym``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, SpecError
from onnxq.formats.base import (
    MIN_NORMAL,
    Float32,
    Format,
    Params,
    as_float32,
    require_finite,
    safe_scale,
)
from onnxq.formats.granularity import Array, Granularity
from onnxq.formats.packing import unpack_bits

Scheme = Literal["sym", "asym", "full"]

_SMALL_DTYPES: dict[tuple[int, bool], Any] = {
    (4, True): ml_dtypes.int4,
    (4, False): ml_dtypes.uint4,
    (2, True): ml_dtypes.int2,
    (2, False): ml_dtypes.uint2,
}


@dataclass(frozen=True)
class IntFormat(Format):
    """An integer of 1 to 16 bits with a scheme and, optionally, a block size.

    Args:
        bits: 1 to 16. A signed integer of one bit is the ``binary`` format, not this one.
        signed: two's complement codes.
        scheme: ``sym``, ``asym`` or ``full``; default ``sym`` when signed, else ``asym``.
        block: elements per scale along one axis; 0 when the caller chooses a granularity.
        narrow: do not use the most negative code, so that codes are symmetric too.

    Raises:
        SpecError: a width, scheme or combination that does not exist.
    """

    bits: int
    signed: bool = True
    scheme: Scheme | Literal[""] = ""
    block: int = 0
    narrow: bool = False

    def __post_init__(self) -> None:
        if not self.scheme:
            object.__setattr__(self, "scheme", "sym" if self.signed else "asym")
        problem = self._problem()
        if problem:
            raise SpecError("SPEC-FORMAT", *problem)

    def _problem(self) -> tuple[str, str] | None:
        if not 1 <= self.bits <= 16:
            return f"integers of {self.bits} bits are not supported", "use 1 to 16 bits"
        if self.bits == 1 and (self.signed or self.scheme != "asym"):
            return "one bit cannot hold -1, 0 and +1", "use binary ({-1,+1}) or uint1 ({0,1})"
        if self.scheme not in ("sym", "asym", "full"):
            return f"unknown integer scheme {self.scheme!r}", "use sym, asym or full"
        if self.block < 0:
            return f"a block of {self.block} elements", "use a positive block size"
        if self.narrow and self.scheme != "sym":
            return f"a narrow range with scheme {self.scheme}", "narrow needs sym"
        return None

    def __str__(self) -> str:
        default = "sym" if self.signed else "asym"
        return (
            f"{'' if self.signed else 'u'}int{self.bits}"
            + (f"g{self.block}" if self.block else "")
            + (self.scheme if self.scheme != default else "")
            + ("narrow" if self.narrow else "")
        )

    @property
    def qmin(self) -> int:
        """Smallest code that is used."""
        lowest = -(1 << (self.bits - 1)) if self.signed else 0
        return lowest + 1 if self.narrow else lowest

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def zero(self) -> int:
        """The code of zero when symmetric: 0, or the middle of an unsigned range."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def symmetric(self) -> bool:
        """The zero point is fixed (schemes ``sym`` and ``full``)."""
        return self.scheme != "asym"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Dtype of codes: exact for 16, 8, 4 and 2 bits, else the next wider integer."""
        small: Any = _SMALL_DTYPES.get((self.bits, self.signed))
        if small is not None:
            exact: np.dtype[Any] = np.dtype(small)
            return exact
        return np.dtype(f"{'i' if self.signed else 'u'}{1 if self.bits <= 8 else 2}")

    @property
    def max(self) -> float:
        """Largest magnitude of a code relative to the code of zero."""
        return float(max(self.qmax - self._level_zero, self._level_zero - self.qmin))

    @property
    def _level_zero(self) -> int:
        return self.zero if self.symmetric else 0

    def levels(self) -> npt.NDArray[np.float64]:
        """All integers of the range, relative to the code of zero."""
        return np.arange(self.qmin, self.qmax + 1, dtype=np.float64) - self._level_zero

    def params(self, x: Array, granularity: Granularity | None = None, *, axis: int = -1) -> Params:
        """Scale and zero point of each group by the scheme; NaN and Inf raise DataError."""
        granularity = self.resolve_granularity(granularity, axis)
        groups = granularity.split(as_float32(x))
        lo = groups.values.min(axis=1, initial=0)
        hi = groups.values.max(axis=1, initial=0)
        if self.scheme == "full":
            scale, zero_point = _full_range_params(lo, hi, self)
        else:
            scale, zero_point = affine_params(lo, hi, self, symmetric=self.scheme == "sym")
        return Params(granularity, groups.to_param(scale), groups.to_param(zero_point))

    def encode(self, x: Array, params: Params | None = None) -> Array:
        """``clip(rint(x / s) + z)``; infinities saturate, NaN raises DataError."""
        if params is None:
            return quantize(x, 1.0, self._level_zero, self)
        granularity = params.granularity
        return quantize(x, params.scale, params.zero_point, self, *_axis_and_block(granularity))

    def decode(self, codes: Array, params: Params | None = None) -> Float32:
        """``s * (q - z)``."""
        if params is None:
            return dequantize(codes, 1.0, self._level_zero)
        granularity = params.granularity
        return dequantize(codes, params.scale, params.zero_point, *_axis_and_block(granularity))

    def _group_bits(self, scale_bits: int) -> int:
        return scale_bits + (0 if self.symmetric else self.bits)

    def unpack(self, data: bytes, shape: tuple[int, ...]) -> Array:
        """The inverse of ``pack``, in ``numpy_dtype``."""
        codes = unpack_bits(data, shape, self.bits, signed=self.signed)
        return codes.astype(np.int16 if self.bits < 16 else np.int32).astype(self.numpy_dtype)


def affine_params(
    lo: Array | float, hi: Array | float, fmt: IntFormat, *, symmetric: bool
) -> tuple[Float32, Array]:
    """Scale and zero point that cover the ranges ``[lo, hi]``, widened to contain zero.

    Vectorised: ``lo`` and ``hi`` of any equal shape (channels, blocks), computed in float64.
    The scale is always a positive normal float32: an all-zero range gives 1, a range so small
    that the scale would be subnormal gives the smallest normal number (its values then become
    zero or a few codes), and one so large that a code would decode to infinity gives the largest
    scale that does not.

    Returns:
        scale: float32, shape of ``lo``.
        zero_point: ``fmt.numpy_dtype``, shape of ``lo``; decodes to exactly zero.

    Raises:
        DataError: a bound is NaN or infinite, or ``lo > hi``.
    """
    low, high = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    require_finite(low, fmt)
    require_finite(high, fmt)
    if (low > high).any():
        raise DataError(
            "DATA-RANGE", "a range whose lower end is above its upper end", "swap the two ends"
        )
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        steps = max(1, fmt.qmax - fmt.zero)
        scale = safe_scale(np.maximum(-low, high) / steps, steps)
        return scale, np.full(scale.shape, fmt.zero).astype(np.int32).astype(fmt.numpy_dtype)
    real = np.clip((high - low) / (fmt.qmax - fmt.qmin), MIN_NORMAL, None).astype(np.float32)
    zero_point = np.clip(fmt.qmin - np.rint(low / real.astype(np.float64)), fmt.qmin, fmt.qmax)
    reach = np.maximum(fmt.qmax - zero_point, zero_point - fmt.qmin)
    scale = safe_scale((high - low) / (fmt.qmax - fmt.qmin), reach)
    return scale, zero_point.astype(np.int32).astype(fmt.numpy_dtype)


def _full_range_params(lo: Array, hi: Array, fmt: IntFormat) -> tuple[Float32, Array]:
    """Signed scale that puts the element of largest magnitude on the code ``-2**(b-1)``.

    On a tie the negative element wins, which gives a positive scale.
    """
    magnitude, zero_point = affine_params(lo, hi, fmt, symmetric=True)
    extreme = np.where(hi > -lo, hi, lo).astype(np.float64)
    half = float(1 << (fmt.bits - 1))
    scale = safe_scale(np.abs(extreme) / half, half)
    return np.where(hi > -lo, -scale, scale).astype(magnitude.dtype), zero_point


def quantize(
    x: Array,
    scale: Array | float,
    zp: Array | int | None,
    fmt: IntFormat,
    axis: int | None = None,
    block: int | None = None,
) -> Array:
    """Codes of ``x`` in ``fmt.numpy_dtype``, bit-exact with ONNX ``QuantizeLinear``.

    Args:
        x: any shape, taken as float32. Infinities saturate.
        scale: one number; ``[d_axis]`` with ``axis``; the blocked ONNX shape with ``axis`` and
            ``block``; or, without ``axis``, anything that broadcasts against ``x``.
        zp: shape of ``scale``, or None for 0. A float zero point is added before rounding.
        fmt: gives the range of the codes.
        axis: axis of the channels or blocks.
        block: elements per scale along ``axis``; the tail may be shorter.

    Raises:
        DataError: NaN in ``x``, or a scale whose shape does not fit.
    """
    x = as_float32(x)
    split, insert = _split_blocks(x.shape, axis, block)
    values = x.reshape(split)
    scale32 = _fit(as_float32(scale), x.shape, axis, block, insert)
    zero = np.zeros((), np.int32) if zp is None else _fit(_widen(zp), x.shape, axis, block, insert)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        codes = values / scale32
        if zero.dtype.kind == "f":
            codes = np.clip(np.rint(codes + zero), fmt.qmin, fmt.qmax)
        else:
            # Clip before the zero point is added: the sum is then exact in float32.
            np.rint(codes, out=codes)
            low, high = (np.asarray(q - zero, np.float32) for q in (fmt.qmin, fmt.qmax))
            np.clip(codes, low, high, out=codes)
            codes += zero.astype(np.float32)
    if np.isnan(codes).any():
        raise DataError(
            "DATA-NAN",
            f"{int(np.isnan(codes).sum())} values are NaN; {fmt} has no code for it",
            "remove NaN from the tensor, and zero, NaN or infinite scales",
        )
    return _narrow(codes, fmt).reshape(x.shape)


def dequantize(
    codes: Array,
    scale: Array | float,
    zp: Array | float | None,
    axis: int | None = None,
    block: int | None = None,
) -> Float32:
    """``scale * (codes - zp)`` in float32, bit-exact with ONNX ``DequantizeLinear``.

    Shapes as in :func:`quantize`. A float zero point is subtracted in float32.

    Raises:
        DataError: a scale whose shape does not fit.
    """
    wide = _widen(codes)
    split, insert = _split_blocks(wide.shape, axis, block)
    values = wide.reshape(split)
    scale32 = _fit(as_float32(scale), wide.shape, axis, block, insert)
    if zp is not None:
        values = values - _fit(_widen(zp), wide.shape, axis, block, insert)
    with np.errstate(over="ignore"):
        return (values.astype(np.float32, copy=False) * scale32).reshape(wide.shape)


def _axis_and_block(granularity: Granularity) -> tuple[int | None, int | None]:
    if granularity.kind == "channel":
        return granularity.axis, None
    if granularity.kind == "block":
        return granularity.axis, granularity.size
    return None, None


def _split_blocks(
    shape: tuple[int, ...], axis: int | None, block: int | None
) -> tuple[tuple[int, ...], int | None]:
    """Shape with whole blocks as an axis of their own, and where a scale gets its 1 to match.

    Broadcasting over that axis saves a copy of the scales as large as the tensor. A ragged tail
    has no such shape; then nothing is split.
    """
    if axis is None or not block or not -len(shape) <= axis < len(shape):
        return shape, None
    axis %= len(shape)
    if shape[axis] % block:
        return shape, None
    return (*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :]), axis + 1


def _widen(values: Array | float) -> Array:
    """Integers as int32 (2- and 4-bit dtypes included), floats as float32."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array.astype(np.int32)


def _narrow(codes: Array, fmt: IntFormat) -> Array:
    dtype = np.dtype(fmt.numpy_dtype)
    if dtype.kind in "iu":
        return codes.astype(dtype)
    # float -> int8 -> int4: the direct cast of ml_dtypes is slower and differs by version.
    return codes.astype(np.int8).astype(dtype)


def _fit(
    param: Array, shape: tuple[int, ...], axis: int | None, block: int | None, insert: int | None
) -> Array:
    """``param`` such that it broadcasts against ``shape`` (with its blocks split if ``insert``)."""
    if param.size == 1 and param.ndim <= 1:
        return param.reshape(())
    if axis is None:
        fits = len(param.shape) == len(shape) and all(
            p in (1, n) for p, n in zip(param.shape, shape, strict=True)
        )
        if fits and block is None:
            return param
        raise _misfit(param, shape, "no axis was given")
    granularity = Granularity.block(axis, block) if block else Granularity.per_channel(axis)
    if param.shape != granularity.param_shape(shape):
        raise _misfit(param, shape, f"{granularity} needs {list(granularity.param_shape(shape))}")
    if insert is not None:
        return np.expand_dims(param, insert)
    return granularity.expand(param, shape)


def _misfit(param: Array, shape: tuple[int, ...], why: str) -> DataError:
    return DataError(
        "DATA-PARAM-SHAPE",
        f"a scale or zero point of shape {list(param.shape)} for a tensor {list(shape)}: {why}",
        "give one number, one per channel with axis=, or one per block with axis= and block=",
    )
