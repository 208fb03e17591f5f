"""Quantized weights of any format as the inputs and attributes of ``QuantMatMul``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.custom_ops.defs.quant_mat_mul import NO_ORDER
from onnxq.custom_ops.layout import LAYOUT, pack_codes, pack_groups
from onnxq.errors import UnsupportedError
from onnxq.formats import Format, IntFormat, Params

Array = npt.NDArray[Any]
ScaleType = Literal["float16", "bfloat16", "float32", "e8m0", "e4m3", "int16"]

CODE_BITS = (1, 2, 3, 4, 6, 8)
"""Widths of codes that there are kernels for."""
_MIN_GROUP = 16
_STEP = 4
_MAX_FRACTION_BITS = 6
"""Of levels that are made integers: E2M1 has one, MXINT8 six."""
_INTEGER_SPAN = 255
_HALF_TOP_EXPONENT = 15
_E8M0_BIAS = 127
_INT8_MAX = 127
_SCALE_TYPES: dict[str, ScaleType] = {"float8_e8m0fnu": "e8m0", "float8_e4m3fn": "e4m3"}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """What stands behind ``x`` in a QuantMatMul node.

    Attributes:
        inputs: arrays for ``codes``, ``scales``, ``zero_points``, ``levels``, ``bias``, ``order``.
        attributes: every attribute of the node.
    """

    inputs: dict[str, Array]
    attributes: dict[str, int | float]


def pack_weight(
    fmt: Format,
    codes: Array,
    params: Params,
    *,
    int8_activations: int,
    scale_type: ScaleType = "float16",
    bias: Array | None = None,
) -> PackedWeight:
    """Pack a weight as its format rounded it.

    Args:
        fmt: of at most 8 bits, with one scale a group (and one zero point, for integers).
        codes: ``[N, K]``, in the code dtype of the format.
        params: scales with granularity ``block(1, g)`` or ``channel(0)``.
        int8_activations: quantize activations to INT8 inside of the kernel: 1 (or True) with a
            scale a row, 2 with one a group of columns.
        scale_type: how float scales are stored; MX and NVFP4 keep their own 8 bits.
        bias: ``[N]``.

    Raises:
        UnsupportedError: as :func:`pack_table`; or another granularity or format.
    """
    n, k = codes.shape
    if fmt.bits > 8 or params.codebook is not None or params.micro is not None:
        raise _unsupported(f"{fmt} weights", "use a format of up to 8 bits with one scale a group")
    scale = params.scale.reshape(n, -1)
    zero = None
    if isinstance(fmt, IntFormat):
        levels, shift = integer_levels(fmt.bits, signed=fmt.signed)
        if params.zero_point is not None:
            zero = np.broadcast_to(params.zero_point.reshape(n, -1).astype(np.int16), scale.shape)
    elif codes.dtype == np.int8:
        shift = 1 << (fmt.bits - 1)
        every = np.arange(-shift, shift).astype(np.int8)
        levels = np.asarray(fmt.decode(every), np.float32)
    else:
        shift = 0
        levels = np.asarray(fmt.decode(np.arange(1 << fmt.bits, dtype=np.uint8)), np.float32)
    return pack_table(
        codes.astype(np.int16) + shift,
        levels,
        scale.astype(np.float32),
        group=_group(params, k),
        zero_point=zero,
        factor=1.0 if params.global_scale is None else float(params.global_scale),
        scale_type=_SCALE_TYPES.get(scale.dtype.name, scale_type),
        int8_activations=int8_activations,
        bias=bias,
    )


def integer_levels(bits: int, *, signed: bool) -> tuple[Array, int]:
    """The integers of a format, ascending from the lowest code, and what makes that code 0."""
    shift = 1 << (bits - 1) if signed else 0
    return np.arange(1 << bits, dtype=np.float32) - np.float32(shift), shift


def takes_int8(levels: Array) -> bool:
    """Whether kernels can multiply a table of levels by INT8 activations."""
    bits = _code_bits(levels)
    return _integer_step(_complete(levels, bits)[0], bits)[1]


def pack_table(
    codes: Array,
    levels: Array,
    scale: Array,
    *,
    group: int,
    zero_point: Array | None = None,
    factor: float = 1.0,
    scale_type: ScaleType = "float16",
    int8_activations: int,
    bias: Array | None = None,
    order: Array | None = None,
) -> PackedWeight:
    """Pack ``(levels[codes] - zero_point) * scale * factor``.

    Args:
        codes: ``[N, K]``, places in ``levels``.
        levels: ``[n]`` float32, n at most 256.
        scale: ``[N, G]`` float32, ``G = ceil(K / group)``.
        group: columns of K that share a scale.
        zero_point: ``[N, G]`` integers, in units of the levels.
        factor: of the whole weight.
        scale_type: of the stored scales; ``e8m0`` and ``e4m3`` must be exact, ``int16`` is for
            4-bit integers with INT8 activations (Integer Scale, arXiv 2405.14597).
        int8_activations: quantize activations to INT8 inside of the kernel: 1 (or True) with a
            scale a row, 2 with one a group of columns.
        bias: ``[N]``.
        order: ``[K]``, the column of the activations that each column of the codes meets.

    Raises:
        UnsupportedError: ``UNSUPPORTED-PACK``: a group or scale that the operator does not take, or
            INT8 activations with levels that are not multiples of one number; integer scales that
            would round to zero where the sums still fit in 32 bits.
    """
    n, k = codes.shape
    group = min(group, k)
    if group < k and (group < _MIN_GROUP or group % _STEP):
        raise _unsupported(f"groups of {group}", f"use a multiple of {_STEP} from {_MIN_GROUP} on")
    bits = _code_bits(levels)
    table, offset = _complete(levels, bits)
    step, whole = _integer_step(table, bits)
    if int8_activations and not whole:
        raise _unsupported(
            "INT8 activations with these levels: they are no multiples of one number",
            "keep the activations in float",
        )
    zero = np.full((n, 1), offset) if zero_point is None else zero_point.astype(np.int32) + offset
    if scale_type == "int16":
        if int8_activations != 1 or bits != 4 or (np.diff(table) != 1).any():
            raise _unsupported(
                "integer scales but for 4-bit integers with INT8 activations, a scale a row",
                "use float16 scales",
            )
        lengths = np.minimum(group, k - np.arange(0, k, group))
        stored, unit = _integer_scales(scale, lengths * _reach(table, zero))
    else:
        stored, unit = _stored_scales(scale, scale_type)
    inputs = {
        "codes": pack_codes(codes, bits),
        "scales": pack_groups(stored),
        "zero_points": _stored_zero_points(zero, stored.shape),
        "levels": (table / np.float32(step)).astype(np.float32),
        "bias": np.zeros(1, np.float32) if bias is None else bias.astype(np.float32),
        "order": NO_ORDER if order is None else order.astype(np.int32),
    }
    attributes = {
        "K": k,
        "N": n,
        "group": group,
        "bits": bits,
        "int8_activations": int(int8_activations),
        "exponent_scales": int(scale_type == "e8m0"),
        "factor": factor * unit * step,
        "layout": LAYOUT,
    }
    return PackedWeight(inputs, attributes)


def _code_bits(levels: Array) -> int:
    return next(bits for bits in CODE_BITS if len(levels) <= 1 << bits)


def _complete(levels: Array, bits: int) -> tuple[Array, int]:
    """``[2**bits]`` levels that begin with these, and by how much integers were moved.

    Consecutive integers go on, moved so that a zero point among them fits in int8.
    """
    count = 1 << bits
    table = np.zeros(count, np.float32)
    table[: len(levels)] = levels
    if (np.diff(levels) != 1).any() or levels[0] != np.rint(levels[0]):
        return table, 0
    offset = -(count // 2) if levels[0] >= 0 else 0
    return np.arange(count, dtype=np.float32) + levels[0] + np.float32(offset), offset


def _integer_step(table: Array, bits: int) -> tuple[float, bool]:
    """The power of two that all levels are integer multiples of, and whether kernels take them so.

    Tables of 256 levels must be consecutive for that.
    """
    if not np.isfinite(table).all():
        return 1.0, False
    for fraction in range(_MAX_FRACTION_BITS + 1):
        scaled = np.ldexp(table, fraction)
        if (scaled == np.rint(scaled)).all():
            fits = bits < 8 or bool((np.diff(scaled) == 1).all())
            small = float(scaled.max() - scaled.min()) <= _INTEGER_SPAN
            return (2.0**-fraction, True) if fits and small else (1.0, False)
    return 1.0, False


def _group(params: Params, k: int) -> int:
    granularity = params.granularity
    if granularity.kind == "channel" and granularity.axis in (0, -2):
        return k
    if granularity.kind == "block" and granularity.axis in (1, -1):
        return granularity.size
    raise _unsupported(f"scales by {granularity}", "use block(1,size) or channel(0)")


def _stored_scales(scale: Array, scale_type: ScaleType) -> tuple[Array, float]:
    """``[N, G]`` as it is stored, and the power of two that float16 scales are multiples of.

    The greatest float16 scale lies in (2^14, 2^15], so that only scales 2^28 times smaller would be
    subnormal.
    """
    if scale_type == "e8m0":
        codes: Array = np.frexp(scale)[1] - 1 + _E8M0_BIAS
        if not np.isfinite(scale).all():
            raise _unsupported("NaN among the scales", "repair the weight")
        return codes.astype(np.uint8), 1.0
    if scale_type == "e4m3":
        return scale.astype(ml_dtypes.float8_e4m3fn), 1.0
    if scale_type == "bfloat16":
        return scale.astype(ml_dtypes.bfloat16), 1.0
    if scale_type == "float32":
        return scale.astype(np.float32), 1.0
    exponent = int(np.frexp(np.abs(scale).max(initial=0))[1]) - _HALF_TOP_EXPONENT
    half: Array = np.ldexp(scale, -exponent).astype(np.float16)
    if (np.abs(half[scale != 0]) < np.finfo(np.float16).smallest_normal).any():
        raise _unsupported(
            "scales that differ by more than float16 can hold", "store them as float32"
        )
    return half, float(np.ldexp(1.0, exponent))


def _reach(table: Array, zero: Array) -> Array:
    """The largest ``|level - zero|`` of each zero point."""
    largest: Array = np.maximum(np.abs(table[0] - zero), np.abs(table[-1] - zero))
    return largest.astype(np.float64)


def _integer_scales(scale: Array, weights: Array) -> tuple[Array, float]:
    """``rint(scale * A)`` as int16 and ``1 / A``, A as large as int32 sums allow.

    A sum over all groups is at most ``127 * sum of weights * |rint(scale * A)|``; half a step of
    rounding in each group is set aside.

    Args:
        scale: ``[N, G]``.
        weights: ``[N, G]`` or ``[N, 1]``, largest sums of ``|level - zero|`` over each group.
    """
    wide = np.abs(scale.astype(np.float64))
    if not np.isfinite(wide).all():
        raise _unsupported("NaN or infinity among the scales", "repair the weight")
    reach = _INT8_MAX * np.broadcast_to(weights, scale.shape)
    if not wide.any():
        return np.zeros(scale.shape, np.int16), 1.0
    room = np.iinfo(np.int32).max - reach.sum(axis=1) / 2
    used = (reach * wide).sum(axis=1)
    bound = room[used > 0] / used[used > 0]
    amplifier = float(min(bound.min(), np.iinfo(np.int16).max / wide.max()))
    stored = np.rint(scale.astype(np.float64) * max(amplifier, 0.0)).astype(np.int16)
    if (stored[scale != 0] == 0).any():
        raise _unsupported(
            "integer scales of this weight: its smallest would round to zero, as larger ones would"
            " overflow sums of 32 bits",
            "use float16 scales",
        )
    return stored, 1.0 / amplifier


def _stored_zero_points(zero: Array, shape: tuple[int, ...]) -> Array:
    """``[P, G, 32]`` int8, or ``[1, 1, 1]`` when all are zero."""
    if not zero.any():
        return np.zeros((1, 1, 1), np.int8)
    return pack_groups(np.broadcast_to(zero, shape).astype(np.int8))


def _unsupported(cause: str, hint: str) -> UnsupportedError:
    return UnsupportedError("UNSUPPORTED-PACK", f"QuantMatMul does not take {cause}", hint)
