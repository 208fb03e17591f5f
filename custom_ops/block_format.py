"""Formats of activations as attributes of ``QuantizeBlock``."""

from __future__ import annotations

from onnxq.custom_ops.defs.quantize_block import (
    SCALE_E4M3,
    SCALE_E8M0,
    SCALE_E8M0_CEIL,
    SCALE_FLOAT,
)
from onnxq.errors import UnsupportedError
from onnxq.formats import Format, IntFormat, MiniFloat, MxFormat, NvFp4Format

_MX_SCALES = {"floor": SCALE_E8M0, "ceil": SCALE_E8M0_CEIL}
_MXINT8_MANTISSA = 6


def block_attributes(
    fmt: Format, *, group: int = 0, factor: float = 0.0, clip: float = 1.0
) -> dict[str, int | float]:
    """The attributes that make ``QuantizeBlock`` round as a format does.

    Args:
        fmt: symmetric integers up to 16 bits, MX with the rules ``floor`` or ``ceil``, NVFP4, or a
            signed float of at most 8 bits.
        group: elements that share a scale where the format has no block; 0 for a row (a token).
        factor: NVFP4's scale of the whole tensor, ``amax / (6 * 448)``; 0 for one a row.
        clip: share of a group's largest magnitude that integers and floats reach.

    Raises:
        UnsupportedError: ``UNSUPPORTED-ACTIVATIONS``, the operator does not round to that format.
    """
    block = fmt.block or group
    if isinstance(fmt, NvFp4Format) and not fmt.four_over_six:
        return _attributes(block, 1, 0, -fmt.max, fmt.max, SCALE_E4M3, factor)
    if isinstance(fmt, MxFormat) and fmt.scale_rule in _MX_SCALES:
        element = fmt.float_element
        mantissa, least = (
            (_MXINT8_MANTISSA, 0) if element is None else (element.m, 1 - element.bias)
        )
        scale = _MX_SCALES[fmt.scale_rule]
        return _attributes(block, mantissa, least, -fmt.max, fmt.max, scale)
    if isinstance(fmt, IntFormat) and fmt.symmetric and fmt.scheme != "full":
        bits, lowest, largest = fmt.bits - 1, fmt.qmin - fmt.zero, fmt.qmax - fmt.zero
        return _attributes(block, bits, bits, lowest, largest, SCALE_FLOAT, clip=clip)
    if isinstance(fmt, MiniFloat) and fmt.signed and fmt.bits <= 8:
        least = 1 - fmt.bias
        return _attributes(block, fmt.m, least, -fmt.max, fmt.max, SCALE_FLOAT, clip=clip)
    raise UnsupportedError(
        "UNSUPPORTED-ACTIVATIONS",
        f"QuantizeBlock does not round to {fmt}",
        "use symmetric integers, MX (floor or ceil), NVFP4, or floats of 4 to 8 bits",
    )


def _attributes(
    block: int,
    mantissa: int,
    min_exponent: int,
    lowest: float,
    largest: float,
    scale: int,
    factor: float = 0.0,
    clip: float = 1.0,
) -> dict[str, int | float]:
    return {
        "block": block,
        "mantissa": mantissa,
        "min_exponent": min_exponent,
        "lowest": float(lowest),
        "largest": float(largest),
        "scale": scale,
        "factor": float(factor),
        "clip": float(clip),
    }
