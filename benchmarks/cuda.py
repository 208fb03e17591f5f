"""Claim: the CUDA kernels are right, and reach the goals of docs/cuda.md on an H200.

Not measured yet. Needs a GPU, PyTorch and the CUDA library (``make cuda``);
without one it says what is missing and measures nothing. With onnxruntime-gpu its own operators are
timed too.

Each kernel is first run on poisoned outputs and compared with float64. Times are of CUDA graphs
that hold as many launches as there are copies of the weight (or of the activations, for kernels
without one): together more than three times the L2 cache, so that everything comes from memory. The
median of the replays counts. ``ratio`` is the peer's time over ours.

A 16 MB weight at M <= 8 should take no longer than its bytes at 65 % of 4.8 TB/s: 5.4 us on an
H200.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from _common import Column, Row, parser, print_table
from _cuda import Device, Weight, missing, product_error, to_device

from onnxq.custom_ops.defs import quant_mat_mul
from onnxq.custom_ops.packed_weight import PackedWeight, integer_levels, pack_table
from onnxq.formats import parse_format
from onnxq.solvers.hadamard import hadamard_matrix

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192))
QUICK_SHAPES = ((1024, 1024),)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
QUICK_ROWS = (1, 16, 256)
LENGTHS = (1024, 4096, 8192)
REPLAYS = 20
CACHES = 3.2
COLUMNS = (
    Column("us", "us", "us", "lower"),
    Column("gbps", "GB/s", "GB/s", "higher", "{:.0f}"),
    Column("tflops", "TFLOP/s", "TFLOP/s", "higher", "{:.1f}"),
    Column("error", "error / budget", "", "lower", "{:.3f}"),
    Column("ratio", "peer / ours", "", "higher"),
)


def weight_of(kind: str, k: int, n: int, rng: np.random.Generator) -> PackedWeight:
    """Random codes; scales that are powers of two, so that every type of scale holds them."""
    name, _, group_text = kind.partition("_g")
    group = int(group_text or k)
    if name == "int4":
        levels, _ = integer_levels(4, signed=True)
    elif name == "int8":
        levels, _ = integer_levels(8, signed=True)
    else:
        bits = 4 if name in ("mxfp4", "nvfp4") else 8
        levels = np.asarray(
            parse_format("fp4e2m1" if bits == 4 else "fp8e4m3").decode(
                np.arange(1 << bits, dtype=np.uint8)
            ),
            np.float32,
        )
    codes = rng.choice(np.flatnonzero(np.isfinite(levels)).astype(np.uint8), size=(n, k))
    scale = np.exp2(rng.integers(-8, -4, size=(n, -(-k // group)))).astype(np.float32)
    stored = {"mxfp4": "e8m0", "nvfp4": "e4m3"}.get(name, "float16")
    return pack_table(
        codes,
        levels,
        scale,
        group=group,
        scale_type=stored,
        int8_activations=False,
    )


def plain_matrix(packed: PackedWeight) -> Any:
    """W ``[N, K]`` in float64 on the device."""
    a = packed.attributes
    names = ("codes", "scales", "zero_points", "levels")
    level, scale = quant_mat_mul.weight_parts(
        *(packed.inputs[name] for name in names), a["K"], a["N"], a["group"], a["exponent_scales"]
    )
    wide = np.repeat(scale, int(a["group"]), axis=1)[:, : int(a["K"])]
    return to_device(level * wide).double() * float(np.float32(a["factor"]))


def copies(size: int) -> int:
    """How many arrays of ``size`` bytes are more than three L2 caches."""
    import torch

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(256, math.ceil(CACHES * cache / size)))


def time_graph(launches: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one launch: the median over replays of a graph of all."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return _replays(graph.replay) / len(launches)


def _replays(replay: Callable[[], Any]) -> float:
    """Microseconds of a replay, the median."""
    import torch

    for _ in range(3):
        replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def products(device: Device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Every kind of weight at every M, beside its peers."""
    import torch

    rng = np.random.default_rng()
    kinds = ("int4_g128", "int4_g32", "mxfp4_g32", "nvfp4_g16", "int8_g128", "fp8")
    for k, n in QUICK_SHAPES if quick else SHAPES:
        half = [torch.randn(n, k, device="cuda", dtype=torch.float16)]
        half += [half[0].clone() for _ in range(copies(half[0].nbytes) - 1)]
        cublas: dict[int, float] = {}
        for kind in kinds:
            packed = weight_of(kind, k, n, rng)
            weight = Weight(device, packed)
            weights = [weight, *(weight.copy() for _ in range(copies(weight.stored_bytes) - 1))]
            matrix = plain_matrix(packed)
            bias = torch.zeros(n, device="cuda", dtype=torch.float64)
            for m in QUICK_ROWS if quick else ROWS:
                x = torch.randn(m, k, device="cuda").half()
                runs = [device.product(x, one) for one in weights]
                runs[-1][0]()
                torch.cuda.synchronize()
                error = product_error(runs[-1][1], x, matrix, bias, expanded=m > 128)
                ours = time_graph([run for run, _ in runs])
                if m not in cublas:
                    y = torch.empty(m, n, device="cuda", dtype=torch.float16)
                    calls = [lambda x=x, y=y, w=w: torch.matmul(x, w.T, out=y) for w in half]
                    cublas[m] = time_graph(calls)
                row = {
                    "case": kind, "M": m, "K": k, "N": n, "unit": "us", "ours": ours,
                    "gbps": (weight.stored_bytes + 2 * m * (k + n)) / ours / 1e3,
                    "tflops": 2.0 * m * k * n / ours / 1e6,
                    "error": error,
                }  # fmt: skip
                yield {**row, **_against("cuBLAS fp16", cublas[m], ours)}
                for name, other in peers(kind, x, k, n):
                    yield {**row, **_against(name, other, ours)}


def _against(name: str, other: float, ours: float) -> dict[str, Any]:
    return {"peer_name": name, "peer": other, "ratio": other / ours}


def peers(kind: str, x: Any, k: int, n: int) -> Iterator[tuple[str, float]]:
    """What else computes the same: cuBLASLt in FP8, onnxruntime's own operators."""
    if kind == "fp8" and x.shape[0] % 16 == 0:
        yield "cuBLASLt FP8 x FP8", cublaslt_fp8(x, k, n)
    node = ort_node(kind, k, n)
    if node is not None:
        name, inputs, attributes = node
        stored = sum(array.nbytes for array in inputs.values())
        timed = ort_time(name, inputs, attributes, x, n, copies(stored))
        if timed is not None:
            yield f"ort {name}", timed


def fp8_products(device: Device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """FP8 activations by token and weights by channel, with fused scales, beside PyTorch's call."""
    import torch

    for k, n in QUICK_SHAPES if quick else SHAPES:
        w = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
        ws = [w, *(w.clone() for _ in range(copies(n * k) - 1))]
        columns = torch.rand(n, device="cuda") + 0.5
        for m in (256,) if quick else (256, 1024, 4096):
            x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
            rows = torch.rand(m, device="cuda") + 0.5
            runs = [
                device.matrix_product(x, one, x_scales=rows, weights_scales=columns) for one in ws
            ]
            runs[-1][0]()
            torch.cuda.synchronize()
            scales = rows.double()[:, None] * columns.double()
            exact = x.double() @ w.double().T * scales
            size = x.double().abs() @ w.double().abs().T * scales
            ours = time_graph([run for run, _ in runs])
            yield {
                "case": "fp8 x fp8", "M": m, "K": k, "N": n, "unit": "us", "ours": ours,
                "gbps": (n * k + m * (k + 2 * n)) / ours / 1e3,
                "tflops": 2.0 * m * k * n / ours / 1e6,
                "error": _share(
                    runs[-1][1].double(), exact, exact.abs() * 2.0**-8 + size * 2.0**-10
                ),
                **_against("cuBLASLt FP8 x FP8", cublaslt_fp8(x, k, n), ours),
            }  # fmt: skip


def cublaslt_fp8(x: Any, k: int, n: int) -> float:
    """A product of FP8 activations by token and weights by channel, through PyTorch."""
    import torch

    count = copies(n * k)
    a = x.to(torch.float8_e4m3fn)
    b = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    others = [b, *(b.clone() for _ in range(count - 1))]
    rows = torch.ones(x.shape[0], 1, device="cuda")
    columns = torch.ones(1, n, device="cuda")
    calls = [
        lambda w=w: torch._scaled_mm(
            a, w.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16
        )
        for w in others
    ]
    return time_graph(calls)


def ort_node(
    kind: str, k: int, n: int
) -> tuple[str, dict[str, np.ndarray[Any, Any]], dict[str, int]] | None:
    """onnxruntime's operator for a kind of weight, its constants and attributes; numbers do not
    matter for its speed."""
    rng = np.random.default_rng(1)
    name, _, group = kind.partition("_g")
    if name in ("int4", "int8"):
        bits, block = int(name[3:]), int(group)
        blob = rng.integers(0, 256, size=(n, k // block, block * bits // 8), dtype=np.uint8)
        scales = np.full((n, k // block), 0.01, np.float16)
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block}
        return "MatMulNBits", {"B": blob, "scales": scales}, attributes
    if name == "fp8":
        codes = rng.integers(0, 120, size=(n, k), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        scales = np.full((n, k // 128), 0.01, np.float32)
        return "MatMulBlockQuantizedFp8Weight", {"B": codes, "scales": scales}, {"block_size": 128}
    return None


def ort_time(
    op: str,
    inputs: dict[str, np.ndarray[Any, Any]],
    attributes: dict[str, int],
    x: Any,
    n: int,
    count: int,
) -> float | None:
    """Microseconds of one node, of a graph of ``count`` with weights of their own; None where this
    onnxruntime cannot."""
    import onnx_ir as ir
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return None
    m, k = x.shape
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([m, k]))
    nodes, constants = [], []
    for number in range(count):
        values = []
        for name, array in inputs.items():
            tensor = ir.tensor(array, name=f"{name}{number}")
            value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape)
            value.type = ir.TensorType(tensor.dtype)
            values.append(value)
        constants += values
        node = ir.node(op, [source, *values], attributes, domain="com.microsoft")
        out = node.outputs[0]
        out.name, out.type = f"y{number}", ir.TensorType(ir.DataType.FLOAT16)
        out.shape = ir.Shape([m, n])
        nodes.append(node)
    graph = ir.Graph(
        [source], [node.outputs[0] for node in nodes], nodes=nodes, initializers=constants,
        opset_imports={"": 21, "com.microsoft": 1}, name="peer",
    )  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    session = ort.InferenceSession(model, providers=[provider])
    binding = session.io_binding()
    held = [ort.OrtValue.ortvalue_from_numpy(x.cpu().numpy(), "cuda", 0)]
    binding.bind_ortvalue_input("x", held[0])
    for number in range(count):
        held.append(ort.OrtValue.ortvalue_from_shape_and_type([m, n], np.float16, "cuda", 0))
        binding.bind_ortvalue_output(f"y{number}", held[-1])
    for _ in range(3):
        session.run_with_iobinding(binding)
    return _replays(lambda: session.run_with_iobinding(binding)) / count


def rows_kernels(device: Device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Hadamard, alone and with quantization, and per-token quantization, beside a copy."""
    import torch

    for k in LENGTHS[:1] if quick else LENGTHS:
        m = 64 if quick else (1 << 25) // k  # 64 MB of float16
        x = torch.randn(m, k, device="cuda").half()
        xs = [x, *(x.clone() for _ in range(copies(x.nbytes) - 1))]
        core, scale = to_device(hadamard_matrix(1).astype(np.float32)), 1 / math.sqrt(k)
        dense = to_device(hadamard_matrix(k).astype(np.float64))
        exact = x[:8].double() @ dense * float(np.float32(scale))
        rounded = [device.hadamard(one, core, k, scale) for one in xs]
        fused = [device.hadamard(one, core, k, scale, group=k) for one in xs]
        quantized = [device.per_token(one) for one in xs]
        for run, *_ in (rounded[0], fused[0], quantized[0]):
            run()
        torch.cuda.synchronize()
        errors = {
            "hadamard": _share(rounded[0][1][:8].double(), exact, exact.abs() * 2.0**-11 + 2e-4),
            "hadamard+int8": _share(
                fused[0][1][:8].double() * fused[0][2][:8].double(),
                exact,
                fused[0][2][:8].double() * 0.51 + exact.abs() * 2.0**-11 + 2e-4,
            ),
            "per-token int8": _share(
                quantized[0][1].double() * quantized[0][2][:, None].double(),
                x.double(),
                quantized[0][2][:, None].double() * 0.5001,
            ),
        }
        for name, runs, out_bytes in (
            ("hadamard", rounded, 2),
            ("hadamard+int8", fused, 1),
            ("per-token int8", quantized, 1),
        ):
            size = m * k * (2 + out_bytes)
            ours = time_graph([run for run, *_ in runs])
            half = torch.empty(size // 2, device="cuda", dtype=torch.uint8)
            froms = [torch.empty_like(half) for _ in xs]
            copy = time_graph([lambda f=f, h=half: h.copy_(f) for f in froms])
            yield {
                "case": name, "M": m, "K": k, "N": k, "unit": "us", "ours": ours,
                "gbps": size / ours / 1e3, "error": errors[name],
                **_against("copy of the same bytes", copy, ours),
            }  # fmt: skip


def _share(got: Any, exact: Any, budget: Any) -> float:
    import torch

    return float(torch.nan_to_num(((got - exact).abs() / budget).max(), nan=float("inf")))


def main() -> int:
    """Check, time, print; leaves exit code 1 when a result lies outside of its budget."""
    options = parser(__doc__ or "").parse_args()
    problem = missing()
    if problem is not None:
        sys.stderr.write(f"cuda.py measures nothing here: {problem}\n")
        return 0
    device = Device()
    wrong = []
    table: list[Row] = []
    for work in (products, fp8_products, rows_kernels):
        for row in work(device, quick=options.quick):
            if not row["error"] <= 1:
                wrong.append(row)
            if options.json:
                print(json.dumps(row), flush=True)
            shape = f"M {row['M']} K {row['K']} N {row['N']}"
            label = f"{row['case']} {shape} / {row['peer_name']}"
            figures = {key: row[key] for key in ("gbps", "tflops", "error", "ratio") if key in row}
            table.append(Row(label, label, True, {"us": row["ours"], **figures}))
    if not options.json:
        print_table("CUDA kernels", table, COLUMNS)
    for row in wrong:
        sys.stderr.write(f"outside of the budget: {row}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
