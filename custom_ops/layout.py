"""Layout 1 of packed weights: what ``QuantMatMul`` reads, the same on every instruction set.

Columns (output channels) come in panels of 32, k in steps of 4. In each step of a panel lie the
four k of 32 columns, ``bits`` bits each:

- ``codes [P, J, 16 * bits]`` uint8, ``P = ceil(N / 32)``, ``J = ceil(K / 4)``. The bits of a code
  are cut into planes of 8, 4, 2 and 1 bits, each width at most once: 3 is 2 + 1, 6 is 4 + 2. The
  widest plane comes first and holds the lowest bits. A plane of ``w`` bits takes ``16 * w`` bytes
  of a step: with ``f = 8 / w`` fields in a byte and ``d = 32 / f`` columns to a field, its byte
  ``4 * (c % d) + k % 4`` of step ``k // 4`` holds column c (within the panel) in field ``c // d``,
  the lowest bits first. So 32 bits hold four k of one column, which is what dot-product
  instructions multiply at once.
- ``scales`` and ``zero_points [P, G, 32]``, ``G = ceil(K / group)``: those of a group side by side.

Beyond N and K codes, scales and zero points are 0; what they give is never used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import InternalError

Array = npt.NDArray[Any]

LAYOUT = 1
PANEL = 32
STEP = 4


def planes(bits: int) -> list[tuple[int, int]]:
    """Width and lowest bit of each plane of codes of ``bits`` bits, in their order."""
    found, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, low))
            low += width
    return found


def pack_codes(codes: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Codes to ``[P, J, 16 * bits]`` bytes.

    Args:
        codes: ``[N, K]``, each in ``[0, 2**bits)``.
        bits: 1 to 8.
    """
    n, k = codes.shape
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise InternalError("INTERNAL-CODES", f"codes beyond {bits} bits cannot be packed")
    panels, steps = -(-n // PANEL), -(-k // STEP)
    padded = np.zeros((panels * PANEL, steps * STEP), np.uint8)
    padded[:n, :k] = codes
    packed = []
    for width, low in planes(bits):
        fields = 8 // width
        plane = padded >> np.uint8(low) & np.uint8((1 << width) - 1)
        # [P, field, d, J, 4] -> [P, J, field, d, 4]
        split = plane.reshape(panels, fields, PANEL // fields, steps, STEP).transpose(0, 3, 1, 2, 4)
        shifts = (np.arange(fields, dtype=np.uint8) * np.uint8(width)).reshape(1, 1, -1, 1, 1)
        packed.append(np.bitwise_or.reduce(split << shifts, axis=2))
    whole = [
        part.reshape(panels, steps, 16 * width)
        for part, (width, _) in zip(packed, planes(bits), strict=True)
    ]
    return np.ascontiguousarray(np.concatenate(whole, axis=2))


def unpack_codes(packed: Array, n: int, k: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack_codes`: ``[N, K]`` codes."""
    panels, steps, width = packed.shape
    codes = np.zeros((panels, steps, PANEL * STEP), np.uint8)
    at = 0
    for bits, low in planes(width // 16):
        fields = 8 // bits
        shifts = (np.arange(fields, dtype=np.uint8) * np.uint8(bits)).reshape(1, 1, -1, 1)
        plane = packed[:, :, None, at : at + 16 * bits] >> shifts & np.uint8((1 << bits) - 1)
        codes |= plane.reshape(codes.shape) << np.uint8(low)
        at += 16 * bits
    whole = codes.reshape(panels, steps, PANEL, STEP).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(whole.reshape(panels * PANEL, steps * STEP)[:n, :k])


def pack_groups(values: Array) -> Array:
    """Scales or zero points ``[N, G]`` to ``[P, G, 32]``; any dtype."""
    n, groups = values.shape
    panels = -(-n // PANEL)
    padded = np.zeros((panels * PANEL, groups), values.dtype)
    padded[:n] = values
    return np.ascontiguousarray(padded.reshape(panels, PANEL, groups).transpose(0, 2, 1))


def unpack_groups(packed: Array, n: int) -> Array:
    """The inverse of `pack_groups`: ``[N, G]``."""
    panels, groups, _ = packed.shape
    whole = packed.transpose(0, 2, 1).reshape(panels * PANEL, groups)
    return np.ascontiguousarray(whole[:n])
