"""Arrays as the emulated kernels take them, and the arguments of a product that point at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.custom_ops.cuda_calls import QuantMatMulArgs, WeightKind, scale_type
from onnxq.custom_ops.packed_weight import PackedWeight

Array = np.ndarray[Any, Any]
ALIGNMENT = 256  # of what cudaMalloc gives


def aligned(array: Array) -> Array:
    """A copy that begins where device memory would."""
    array = np.ascontiguousarray(array)
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@dataclass(frozen=True)
class Format:
    """What the kernels make of levels."""

    kind: WeightKind
    offset: int
    unit: float


class Call:
    """Aligned copies of a product's arrays, and the arguments that point at them."""

    def __init__(
        self,
        x: Array,
        packed: PackedWeight,
        made: Format,
        *,
        splits: int = 1,
        row_scale: Array | None = None,
        plain_factor: bool = False,
        sums: bool = False,
    ) -> None:
        a = packed.attributes
        k, n, group = int(a["K"]), int(a["N"]), int(a["group"])
        self.kind = made.kind
        self.y = aligned(np.zeros((x.shape[0], n), x.dtype))
        self.sums = aligned(np.zeros((x.shape[0], n), np.float32))
        self._kept = {name: aligned(array) for name, array in packed.inputs.items()}
        self._kept["x"] = aligned(x)
        self._kept["partial"] = aligned(np.zeros((splits, x.shape[0], n), np.float32))
        if row_scale is not None:
            self._kept["row_scale"] = aligned(row_scale)
        zeros = packed.inputs["zero_points"].shape != (1, 1, 1)
        kept = {name: array.ctypes.data for name, array in self._kept.items()}
        self.args = QuantMatMulArgs(
            *(kept["x"], kept["codes"], kept["scales"], kept["zero_points"] if zeros else None),
            *(kept["levels"], kept["bias"], kept.get("row_scale"), self.y.ctypes.data),
            self.sums.ctypes.data if sums else None,
            *(kept["partial"] if splits > 1 else None, x.shape[0], n, k, group, -(-k // group)),
            *(splits, made.offset, int(a["bits"]), int(len(packed.inputs["bias"]) == n and n > 1)),
            *(
                scale_type(packed.inputs["scales"].dtype),
                a["factor"] * (1 if plain_factor else made.unit),
            ),
        )
