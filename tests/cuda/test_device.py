"""The kernels on a device, with fresh random inputs, against float64. Needs a GPU and PyTorch.

One command runs it: ``make cuda && pytest tests/cuda/test_device.py``.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from benchmarks._cuda import (
    HALF_STEP,
    TENSOR_CORE_BUDGET,
    Device,
    Weight,
    missing,
    product_error,
    to_device,
)
from onnxq import custom_ops
from onnxq.custom_ops.block_format import block_attributes
from onnxq.custom_ops.cuda_calls import Route
from onnxq.custom_ops.defs.dynamic_float8_mat_mul import spread_scales
from onnxq.custom_ops.packed_weight import PackedWeight
from onnxq.formats import parse_format
from onnxq.solvers.hadamard import hadamard_matrix
from tests.cuda.emulation import exact
from tests.custom_ops.cases import (
    BLOCK_FORMATS,
    CASES,
    Case,
    float8_weight,
    model_of,
    quantized_weight,
)

PROBLEM = missing()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"no device: {PROBLEM}")

KINDS = ("int4", "uint4", "int8", "mxfp4", "nvfp4", "fp8", "mxfp8e4m3", "nf4", "int3", "binary")
DTYPES = ("float16", "bfloat16", "float32")
# Rows by route: GEMV, tiles of each height, several blocks of them, expansion; and odd shapes.
PRODUCTS = (
    *itertools.product((1, 5, 8, 9, 17, 40, 100, 300), ((1024, 512, 128), (2080, 264, 32))),
    (3, (37, 33, 37)),
    (70, (130, 65, 20)),
    (2, (64, 1, 16)),
)


@pytest.fixture(scope="module")
def device() -> Device:
    return Device()


@pytest.fixture
def rng() -> np.random.Generator:
    """Not seeded: the kernels compute the same function on any input."""
    return np.random.default_rng()


def activations(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    import torch

    x = torch.from_numpy(rng.normal(size=shape).astype(np.float32)).cuda()
    return x.to(getattr(torch, dtype))


def matrix_of(packed: PackedWeight) -> tuple[Any, Any]:
    """W ``[N, K]`` and the bias in float64, on the device."""
    eye = np.eye(int(packed.attributes["K"]), dtype=np.float32)
    bias = packed.inputs["bias"].astype(np.float64)
    product, _ = exact(eye, packed)
    return to_device(np.ascontiguousarray((product - bias).T)), to_device(bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products(device: Device, rng: np.random.Generator, kind: str, dtype: str) -> None:
    import torch

    for m, (k, n, group) in PRODUCTS:
        packed = quantized_weight(kind, n, k, group, int8_activations=False, rng=rng)
        weight = Weight(device, packed)
        x = activations(rng, (m, k), dtype)
        run, y = device.product(x, weight)
        run()
        torch.cuda.synchronize()
        error = product_error(y, x, *matrix_of(packed), expanded=m > 128)
        assert error <= 1, (m, k, n, group, error)


def test_products_replay_from_a_graph_with_equal_bits(
    device: Device, rng: np.random.Generator
) -> None:
    import torch

    packed = quantized_weight("uint4", 512, 2048, 128, int8_activations=False, rng=rng)
    weight = Weight(device, packed)
    for m in (1, 33, 200):
        x = activations(rng, (m, 2048), "float16")
        run, y = device.product(x, weight)
        run()
        torch.cuda.synchronize()
        first = y.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for _ in range(20):
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, first), m  # a difference between runs is a race


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_gives_the_cpu_s_bits(
    device: Device, rng: np.random.Generator, dtype: str
) -> None:
    import torch

    reference = custom_ops.get("DynamicQuantizePerToken").reference
    for rows, k in ((1, 1), (7, 129), (64, 4096), (3, 11008)):
        x = activations(rng, (rows, k), dtype)
        x[0, 0] = float("nan")
        run, q, scale = device.per_token(x)
        run()
        torch.cuda.synchronize()
        expected_q, expected_scale = reference(x.float().cpu().numpy())
        assert np.array_equal(q.cpu().numpy(), expected_q)
        assert np.array_equal(scale.cpu().numpy(), expected_scale[:, 0], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_gives_the_cpu_s_bits(
    device: Device, rng: np.random.Generator, dtype: str
) -> None:
    import torch

    reference = custom_ops.get("Hadamard").reference
    for k, block, c in (
        *((64, 16, 1), (4096, 128, 1), (8192, 8192, 1), (1536, 1536, 12)),
        *((112, 56, 28), (32768, 32768, 1)),
    ):
        x = activations(rng, (5, k), dtype)
        core = hadamard_matrix(c).astype(np.float32)
        scale = float(np.float32(1 / np.sqrt(block)))
        run, y, _ = device.hadamard(x, to_device(core), block, scale)
        run()
        torch.cuda.synchronize()
        (expected,) = reference(x.float().cpu().numpy(), core, block=block, scale=scale)
        rounded = torch.from_numpy(expected).to(x.dtype)
        assert torch.equal(y.cpu(), rounded), (k, block, c)
        run, q, scales = device.hadamard(x, to_device(core), block, scale, group=k)
        run()
        torch.cuda.synchronize()
        expected_q, expected_scales = custom_ops.get("HadamardQuantize").reference(
            x.float().cpu().numpy(), core, block=block, scale=scale, group=k
        )
        assert np.array_equal(q.cpu().numpy(), expected_q), (k, block, c)
        assert np.array_equal(scales.cpu().numpy(), expected_scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_block_gives_the_reference_s_bits(
    device: Device, rng: np.random.Generator, dtype: str
) -> None:
    import torch

    reference = custom_ops.get("QuantizeBlock").reference
    for (name, group), k in itertools.product(BLOCK_FORMATS, (97, 512, 4096)):
        attributes = block_attributes(parse_format(name), group=group)
        x = activations(rng, (7, k), dtype) * 10.0 ** float(rng.uniform(-3, 3))
        x[2, 5] = float("nan")
        run, y = device.quantize_block(x, attributes)
        run()
        torch.cuda.synchronize()
        (expected,) = reference(x.float().cpu().numpy(), **attributes)
        wanted = torch.from_numpy(expected).to(x.dtype)
        assert torch.equal(torch.nan_to_num(y.cpu(), 7), torch.nan_to_num(wanted, 7)), (name, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
def test_dynamic_products(device: Device, rng: np.random.Generator, kind: str, dtype: str) -> None:
    """Few rows on the kernels of QuantMatMul, many as integers; with and without outliers."""
    import torch

    reference = custom_ops.get("DynamicQuantMatMul").reference
    for m, (k, n, group) in itertools.product((1, 8, 40, 300), ((512, 272, 512), (256, 96, 32))):
        packed = quantized_weight(kind, n, k, group, int8_activations=True, rng=rng)
        x = activations(rng, (m, k), dtype)
        x[:, 3] *= 20
        for named, threshold in (([], 0.0), ([5, 3, 5], 0.0), ([k - 1], 9.0)):
            columns = np.array(named, np.int64)
            run, y = device.dynamic_product(
                x, Weight(device, packed), named=to_device(columns), threshold=threshold
            )
            run()
            torch.cuda.synchronize()
            source = x.float().cpu().numpy()
            weights = [a for name, a in packed.inputs.items() if name != "order"]
            (expected,) = reference(
                source, *weights, columns, threshold=threshold, **packed.attributes
            )
            _, size = exact(source, packed)
            budget = TENSOR_CORE_BUDGET * (4 + np.sqrt(k)) * size + 2.0**-24
            budget += HALF_STEP[dtype] * (np.abs(expected) + size * (m > 128)) * 1.01
            error = np.abs(y.double().cpu().numpy() - expected) / budget
            assert error.max() <= 1, (m, k, n, named, threshold, error.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [0, 128])
def test_products_of_fp8_rows(
    device: Device, rng: np.random.Generator, block: int, dtype: str
) -> None:
    """On cuBLASLt, whose FP8 sums keep fewer bits, and by the plain kernel where N does not fit."""
    import torch

    reference = custom_ops.get("DynamicFloat8MatMul").reference
    for m, (k, n) in itertools.product((1, 8, 40, 300), ((512, 272), (640, 130))):
        weight, scales = float8_weight(n, k, block, rng)
        x = activations(rng, (m, k), dtype)
        run, y = device.float8_product(x, to_device(weight), to_device(scales), block)
        run()
        torch.cuda.synchronize()
        source = x.float().cpu().numpy()
        bias = np.zeros(1, np.float32)
        (expected,) = reference(source, weight, scales, bias, block=block)
        matrix = weight.astype(np.float64) * spread_scales(scales, n, k, block)
        size = np.abs(source).astype(np.float64) @ np.abs(matrix.T)
        budget = 2.0**-10 * 1.1 * size + HALF_STEP[dtype] * np.abs(expected) * 1.01
        error = np.abs(y.double().cpu().numpy() - expected) / (budget + 2.0**-24)
        assert error.max() <= 1, (m, k, n, error.max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_in_fp8(device: Device, rng: np.random.Generator, dtype: str) -> None:
    """The numbers that QuantizeBlock gives."""
    import torch

    reference = custom_ops.get("QuantizeBlock").reference
    attributes = block_attributes(parse_format("fp8e4m3"), group=128)
    for rows, k in ((1, 128), (37, 1024), (300, 4096)):
        x = activations(rng, (rows, k), dtype)
        run, q, scale = device.float8_groups(x, 128)
        run()
        torch.cuda.synchronize()
        got = q.float() * scale.T.repeat_interleave(128, dim=1)
        (expected,) = reference(x.float().cpu().numpy(), **attributes)
        assert np.array_equal(got.cpu().numpy(), expected)


def test_products_of_fp8_with_scales_of_blocks(device: Device, rng: np.random.Generator) -> None:
    import torch

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuBLASLt has block scales from Hopper on")
    m, n, k, block = 256, 384, 512, 128
    x, w = (
        torch.from_numpy(rng.normal(size=shape)).cuda().to(torch.float8_e4m3fn)
        for shape in ((m, k), (n, k))
    )
    rows = torch.rand(k // block, m, device="cuda") + 0.5
    columns = torch.rand(n // block, -(-k // block // 4) * 4, device="cuda") + 0.5
    run, y = device.matrix_product(x, w, x_scales=rows, weights_scales=columns, scale_block=block)
    run()
    torch.cuda.synchronize()
    left = x.double() * rows.double().T.repeat_interleave(block, dim=1)
    spread = columns.double()[:, : k // block].repeat_interleave(block, dim=0)
    right = w.double() * spread.repeat_interleave(block, dim=1)
    size = left.abs() @ right.abs().T
    wrong = (y.double() - left @ right.T).abs() > size * 2.0**-8
    assert not wrong.any()


def test_matrix_products(device: Device, rng: np.random.Generator) -> None:
    import torch

    m, n, k = 256, 384, 512
    q, w = (
        torch.from_numpy(rng.integers(-127, 128, size=shape, dtype=np.int8)).cuda()
        for shape in ((m, k), (n, k))
    )
    run, y = device.matrix_product(q, w)
    run()
    torch.cuda.synchronize()
    assert torch.equal(y.double(), q.double() @ w.double().T)
    x8, w8 = (t.float().mul(0.5).to(torch.float8_e4m3fn) for t in (q, w))
    rows = torch.rand(m, device="cuda") + 0.5
    columns = torch.rand(n, device="cuda") + 0.5
    run, y = device.matrix_product(x8, w8, x_scales=rows, weights_scales=columns)
    run()
    torch.cuda.synchronize()
    exact = (x8.double() @ w8.double().T) * rows.double()[:, None] * columns.double()
    size = (x8.double().abs() @ w8.double().abs().T) * rows.double()[:, None] * columns.double()
    # Hopper sums FP8 products in fewer bits than float32.
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + size * 2.0**-10).all()


def test_routes_agree(device: Device, rng: np.random.Generator) -> None:
    """The plain kernel and the one of the tensor cores, on the same input."""
    import torch

    packed = quantized_weight("mxfp4", 96, 512, 32, int8_activations=False, rng=rng)
    weight = Weight(device, packed)
    x = activations(rng, (4, 512), "float16")
    results = []
    for route in (None, Route.ANY):
        run, y = device.product(x, weight, route=route)
        run()
        results.append(y)
    torch.cuda.synchronize()
    assert torch.allclose(results[0].float(), results[1].float(), rtol=2e-3, atol=1e-3)


def allowed(op: str, case: Case) -> Any:
    """An error beside the relative one: tensor cores keep 10 bits of sums of FP8."""
    if op != "DynamicFloat8MatMul":
        return 2e-3
    sizes = [np.abs(case.inputs["x"])]
    sizes += [np.abs(a.astype(np.float32)).astype(a.dtype) for a in case.constants.values()]
    (size,) = custom_ops.get(op).reference(*sizes, **case.attributes)
    return 2e-3 + np.nan_to_num(size.astype(np.float64), posinf=0) * 2.0**-10


def test_operators_in_onnxruntime() -> None:
    """Each operator with a CUDA kernel in a CUDA session, on the contract's cases."""
    from onnxq.runtime import available_providers, session

    if "CUDAExecutionProvider" not in available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    for kernel in custom_ops.kernels():
        if kernel.provider != "CUDA" or kernel.dtype == "bfloat16":
            continue
        for case in CASES[kernel.op](kernel.dtype):
            if case.attributes.get("int8_activations") == 2:
                continue  # has no CUDA kernel: docs/cuda.md
            made = session(model_of(kernel.op, case), ["cuda", "cpu"], library=True)
            expected = case.reference(kernel.op)
            for got, wanted in zip(made.run(None, case.inputs), expected, strict=True):
                with np.errstate(invalid="ignore"):
                    close = np.isclose(
                        got.astype(np.float64), wanted.astype(np.float64),
                        rtol=2e-3, atol=allowed(kernel.op, case), equal_nan=True,
                    )  # fmt: skip
                assert close.all(), (kernel, case.name)


def test_operators_without_a_cuda_kernel_run_on_the_cpu_s() -> None:
    """In the same session: both libraries' kernels lie in one domain."""
    from onnxq.runtime import available_providers, session

    if "CUDAExecutionProvider" not in available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    case = next(iter(CASES["IntegerSoftmax"]("int32")))
    made = session(model_of("IntegerSoftmax", case), ["cuda", "cpu"], library=True)
    for got, wanted in zip(
        made.run(None, case.inputs), case.reference("IntegerSoftmax"), strict=True
    ):
        assert np.array_equal(got, wanted)
