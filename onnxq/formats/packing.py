"""Codes to bytes and back.

One rule serves every width: the codes, in row-major order, form a little-endian stream of bits.
Code i occupies the bits ``[i*b, (i+1)*b)`` and bit k of the stream is bit ``k % 8`` of byte
``k // 8``. Hence 4-bit codes come low nibble first (as in ONNX, ORT and NVFP4), 2-bit codes four
a byte with the first in the lowest bits, 1-bit codes as ``numpy.packbits(bitorder="little")``,
6-bit codes four in three bytes, and codes of 8 or 16 bits as little-endian numbers. Signed codes
are written in two's complement. The last byte is filled with zero bits.

Ternary codes have a denser layout of their own: five in a byte, ``sum((t_i + 1) * 3**i)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError

Array = npt.NDArray[Any]

TRITS_PER_BYTE = 5


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Array, bits: int) -> bytes:
    """Pack integer codes of any shape; see the module text for the layout.

    Args:
        codes: integers; only their lowest ``bits`` bits are written.
        bits: 1 to 32.
    """
    mask = np.int64((1 << bits) - 1)
    if bits in (8, 16, 32):
        wide = codes.astype(np.int64) & mask
        return bytes(wide.astype(f"<u{bits // 8}").tobytes())
    small = codes.astype(np.int64).ravel() & mask
    per_byte = 8 // bits
    if bits < 8 and 8 % bits == 0:
        filled = np.zeros(packed_size(small.size, bits) * per_byte, np.uint8)
        filled[: small.size] = small
        shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
        columns = filled.reshape(-1, per_byte) << shifts
        return bytes(np.bitwise_or.reduce(columns, axis=1).tobytes())
    stream = (small[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8).ravel(), bitorder="little").tobytes()


def unpack_bits(data: bytes, shape: tuple[int, ...], bits: int, *, signed: bool) -> Array:
    """The inverse of :func:`pack_bits`, as int64 of ``shape``.

    Raises:
        DataError: ``data`` has not the length that ``shape`` needs.
    """
    count = int(np.prod(shape, dtype=np.int64))
    _check_length(data, packed_size(count, bits), shape)
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * bits]
    weights = np.int64(1) << np.arange(bits, dtype=np.int64)
    codes = stream.reshape(count, bits).astype(np.int64) @ weights
    if signed:
        codes = codes - ((codes >> (bits - 1)) << bits)
    return np.asarray(codes.reshape(shape))


def pack_trits(codes: Array) -> bytes:
    """Pack codes -1, 0, +1 five a byte, the first with weight 1; the tail is filled with zeros."""
    trits = np.ones(-(-codes.size // TRITS_PER_BYTE) * TRITS_PER_BYTE, np.uint8)
    trits[: codes.size] = codes.astype(np.int8).ravel() + 1
    weights = 3 ** np.arange(TRITS_PER_BYTE)
    return (trits.reshape(-1, TRITS_PER_BYTE) @ weights).astype(np.uint8).tobytes()


def unpack_trits(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """The inverse of :func:`pack_trits`.

    Raises:
        DataError: wrong length, or a byte above 242, which no five codes give.
    """
    count = int(np.prod(shape, dtype=np.int64))
    _check_length(data, -(-count // TRITS_PER_BYTE), shape)
    packed = np.frombuffer(data, np.uint8)
    if packed.size and packed.max() >= 3**TRITS_PER_BYTE:
        raise DataError(
            "DATA-PACKED",
            f"byte {int(packed.max())} in packed ternary codes; five codes give at most 242",
            "the data is damaged or has another layout",
        )
    trits = (packed[:, None] // 3 ** np.arange(TRITS_PER_BYTE)) % 3
    return trits.ravel()[:count].reshape(shape).astype(np.int8) - np.int8(1)


def _check_length(data: bytes, expected: int, shape: tuple[int, ...]) -> None:
    if len(data) != expected:
        raise DataError(
            "DATA-PACKED",
            f"{len(data)} packed bytes for codes of shape {list(shape)}, which take {expected}",
            "the data is cut off or has another layout",
        )
