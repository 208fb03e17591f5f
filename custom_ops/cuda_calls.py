"""The arguments of the CUDA kernels' plain C interface, as ``custom_ops/cuda`` declares them.

Whoever has device pointers (CuPy, PyTorch) can call the launch functions with these through ctypes;
the tests fill them with host pointers for the emulated kernels. Addresses are integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.errors import InternalError

Array = npt.NDArray[Any]


class ElementType(IntEnum):
    """Types of activations."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2


class WeightKind(IntEnum):
    """What the kernels can decode on tensor cores; ``ANY`` is left to the plain kernel."""

    ANY = 0
    AFFINE4 = 1
    AFFINE8 = 2
    E2M1 = 3
    E4M3 = 4


class Route(IntEnum):
    """Kernels of QuantMatMul."""

    ANY = 0
    GEMV = 1
    TILE = 2
    EXPAND = 3
    INTEGER = 4


class Operands(IntEnum):
    """What the operands of a product with quantized rows can be stored as, beside 16-bit floats."""

    NONE = 0
    INT8 = 1


class Activations(IntEnum):
    """What rows of activations are quantized to."""

    INT8 = 0
    FLOAT8 = 1


ELEMENT_TYPES: Mapping[np.dtype[Any], ElementType] = {
    np.dtype(np.float32): ElementType.FLOAT32,
    np.dtype(np.float16): ElementType.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): ElementType.BFLOAT16,
}
_SCALE_TYPES = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(ml_dtypes.bfloat16): 2,
    np.dtype(ml_dtypes.float8_e4m3fn): 3,
    np.dtype(np.uint8): 4,
    np.dtype(np.int16): 5,
}


def scale_type(dtype: npt.DTypeLike) -> int:
    """The number of a type of scales; uint8 holds exponents (E8M0)."""
    return _SCALE_TYPES[np.dtype(dtype)]


class QuantMatMulArgs(ctypes.Structure):
    """``QuantMatMulArgs`` of ``quant_mat_mul.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zero_points", "levels")),
        *((name, ctypes.c_void_p) for name in ("bias", "row_scale", "y", "sums")),
        ("partial", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "group", "groups", "splits")),
        *((name, ctypes.c_int) for name in ("offset", "bits", "bias_stride", "scale_type")),
        ("factor", ctypes.c_float),
    )


class PerTokenArgs(ctypes.Structure):
    """``PerTokenArgs`` of ``per_token.h``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("outlier", ctypes.c_void_p),
        ("k", ctypes.c_int),
    )


class Float8GroupsArgs(ctypes.Structure):
    """``Float8GroupsArgs`` of ``float8.h``: ``scale`` is ``[K / group, rows]``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "q", "scale")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("k", "group")),
    )


class Float8ProductArgs(ctypes.Structure):
    """``Float8ProductArgs`` of ``float8_product.h``; ``q`` and ``x_scales`` are the launch's."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weights", "scales", "bias", "y")),
        *((name, ctypes.c_void_p) for name in ("q", "x_scales")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "block", "bias_stride")),
    )


class GatherArgs(ctypes.Structure):
    """``GatherArgs`` of ``rearrange.h``: ``order`` is ``[K]`` int32, ``count`` M times K."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "order", "y")),
        ("count", ctypes.c_int64),
        ("k", ctypes.c_int),
    )


class WidenArgs(ctypes.Structure):
    """``WidenArgs`` of ``rearrange.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "y")),
        ("count", ctypes.c_int64),
    )


class Outliers(ctypes.Structure):
    """``Outliers`` of ``outliers.h``: ``named`` is ``[named_count]`` int64."""

    _fields_ = (
        ("named", ctypes.c_void_p),
        ("named_count", ctypes.c_int),
        ("threshold", ctypes.c_float),
    )


class OutlierArgs(ctypes.Structure):
    """``OutlierArgs`` of ``outliers.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "named", "found", "outlier")),
        *((name, ctypes.c_void_p) for name in ("columns", "count")),
        *((name, ctypes.c_int) for name in ("m", "k", "named_count", "pieces")),
        ("threshold", ctypes.c_float),
    )


class HadamardArgs(ctypes.Structure):
    """``HadamardArgs`` of ``hadamard.h``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("core", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("block", ctypes.c_int),
        ("core_order", ctypes.c_int),
        ("piece", ctypes.c_int),
        ("group", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


class QuantizeBlockArgs(ctypes.Structure):
    """``QuantizeBlockArgs`` of ``quantize_block.h``; ``block`` is 1 to K, ``scale`` the rule."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "factors")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("k", "block", "mantissa", "min_exponent")),
        *((name, ctypes.c_float) for name in ("lowest", "largest")),
        ("scale", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("factor", "clip")),
    )

    @classmethod
    def of(cls, x: int, y: int, rows: int, k: int, attributes: Mapping[str, Any]) -> Self:
        """Arguments for the attributes of a QuantizeBlock node."""
        block = min(int(attributes["block"]) or k, k)
        names = ("mantissa", "min_exponent", "lowest", "largest", "scale", "factor", "clip")
        return cls(x, y, None, rows, k, block, *(attributes[name] for name in names))


class Plan(ctypes.Structure):
    """``Plan`` of ``plan.h``: which kernel, how cut, and the scratch memory that it needs."""

    _fields_ = (
        ("route", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("shared_bytes", ctypes.c_int64),
        ("scratch_bytes", ctypes.c_int64),
    )


class MatrixType(IntEnum):
    """cuBLASLt's numbers of the types that `MatrixProduct` takes."""

    FLOAT32 = 0
    FLOAT16 = 2
    INT8 = 3
    INT32 = 10
    BFLOAT16 = 14
    FLOAT8E4M3 = 28


class MatrixProduct(ctypes.Structure):
    """``MatrixProduct`` of ``cublas_lt.h``; ``workspace`` has ``MATRIX_WORKSPACE`` bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        *((name, ctypes.c_int) for name in ("input", "output")),
        *((name, ctypes.c_void_p) for name in ("x", "weights", "y")),
        *((name, ctypes.c_void_p) for name in ("x_scales", "weights_scales")),
        ("scale_block", ctypes.c_int),
        ("workspace", ctypes.c_void_p),
    )


MATRIX_WORKSPACE = 32 << 20


class CudaKernels:
    """The launch functions of a CUDA library. Pointers are to device memory, unless they say so.

    Launches return at once; they may be captured in a CUDA graph.

    Args:
        path: of ``libonnxq_ops_cuda.so``.

    Raises:
        InternalError: ``INTERNAL-CUDA``, here and in every method: what CUDA answered.
    """

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        self._handle.onnxq_cuda_error_text.restype = ctypes.c_char_p
        self._handle.onnxq_cuda_float8_scratch.restype = ctypes.c_int64
        self._check(self._handle.onnxq_cuda_prepare())

    def classify(
        self, levels: Array, *, bits: int, zero_points: bool
    ) -> tuple[WeightKind, int, float]:
        """Kind, lowest level and unit of a table of levels in numpy, free of NaN codes."""
        table = np.ascontiguousarray(levels, np.float32)
        offset, unit = ctypes.c_int(), ctypes.c_float()
        kind = self._handle.onnxq_cuda_classify(
            ctypes.c_void_p(table.ctypes.data),
            bits,
            int(zero_points),
            0,
            ctypes.byref(offset),
            ctypes.byref(unit),
        )
        return WeightKind(kind), offset.value, unit.value

    def plan(
        self,
        args: QuantMatMulArgs,
        kind: WeightKind,
        element: ElementType,
        *,
        operands: Operands = Operands.NONE,
    ) -> Plan:
        """How to run a product on the present device; see ``onnxq_cuda_plan``."""
        made = Plan()
        self._check(
            self._handle.onnxq_cuda_plan(
                *(ctypes.byref(args), int(kind), int(element), int(operands)),
                ctypes.byref(made),
            )
        )
        return made

    def dynamic_plan(
        self,
        args: QuantMatMulArgs,
        kind: WeightKind,
        element: ElementType,
        outliers: Outliers,
        *,
        operands: Operands,
    ) -> Plan:
        """How to run a product with rows that are quantized on the way."""
        made = Plan()
        self._check(
            self._handle.onnxq_cuda_dynamic_plan(
                *(ctypes.byref(args), int(kind), int(element), int(operands)),
                *(ctypes.byref(outliers), ctypes.byref(made)),
            )
        )
        return made

    def dynamic_quant_mat_mul(
        self,
        args: QuantMatMulArgs,
        kind: WeightKind,
        element: ElementType,
        unit: float,
        outliers: Outliers,
        plan: Plan,
        scratch: int,
        stream: int,
    ) -> None:
        """Run such a plan, rows in INT8; ``scratch`` holds ``plan.scratch_bytes``."""
        self._check(
            self._handle.onnxq_cuda_dynamic_quant_mat_mul(
                *(ctypes.byref(args), int(kind), int(element), ctypes.c_float(unit)),
                *(ctypes.byref(outliers), ctypes.byref(plan)),
                *(ctypes.c_void_p(scratch), ctypes.c_void_p(stream)),
            )
        )

    def quant_mat_mul(
        self,
        args: QuantMatMulArgs,
        kind: WeightKind,
        element: ElementType,
        unit: float,
        plan: Plan,
        scratch: int,
        stream: int,
    ) -> None:
        """Run a plan; ``scratch`` holds ``plan.scratch_bytes``."""
        self._check(
            self._handle.onnxq_cuda_quant_mat_mul(
                ctypes.byref(args),
                int(kind),
                int(element),
                ctypes.c_float(unit),
                ctypes.byref(plan),
                ctypes.c_void_p(scratch),
                ctypes.c_void_p(stream),
            )
        )

    def per_token(
        self,
        args: PerTokenArgs,
        rows: int,
        element: ElementType,
        activations: Activations = Activations.INT8,
        *,
        floats: bool,
        stream: int,
    ) -> None:
        """Quantize rows; INT8 in the type of x with ``floats``."""
        self._check(
            self._handle.onnxq_cuda_per_token(
                *(ctypes.byref(args), rows, int(element), int(activations), int(floats)),
                ctypes.c_void_p(stream),
            )
        )

    def float8_groups(self, args: Float8GroupsArgs, element: ElementType, *, stream: int) -> None:
        """Quantize rows to FP8 with a scale a group of columns."""
        self._check(
            self._handle.onnxq_cuda_float8_groups(
                ctypes.byref(args), int(element), ctypes.c_void_p(stream)
            )
        )

    def float8_scratch(self, args: Float8ProductArgs) -> int:
        """Bytes that such a product needs."""
        return int(self._handle.onnxq_cuda_float8_scratch(ctypes.byref(args)))

    def float8_mat_mul(
        self, args: Float8ProductArgs, element: ElementType, scratch: int, stream: int
    ) -> None:
        """Round rows of x to FP8 and multiply them by plain FP8 weights."""
        self._check(
            self._handle.onnxq_cuda_float8_mat_mul(
                *(ctypes.byref(args), int(element)),
                *(ctypes.c_void_p(scratch), ctypes.c_void_p(stream)),
            )
        )

    def hadamard(self, args: HadamardArgs, element: ElementType, *, stream: int) -> None:
        """Transform blocks, and quantize them as rows where ``args.scales`` is given."""
        self._check(
            self._handle.onnxq_cuda_hadamard(
                ctypes.byref(args), int(element), ctypes.c_void_p(stream)
            )
        )

    def quantize_block(
        self, args: QuantizeBlockArgs, element: ElementType, *, factors: int, stream: int
    ) -> None:
        """Round blocks; ``factors`` has ``[rows]`` float32 for E4M3 scales with factor 0."""
        self._check(
            self._handle.onnxq_cuda_quantize_block(
                ctypes.byref(args), int(element), ctypes.c_void_p(factors), ctypes.c_void_p(stream)
            )
        )

    def matrix_product(self, product: MatrixProduct, *, stream: int) -> None:
        """``y = x @ weights.T`` on cuBLASLt, with scales of rows or of blocks for FP8."""
        self._check(
            self._handle.onnxq_cuda_matrix_product(ctypes.byref(product), ctypes.c_void_p(stream))
        )

    def _check(self, code: int) -> None:
        if code != 0:
            text = self._handle.onnxq_cuda_error_text(code).decode()
            raise InternalError("INTERNAL-CUDA", f"{text} (code {code})")
