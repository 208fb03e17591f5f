"""Quantized weights of any format as the inputs and attributes of ``QuantMatMul``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxq.custom_ops.layout import LAYOUT, pack_codes, pack_groups
from onnxq.errors import UnsupportedError
from onnxq.formats import Format, IntFormat, MiniFloat, MxFormat, Nf4Format, NvFp4Format, Params

Array = npt.NDArray[Any]
ScaleType = Literal["float16", "float32"]

_E2M1_STEP = 0.5
"""E2M1 numbers are whole multiples of it."""
_MXINT8_STEP = 2.0**-6
_HALF_TOP_EXPONENT = 15


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """What stands behind ``x`` in a QuantMatMul node.

    Attributes:
        inputs: arrays for ``codes``, ``scales``, ``zero_points``, ``levels`` and ``bias``.
        attributes: every attribute of the node.
    """

    inputs: dict[str, Array]
    attributes: dict[str, int | float]


@dataclass(frozen=True, eq=False)
class _Codebook:
    """``value = levels[code] * factor``, codes being unsigned.

    Attributes:
        bits: 4 or 8.
        levels: ``[2**bits]`` float32.
        factor: of all levels; such that they are integers where the format's values are.
        shift: added to the format's own codes.
    """

    bits: int
    levels: Array
    factor: float = 1.0
    shift: int = 0


def pack_weight(
    fmt: Format,
    codes: Array,
    params: Params,
    *,
    int8_activations: bool,
    scale_type: ScaleType = "float16",
    bias: Array | None = None,
) -> PackedWeight:
    """Pack a rounded weight.

    Args:
        fmt: integer up to 8 bits, FP8, FP4 and other floats up to 8 bits, MX, NVFP4 or NF4.
        codes: ``[N, K]``, in the code dtype of the format.
        params: scales with granularity ``block(1, g)`` or ``channel(0)``.
        int8_activations: quantize rows of activations to INT8 inside of the kernel.
        scale_type: how float scales are stored; MX and NVFP4 keep their own 8 bits.
        bias: ``[N]``.

    Raises:
        UnsupportedError: ``UNSUPPORTED-PACK``: a format, granularity or scale that the operator
            does not take, or INT8 activations with levels that are no integers.
    """
    book = _codebook(fmt)
    if int8_activations and (book.levels != np.rint(book.levels)).any():
        raise _unsupported(
            f"{fmt} weights with INT8 activations: their levels are no multiples of one number",
            "keep the activations in float",
        )
    n, k = codes.shape
    group = _group(params, k)
    if group < k and (group < 16 or group % 4):
        raise _unsupported(f"groups of {group}", "use a multiple of 4 from 16 on")
    scales, unit = _scales(params.scale.reshape(n, -1), scale_type)
    whole = 1.0 if params.global_scale is None else float(params.global_scale)
    stored = (codes.astype(np.int16) + book.shift).astype(np.uint8)
    inputs = {
        "codes": pack_codes(stored, book.bits),
        "scales": pack_groups(scales),
        "zero_points": _zero_points(fmt, params, n, book.shift),
        "levels": book.levels.astype(np.float32),
        "bias": np.zeros(1, np.float32) if bias is None else bias.astype(np.float32),
    }
    attributes = {
        "K": k,
        "N": n,
        "group": group,
        "bits": book.bits,
        "int8_activations": int(int8_activations),
        "exponent_scales": int(scales.dtype == np.uint8),
        "factor": book.factor * whole * unit,
        "layout": LAYOUT,
    }
    return PackedWeight(inputs, attributes)


def _codebook(fmt: Format) -> _Codebook:
    if isinstance(fmt, IntFormat) and fmt.bits <= 8:
        bits = 4 if fmt.bits <= 4 else 8
        half = 1 << (bits - 1)
        return _Codebook(bits, np.arange(-half, half), shift=half if fmt.signed else 0)
    if isinstance(fmt, Nf4Format):
        return _Codebook(4, fmt.levels())
    if isinstance(fmt, NvFp4Format):
        return _float_codebook(fmt, 4, _E2M1_STEP)
    if isinstance(fmt, MxFormat):
        if fmt.float_element is None:
            return _Codebook(8, np.arange(-128, 128), _MXINT8_STEP, shift=128)
        step = _E2M1_STEP if fmt.element == "fp4" else 1.0
        return _float_codebook(fmt.float_element, fmt.bits, step)
    if isinstance(fmt, MiniFloat) and fmt.bits <= 8:
        return _float_codebook(fmt, fmt.bits, _E2M1_STEP if str(fmt).startswith("fp4") else 1.0)
    raise _unsupported(f"{fmt} weights", "use an integer, FP8, FP4, MX, NVFP4 or NF4 format")


def _float_codebook(fmt: Format, bits: int, step: float) -> _Codebook:
    wide = 4 if bits <= 4 else 8
    levels = np.zeros(1 << wide, np.float32)
    levels[: 1 << bits] = fmt.decode(np.arange(1 << bits, dtype=np.uint8)) / np.float32(step)
    return _Codebook(wide, levels, step)


def _group(params: Params, k: int) -> int:
    granularity = params.granularity
    if granularity.kind == "channel" and granularity.axis in (0, -2):
        return k
    if granularity.kind == "block" and granularity.axis in (1, -1):
        return min(granularity.size, k)
    raise _unsupported(f"scales by {granularity}", "use block(1,size) or channel(0)")


def _scales(scale: Array, scale_type: ScaleType) -> tuple[Array, float]:
    """``[N, G]`` as it is stored, and the power of two that float16 scales are multiples of.

    The greatest float16 scale lies in (2^14, 2^15], so that only scales 2^28 times smaller would be
    subnormal.
    """
    if scale.dtype.name == "float8_e8m0fnu":
        return scale.view(np.uint8), 1.0
    if scale.dtype.name == "float8_e4m3fn" or scale_type == "float32":
        return scale, 1.0
    exponent = int(np.frexp(np.abs(scale).max(initial=0))[1]) - _HALF_TOP_EXPONENT
    half = np.ldexp(scale, -exponent).astype(np.float16)
    if (np.abs(half[scale != 0]) < np.finfo(np.float16).smallest_normal).any():
        raise _unsupported(
            "scales that differ by more than float16 can hold", "store them as float32"
        )
    return half, float(np.ldexp(1.0, exponent))


def _zero_points(fmt: Format, params: Params, n: int, shift: int) -> Array:
    """``[P, G, 32]`` int8 relative to the levels, or ``[1, 1, 1]`` when all are zero."""
    none = np.zeros((1, 1, 1), np.int8)
    if not isinstance(fmt, IntFormat):
        return none
    bits = 4 if fmt.bits <= 4 else 8
    zero = np.zeros((n, 1)) if params.zero_point is None else params.zero_point.reshape(n, -1)
    # code + shift is the index of level (code + shift - half): that is where zero must lie.
    relative = zero.astype(np.int16) + shift - (1 << (bits - 1))
    if not relative.any():
        return none
    groups = params.scale.reshape(n, -1).shape[1]
    return pack_groups(np.broadcast_to(relative, (n, groups)).astype(np.int8))


def _unsupported(cause: str, hint: str) -> UnsupportedError:
    return UnsupportedError("UNSUPPORTED-PACK", f"QuantMatMul does not take {cause}", hint)
