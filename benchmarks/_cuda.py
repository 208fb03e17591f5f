"""Our CUDA kernels on tensors of PyTorch, for the benchmark and for the tests on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from onnxq.custom_ops.cuda_calls import (
    MATRIX_WORKSPACE,
    CudaKernels,
    ElementType,
    Float8GroupsArgs,
    Float8ProductArgs,
    HadamardArgs,
    MatrixProduct,
    MatrixType,
    Operands,
    Outliers,
    PerTokenArgs,
    QuantizeBlockArgs,
    QuantMatMulArgs,
    Route,
    WeightKind,
    scale_type,
)
from onnxq.custom_ops.packed_weight import PackedWeight
from onnxq.runtime import available_providers
from onnxq.runtime.cuda import device_problem
from onnxq.runtime.library import CUDA, shipped_path

Array = np.ndarray[Any, Any]

TENSOR_CORE_BUDGET = 2.0**-20
"""Of float32 sums relative to the sum of magnitudes; see docs/cuda.md."""
HALF_STEP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def missing(*, torch: bool = True) -> str | None:
    """Why nothing can be run on a device here, or None.

    Args:
        torch: whether PyTorch must hold the data; else onnxruntime must have CUDA.
    """
    problem = device_problem()
    if problem is not None:
        return problem
    if library_path() is None:
        return "the CUDA kernels were not built: make cuda"
    if not torch:
        there = "CUDAExecutionProvider" in available_providers()
        return None if there else "this onnxruntime has no CUDA; install onnxruntime-gpu"
    try:
        import torch as library
    except ImportError:
        return "PyTorch is not installed"
    return None if library.cuda.is_available() else "PyTorch sees no GPU"


def library_path() -> Path | None:
    """The CUDA library of the package, or the one that the tests built."""
    built = Path(__file__).parents[1] / "build/cuda/custom_ops/cuda" / CUDA.file_name
    return shipped_path(kind=CUDA) or (built if built.is_file() else None)


def element_of(tensor: Any) -> ElementType:
    """The kernels' name of a tensor's type."""
    return ElementType[str(tensor.dtype).removeprefix("torch.").upper()]


def to_device(array: Array) -> Any:
    """An array on the GPU; types that PyTorch lacks as bytes."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        array = array.view(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


def is_int8(levels: Array) -> bool:
    """As HasInt8Levels of plan.h."""
    return bool((np.rint(levels) == levels).all() and (np.abs(levels + 0.5) <= 127.5).all())


class Device:
    """The kernels, on PyTorch's present stream."""

    def __init__(self) -> None:
        path = library_path()
        assert path is not None
        self.kernels = CudaKernels(path)

    @staticmethod
    def stream() -> int:
        """PyTorch's present stream, as an address."""
        import torch

        return int(torch.cuda.current_stream().cuda_stream)

    def product(
        self, x: Any, weight: Weight, *, route: Route | None = None, row_scale: Any = None
    ) -> tuple[Callable[[], None], Any]:
        """What runs a product once, and where it writes ``[M, N]``; poisoned with NaN."""
        import torch

        y = torch.full((x.shape[0], weight.n), float("nan"), dtype=x.dtype, device="cuda")
        element = element_of(x)
        plain = element == ElementType.FLOAT32
        args = weight.arguments(x, y, row_scale)
        kind = WeightKind.ANY if plain or route == Route.ANY else weight.kind
        plan = self.kernels.plan(args, kind, element)
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device="cuda")

        def run() -> None:
            self.kernels.quant_mat_mul(
                args, kind, element, weight.unit, plan, scratch.data_ptr(), self.stream()
            )

        return run, y

    def per_token(self, x: Any) -> tuple[Callable[[], None], Any, Any]:
        """What quantizes ``[rows, K]``, the integers and the scales."""
        import torch

        q = torch.full(x.shape, -128, dtype=torch.int8, device="cuda")
        scale = torch.full((x.shape[0],), float("nan"), device="cuda")
        args = PerTokenArgs(x.data_ptr(), q.data_ptr(), scale.data_ptr(), None, x.shape[1])

        def run() -> None:
            self.kernels.per_token(
                args, x.shape[0], element_of(x), floats=False, stream=self.stream()
            )

        return run, q, scale

    def dynamic_product(
        self,
        x: Any,
        weight: Weight,
        *,
        named: Any = None,
        threshold: float = 0.0,
    ) -> tuple[Callable[[], None], Any]:
        """`product` with rows that are quantized first, but for columns of outliers."""
        import torch

        y = torch.full((x.shape[0], weight.n), float("nan"), dtype=x.dtype, device="cuda")
        element = element_of(x)
        args = weight.arguments(x, y, None)
        kind = WeightKind.ANY if element == ElementType.FLOAT32 else weight.kind
        outliers = Outliers(threshold=threshold)
        if named is not None:
            outliers.named, outliers.named_count = named.data_ptr(), named.shape[0]
        plan = self.kernels.dynamic_plan(args, kind, element, outliers, operands=weight.operands())
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device="cuda")

        def run() -> None:
            self.kernels.dynamic_quant_mat_mul(
                *(args, kind, element, weight.unit, outliers, plan),
                *(scratch.data_ptr(), self.stream()),
            )

        return run, y

    def quantize_block(
        self, x: Any, attributes: Mapping[str, Any]
    ) -> tuple[Callable[[], None], Any]:
        """What rounds the blocks of ``[rows, K]``, and the result."""
        import torch

        y = torch.full_like(x, float("nan"))
        factors = torch.empty(x.shape[0], device="cuda")
        args = QuantizeBlockArgs.of(x.data_ptr(), y.data_ptr(), *x.shape, attributes)

        def run() -> None:
            self.kernels.quantize_block(
                args, element_of(x), factors=factors.data_ptr(), stream=self.stream()
            )

        return run, y

    def float8_groups(self, x: Any, group: int) -> tuple[Callable[[], None], Any, Any]:
        """What quantizes ``[rows, K]`` to FP8, the numbers and ``[K / group, rows]`` scales."""
        import torch

        q = torch.full(x.shape, float("nan"), device="cuda").to(torch.float8_e4m3fn)
        scale = torch.full((x.shape[1] // group, x.shape[0]), float("nan"), device="cuda")
        args = Float8GroupsArgs(x.data_ptr(), q.data_ptr(), scale.data_ptr(), *x.shape, group)

        def run() -> None:
            self.kernels.float8_groups(args, element_of(x), stream=self.stream())

        return run, q, scale

    def float8_product(
        self, x: Any, weights: Any, scales: Any, block: int
    ) -> tuple[Callable[[], None], Any]:
        """DynamicFloat8MatMul: rows of x are rounded on the way; weights are plain FP8."""
        import torch

        y = torch.full((x.shape[0], weights.shape[0]), float("nan"), dtype=x.dtype, device="cuda")
        args = Float8ProductArgs(
            *(x.data_ptr(), weights.data_ptr(), scales.data_ptr(), None, y.data_ptr(), None, None),
            *(x.shape[0], *weights.shape, block, 0),
        )
        size = self.kernels.float8_scratch(args)
        scratch = torch.empty(size, dtype=torch.uint8, device="cuda")

        def run() -> None:
            self.kernels.float8_mat_mul(args, element_of(x), scratch.data_ptr(), self.stream())

        return run, y

    def hadamard(
        self, x: Any, core: Any, block: int, scale: float, *, group: int | None = None
    ) -> tuple[Callable[[], None], Any, Any]:
        """What transforms ``[rows, K]``, the result and, with ``group``, the scales of INT8."""
        import torch

        quantize = group is not None
        y = torch.full_like(x, float("nan"))
        if quantize:
            y = torch.full(x.shape, -128, dtype=torch.int8, device="cuda")
        size = min(group or 1, x.shape[1])
        scales = torch.full((x.shape[0], -(-x.shape[1] // size)), float("nan"), device="cuda")
        # As HadamardPiece of hadamard.h: rows where they are quantized, else about 4096 columns.
        piece = x.shape[1] if quantize else block * max(1, 4096 // block)
        args = HadamardArgs(
            *(x.data_ptr(), core.data_ptr(), y.data_ptr(), scales.data_ptr() if quantize else None),
            *(x.numel(), block, core.shape[0], piece, size, scale),
        )

        def run() -> None:
            self.kernels.hadamard(args, element_of(x), stream=self.stream())

        return run, y, scales

    def matrix_product(
        self,
        x: Any,
        weights: Any,
        *,
        x_scales: Any = None,
        weights_scales: Any = None,
        scale_block: int = 0,
    ) -> tuple[Callable[[], None], Any]:
        """What runs ``x @ weights.T`` of int8 or FP8 on cuBLASLt, and where it writes."""
        import torch

        integers = x.dtype == torch.int8
        dtype = torch.int32 if integers else torch.bfloat16
        y = torch.empty(x.shape[0], weights.shape[0], dtype=dtype, device="cuda")
        workspace = torch.empty(MATRIX_WORKSPACE, dtype=torch.uint8, device="cuda")
        product = MatrixProduct(
            *(x.shape[0], weights.shape[0], x.shape[1]),
            MatrixType.INT8 if integers else MatrixType.FLOAT8E4M3,
            MatrixType.INT32 if integers else MatrixType.BFLOAT16,
            *(x.data_ptr(), weights.data_ptr(), y.data_ptr()),
            *(None if t is None else t.data_ptr() for t in (x_scales, weights_scales)),
            *(scale_block, workspace.data_ptr()),
        )

        def run() -> None:
            assert workspace.is_cuda  # held as long as the launches
            self.kernels.matrix_product(product, stream=self.stream())

        return run, y


class Weight:
    """A packed weight on the GPU."""

    def __init__(self, device: Device, packed: PackedWeight) -> None:
        self.packed = packed
        a = packed.attributes
        self.n, self.k = int(a["N"]), int(a["K"])
        self.zeros = packed.inputs["zero_points"].shape != (1, 1, 1)
        self.tensors = {name: to_device(array) for name, array in packed.inputs.items()}
        self.kind, self.offset, self.unit = device.kernels.classify(
            packed.inputs["levels"], bits=int(a["bits"]), zero_points=self.zeros
        )
        self.int8_levels = is_int8(packed.inputs["levels"])
        self.has_bias = bool(packed.inputs["bias"].any())

    def operands(self) -> Operands:
        """What both operands can be stored as."""
        return Operands.INT8 if self.int8_levels else Operands.NONE

    @property
    def stored_bytes(self) -> int:
        """Codes, scales and zero points."""
        names = ("codes", "scales", "zero_points")
        return sum(self.packed.inputs[name].nbytes for name in names)

    def copy(self) -> Weight:
        """The same numbers elsewhere in memory, so that a benchmark reads them anew."""
        other: Weight = object.__new__(Weight)
        other.__dict__.update(self.__dict__)
        other.tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return other

    def arguments(self, x: Any, y: Any, row_scale: Any) -> QuantMatMulArgs:
        """The kernels' arguments for ``y = x @ W.T``."""
        a, at = self.packed.attributes, {k: t.data_ptr() for k, t in self.tensors.items()}
        group = int(a["group"])
        return QuantMatMulArgs(
            *(x.data_ptr(), at["codes"], at["scales"], at["zero_points"] if self.zeros else None),
            *(at["levels"], at["bias"] if self.has_bias else None),
            *(None if row_scale is None else row_scale.data_ptr(), y.data_ptr(), None, None),
            *(x.shape[0], self.n, self.k, group, -(-self.k // group), 1, self.offset),
            *(int(a["bits"]), int(len(self.packed.inputs["bias"]) == self.n)),
            *(scale_type(self.packed.inputs["scales"].dtype), a["factor"]),
        )


def product_error(y: Any, x: Any, matrix: Any, bias: Any, *, expanded: bool) -> float:
    """The largest error as a share of the budget; ``matrix`` is W ``[N, K]`` in float64.

    NaN counts as infinite.
    """
    import torch

    rows = x.double()
    exact = rows @ matrix.T + bias
    size = rows.abs() @ matrix.abs().T + bias.abs()
    step = HALF_STEP[str(x.dtype).removeprefix("torch.")]
    budget = TENSOR_CORE_BUDGET * (4 + matrix.shape[1] ** 0.5) * size
    budget += step * 1.01 * exact.abs() + 2.0**-25
    if expanded:
        budget += step * 1.01 * size
    share = ((y.double() - exact).abs() / budget).max()
    return float(torch.nan_to_num(share, nan=float("inf")))
