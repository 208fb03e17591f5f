"""Drives the emulated kernels with numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from onnxq.custom_ops.cuda_calls import (
    ELEMENT_TYPES,
    Activations,
    ElementType,
    Float8GroupsArgs,
    Float8ProductArgs,
    GatherArgs,
    HadamardArgs,
    Operands,
    OutlierArgs,
    Outliers,
    PerTokenArgs,
    Plan,
    QuantizeBlockArgs,
    QuantMatMulArgs,
    Route,
    WeightKind,
    WidenArgs,
)
from onnxq.custom_ops.defs import quant_mat_mul
from onnxq.custom_ops.packed_weight import PackedWeight
from tests.cuda.arrays import ALIGNMENT, Array, Call, Format, aligned

_EMULATED = (
    *("quant_mat_mul", "expand", "per_token", "hadamard", "quantize_block"),
    *(
        "find_outliers",
        "add_outliers",
        "expand_bytes",
        "scale_integers",
        "float8_groups",
        "float8_mat_mul",
        "gather",
        "widen",
    ),
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Emulation:
    """The compiled bodies; a rule that a kernel breaks raises `RuntimeError`."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        for name in _EMULATED:
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
        self,
        args: QuantMatMulArgs,
        kind: WeightKind,
        *,
        multiprocessors: int,
        library: bool,
        operands: Operands = Operands.NONE,
    ) -> Plan:
        """The plan for 16-bit activations."""
        made = Plan()
        self._handle.plan_quant_mat_mul(
            *(ctypes.byref(args), int(kind), 2, multiprocessors, int(library), int(operands)),
            ctypes.byref(made),
        )
        return made

    def has_int8_levels(self, levels: Array, bits: int) -> bool:
        """What the plan asks of levels."""
        table = aligned(levels)
        return bool(self._handle.has_int8_levels(ctypes.c_void_p(table.ctypes.data), bits))

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
        sums: bool = False,
    ) -> Array:
        """``[M, N]`` by one kernel; in float32 with ``sums``."""
        plain = route == Route.ANY  # that kernel reads levels, not codes
        call = Call(
            *(x, packed, self.classify(packed)),
            splits=splits,
            row_scale=row_scale,
            plain_factor=plain,
            sums=sums,
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
        return call.sums if sums else call.y

    def dynamic_scratch(
        self, args: QuantMatMulArgs, route: Route, element_bytes: int, outliers: Outliers
    ) -> list[int]:
        """Where the parts of a dynamic product's scratch memory begin, and where they end."""
        at = np.zeros(8, np.int64)
        self._handle.dynamic_scratch(
            *(ctypes.byref(args), int(route), element_bytes, ctypes.byref(outliers)),
            ctypes.c_void_p(at.ctypes.data),
        )
        return [int(place) for place in at]

    def dynamic_product(
        self,
        x: Array,
        packed: PackedWeight,
        named: Array,
        threshold: float,
    ) -> tuple[Array, Route]:
        """The launch function of products with quantized rows as it is, and the route it took."""
        made = self.classify(packed)
        plain = x.dtype == np.float32
        kind = WeightKind.ANY if plain else made.kind
        call = Call(x, packed, made, plain_factor=True)
        outliers = Outliers(aligned(named).ctypes.data, len(named), threshold)
        operands = Operands.NONE
        if self.has_int8_levels(packed.inputs["levels"], int(packed.attributes["bits"])):
            operands = Operands.INT8
        element, plan = int(ELEMENT_TYPES[x.dtype]), Plan()
        self._handle.onnxq_cuda_dynamic_plan(
            *(ctypes.byref(call.args), int(kind), element, int(operands)),
            *(ctypes.byref(outliers), ctypes.byref(plan)),
        )
        # Anything at first, and guards behind the end.
        scratch = aligned(np.full(plan.scratch_bytes + ALIGNMENT, 0xFF, np.uint8))
        code = self._handle.onnxq_cuda_dynamic_quant_mat_mul(
            *(ctypes.byref(call.args), int(kind), element, ctypes.c_float(made.unit)),
            *(ctypes.byref(outliers), ctypes.byref(plan)),
            *(ctypes.c_void_p(scratch.ctypes.data), None),
        )
        if code != 0 or not (scratch[plan.scratch_bytes :] == 0xFF).all():
            raise RuntimeError(f"the launch broke (code {code}) or wrote behind its scratch memory")
        return call.y, Route(plan.route)

    def gather(self, x: Array, order: Array) -> Array:
        """``x[:, order]`` of ``[M, K]``."""
        x, order, y = aligned(x), aligned(order.astype(np.int32)), aligned(np.zeros_like(x))
        args = GatherArgs(x.ctypes.data, order.ctypes.data, y.ctypes.data, x.size, x.shape[1])
        self._check(self._handle.emulate_gather(ctypes.byref(args), int(ELEMENT_TYPES[x.dtype])))
        return y

    def widen(self, q: Array) -> Array:
        """INT8 as float16."""
        q, y = aligned(q), aligned(np.zeros(q.shape, np.float16))
        args = WidenArgs(q.ctypes.data, y.ctypes.data, q.size)
        self._check(self._handle.emulate_widen(ctypes.byref(args)))
        return y

    def integer_product(
        self, q: Array, packed: PackedWeight, row_scale: Array, dtype: np.dtype[Any], *, sums: bool
    ) -> Array:
        """The route of int8 ``q [M, K]``; numpy stands for cuBLASLt."""
        n, k = int(packed.attributes["N"]), int(packed.attributes["K"])
        call = Call(
            np.zeros((q.shape[0], k), dtype), packed, self.classify(packed), row_scale=row_scale,
            plain_factor=True, sums=sums,
        )  # fmt: skip
        levels = aligned(np.zeros((n, k), np.int8))
        self._check(
            self._handle.emulate_expand_bytes(
                ctypes.byref(call.args), ctypes.c_void_p(levels.ctypes.data)
            )
        )
        products = aligned(q.astype(np.int32) @ levels.T.astype(np.int32))
        self._check(
            self._handle.emulate_scale_integers(
                *(ctypes.byref(call.args), int(ELEMENT_TYPES[dtype])),
                ctypes.c_void_p(products.ctypes.data),
            )
        )
        return call.sums if sums else call.y

    def find_outliers(self, x: Array, named: Array, threshold: float) -> tuple[Array, Array, int]:
        """Of ``[M, K]``: which columns are outliers, all columns with those first, how many."""
        x, named = aligned(x), aligned(named)
        m, k = x.shape
        pieces = self._handle.outlier_pieces(m, ctypes.c_float(threshold))
        found = aligned(np.zeros((pieces, k), np.uint8))
        outlier = aligned(np.zeros(k, np.uint8))
        columns, count = aligned(np.zeros(k, np.int32)), aligned(np.zeros(1, np.int32))
        arrays = (x, named, found, outlier, columns, count)
        args = OutlierArgs(*(a.ctypes.data for a in arrays), m, k, len(named), pieces, threshold)
        self._check(
            self._handle.emulate_find_outliers(ctypes.byref(args), int(ELEMENT_TYPES[x.dtype]))
        )
        return outlier, columns, int(count[0])

    def add_outliers(
        self, sums: Array, x: Array, packed: PackedWeight, columns: Array, count: int
    ) -> Array:
        """``[M, N]`` of the type of x."""
        call = Call(x, packed, self.classify(packed), plain_factor=True, sums=True)
        call.sums[...] = sums
        x, columns = aligned(x), aligned(columns)
        counts = aligned(np.array([count], np.int32))
        found = OutlierArgs(x=x.ctypes.data, columns=columns.ctypes.data, count=counts.ctypes.data)
        self._check(
            self._handle.emulate_add_outliers(
                ctypes.byref(call.args), ctypes.byref(found), int(ELEMENT_TYPES[x.dtype])
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

    def float8_groups(self, x: Array, group: int) -> tuple[Array, Array]:
        """Codes ``[rows, K]`` and scales ``[K / group, rows]``."""
        x, q = aligned(x), aligned(np.zeros(x.shape, np.uint8))
        scale = aligned(np.zeros((x.shape[1] // group, x.shape[0]), np.float32))
        args = Float8GroupsArgs(x.ctypes.data, q.ctypes.data, scale.ctypes.data, *x.shape, group)
        self._check(
            self._handle.emulate_float8_groups(ctypes.byref(args), int(ELEMENT_TYPES[x.dtype]))
        )
        return q, scale

    def float8_mat_mul(
        self, x: Array, weights: Array, scales: Array, bias: Array, block: int, takes: int
    ) -> tuple[Array, str]:
        """The launch function of FP8 on both sides, and what it ran; see ``emulate_float8.cc``."""
        kept = [aligned(a) for a in (x, weights, scales, bias)]
        y = aligned(np.zeros((len(x), len(weights)), x.dtype))
        no_bias = not bias.any()
        args = Float8ProductArgs(
            *(a.ctypes.data for a in kept[:3]), None if no_bias else kept[3].ctypes.data,
            *(y.ctypes.data, None, None, *x.shape[:1], *weights.shape),
            *(block, int(len(bias) == len(weights))),
        )  # fmt: skip
        self._handle.onnxq_cuda_float8_scratch.restype = ctypes.c_int64
        size = self._handle.onnxq_cuda_float8_scratch(ctypes.byref(args))
        scratch = aligned(np.full(size + ALIGNMENT, 0xFF, np.uint8))  # with guards behind the end
        ran = ctypes.create_string_buffer(8)
        self._check(
            self._handle.emulate_float8_mat_mul(
                *(ctypes.byref(args), int(ELEMENT_TYPES[x.dtype]), takes),
                *(ctypes.c_void_p(scratch.ctypes.data), ran),
            )
        )
        if not (scratch[size:] == 0xFF).all():
            raise RuntimeError("the launch wrote behind its scratch memory")
        return y, ran.value.decode()

    def per_token(
        self,
        x: Array,
        activations: Activations = Activations.INT8,
        *,
        floats: bool = False,
        outlier: Array | None = None,
    ) -> tuple[Array, Array]:
        """Codes, or their numbers in the type of x, and the scales of the rows of ``[rows, K]``."""
        x = aligned(x)
        codes = np.int8 if activations == Activations.INT8 else np.uint8
        q = aligned(np.zeros(x.shape, x.dtype if floats else codes))
        scale = aligned(np.zeros(x.shape[0], np.float32))
        mask = None if outlier is None else aligned(outlier)
        args = PerTokenArgs(
            *(x.ctypes.data, q.ctypes.data, scale.ctypes.data),
            *(None if mask is None else mask.ctypes.data, x.shape[1]),
        )
        self._check(
            self._handle.emulate_per_token(
                *(ctypes.byref(args), x.shape[0], int(ELEMENT_TYPES[x.dtype])),
                2 * int(activations) + int(floats),
            )
        )
        return q, scale

    def hadamard(
        self, x: Array, core: Array, block: int, scale: float, *, group: int | None = None
    ) -> tuple[Array, Array]:
        """The transform of ``[rows, K]``; int8 and the scales of groups with ``group``."""
        x, core = aligned(x), aligned(core.astype(np.float32))
        quantize = group is not None
        size = min(group or 1, x.shape[1])
        y = aligned(np.zeros(x.shape, np.int8 if quantize else x.dtype))
        scales = aligned(np.zeros((x.shape[0], -(-x.shape[1] // size)), np.float32))
        piece = x.shape[1] if quantize else self._handle.hadamard_piece(block)
        args = HadamardArgs(
            *(x.ctypes.data, core.ctypes.data, y.ctypes.data),
            *(scales.ctypes.data if quantize else None, x.size, block, len(core), piece),
            *(size, scale),
        )
        self._check(self._handle.emulate_hadamard(ctypes.byref(args), int(ELEMENT_TYPES[x.dtype])))
        return y, scales

    def quantize_block(self, x: Array, attributes: Mapping[str, Any]) -> Array:
        """``[rows, K]`` with blocks rounded."""
        x, y = aligned(x), aligned(np.zeros(x.shape, x.dtype))
        factors = aligned(np.zeros(x.shape[0], np.float32))
        args = QuantizeBlockArgs.of(x.ctypes.data, y.ctypes.data, *x.shape, attributes)
        self._check(
            self._handle.emulate_quantize_block(
                ctypes.byref(args),
                int(ELEMENT_TYPES[x.dtype]),
                ctypes.c_void_p(factors.ctypes.data),
            )
        )
        return y

    def struct_bytes(self, which: int) -> int:
        """Size of a struct of the C interface."""
        return int(self._handle.struct_bytes(which))

    @staticmethod
    def _check(message: bytes | None) -> None:
        if message is not None:
            raise RuntimeError(message.decode())


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
