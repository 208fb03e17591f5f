"""Drives the emulated kernels with numpy arrays."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from onnxq.custom_ops.cuda_calls import (
    ELEMENT_TYPES,
    ElementType,
    HadamardArgs,
    PerTokenArgs,
    Plan,
    QuantMatMulArgs,
    Route,
    WeightKind,
    scale_type,
)
from onnxq.custom_ops.defs import quant_mat_mul
from onnxq.custom_ops.packed_weight import PackedWeight

Array = np.ndarray[Any, Any]

ALIGNMENT = 256  # of what cudaMalloc gives
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


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


class Emulation:
    """The compiled bodies; a rule that a kernel breaks raises `RuntimeError`."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        for name in ("quant_mat_mul", "expand", "per_token", "hadamard"):
            getattr(handle, f"emulate_{name}").restype = ctypes.c_char_p

    def classify(self, packed: PackedWeight, *, nan_codes: bool = False) -> Format:
        """The kind of a packed weight."""
        levels = aligned(packed.inputs["levels"])
        offset, unit = ctypes.c_int(), ctypes.c_float()
        kind = self._handle.classify_levels(
            ctypes.c_void_p(levels.ctypes.data),
            int(packed.attributes["bits"]),
            int(packed.inputs["zero_points"].shape != (1, 1, 1)),
            int(nan_codes),
            ctypes.byref(offset),
            ctypes.byref(unit),
        )
        return Format(WeightKind(kind), offset.value, unit.value)

    def plan(
        self, args: QuantMatMulArgs, kind: WeightKind, *, multiprocessors: int, library: bool
    ) -> Plan:
        """The plan for 16-bit activations."""
        made = Plan()
        self._handle.plan_quant_mat_mul(
            ctypes.byref(args), int(kind), 2, multiprocessors, int(library), ctypes.byref(made)
        )
        return made

    def decode_word(self, dtype: np.dtype[Any], kind: WeightKind, word: int, z: float) -> Array:
        """The numbers of a word of codes, ``[fields, 4]`` in the order of k."""
        pairs = np.zeros(4, np.uint32)
        self._handle.decode_word(
            int(ELEMENT_TYPES[dtype]),
            int(kind),
            ctypes.c_uint32(word),
            ctypes.c_float(z),
            ctypes.c_void_p(pairs.ctypes.data),
        )
        fields = 2 if kind in (WeightKind.AFFINE4, WeightKind.E2M1) else 1
        return pairs[: 2 * fields].view(dtype).reshape(fields, 4).astype(np.float32)

    def quant_mat_mul(
        self,
        x: Array,
        packed: PackedWeight,
        route: Route,
        *,
        row_tiles: int = 0,
        splits: int = 1,
        row_scale: Array | None = None,
    ) -> Array:
        """``[M, N]`` by one kernel."""
        plain = route == Route.ANY  # that kernel reads levels, not codes
        call = Call(
            *(x, packed, self.classify(packed)),
            splits=splits,
            row_scale=row_scale,
            plain_factor=plain,
        )
        self._check(
            self._handle.emulate_quant_mat_mul(
                ctypes.byref(call.args),
                int(ELEMENT_TYPES[x.dtype]),
                int(call.kind),
                int(route),
                row_tiles,
            )
        )
        return call.y

    def expand(self, packed: PackedWeight, dtype: np.dtype[Any]) -> Array:
        """The plain matrix ``[N, K]``."""
        n, k = int(packed.attributes["N"]), int(packed.attributes["K"])
        call = Call(np.zeros((1, k), dtype), packed, self.classify(packed), plain_factor=True)
        out = aligned(np.zeros((n, k), dtype))
        self._check(
            self._handle.emulate_expand(
                ctypes.byref(call.args),
                int(ELEMENT_TYPES[dtype]),
                ctypes.c_void_p(out.ctypes.data),
            )
        )
        return out

    def per_token(self, x: Array, *, floats: bool = False) -> tuple[Array, Array]:
        """Integers, as int8 or in the type of x, and the scales of the rows of ``[rows, K]``."""
        x = aligned(x)
        q = aligned(np.zeros(x.shape, x.dtype if floats else np.int8))
        scale = aligned(np.zeros(x.shape[0], np.float32))
        args = PerTokenArgs(x.ctypes.data, q.ctypes.data, scale.ctypes.data, x.shape[1])
        self._check(
            self._handle.emulate_per_token(
                ctypes.byref(args), x.shape[0], int(ELEMENT_TYPES[x.dtype]), int(floats)
            )
        )
        return q, scale

    def hadamard(
        self, x: Array, core: Array, block: int, scale: float, *, quantize: bool = False
    ) -> tuple[Array, Array]:
        """The transform of ``[rows, K]``; int8 and the scales of the rows with ``quantize``."""
        x, core = aligned(x), aligned(core.astype(np.float32))
        y = aligned(np.zeros(x.shape, np.int8 if quantize else x.dtype))
        scales = aligned(np.zeros(x.shape[0], np.float32))
        piece = x.shape[1] if quantize else self._handle.hadamard_piece(block)
        args = HadamardArgs(
            *(x.ctypes.data, core.ctypes.data, y.ctypes.data),
            *(scales.ctypes.data if quantize else None, x.size, block, len(core), piece, scale),
        )
        self._check(self._handle.emulate_hadamard(ctypes.byref(args), int(ELEMENT_TYPES[x.dtype])))
        return y, scales

    def struct_bytes(self, which: int) -> int:
        """Size of a struct of the C interface."""
        return int(self._handle.struct_bytes(which))

    @staticmethod
    def _check(message: bytes | None) -> None:
        if message is not None:
            raise RuntimeError(message.decode())


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
    ) -> None:
        a = packed.attributes
        k, n, group = int(a["K"]), int(a["N"]), int(a["group"])
        self.kind = made.kind
        self.y = aligned(np.zeros((x.shape[0], n), x.dtype))
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
            *(kept["partial"] if splits > 1 else None, x.shape[0], n, k, group, -(-k // group)),
            *(splits, made.offset, int(a["bits"]), int(len(packed.inputs["bias"]) == n and n > 1)),
            *(
                scale_type(packed.inputs["scales"].dtype),
                a["factor"] * (1 if plain_factor else made.unit),
            ),
        )


def exact(x: Array, packed: PackedWeight) -> tuple[Array, Array]:
    """The product in float64, and the sum of the products' magnitudes."""
    a = packed.attributes
    names = ("codes", "scales", "zero_points", "levels")
    level, scale = quant_mat_mul.weight_parts(
        *(packed.inputs[name] for name in names), a["K"], a["N"], a["group"], a["exponent_scales"]
    )
    wide = np.repeat(scale.astype(np.float64), int(a["group"]), axis=1)[:, : int(a["K"])]
    weight = level.astype(np.float64) * wide * np.float32(a["factor"])
    rows = x.astype(np.float64)
    bias = packed.inputs["bias"].astype(np.float64)
    return rows @ weight.T + bias, np.abs(rows) @ np.abs(weight.T) + np.abs(bias)


def half_step(dtype: np.dtype[Any]) -> float:
    """Relative error of rounding to a type of activations."""
    return {
        ElementType.FLOAT32: 2.0**-24,
        ElementType.FLOAT16: 2.0**-11,
        ElementType.BFLOAT16: 2.0**-8,
    }[ELEMENT_TYPES[dtype]]
