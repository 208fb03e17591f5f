"""What the CUDA kernels are timed beside, and how: CUDA graphs over copies in memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

REPLAYS = 20
CACHES = 3.2


def copies(size: int) -> int:
    """How many arrays of ``size`` bytes are more than three L2 caches."""
    import torch

    return copies_beyond(torch.cuda.get_device_properties(0).L2_cache_size, size)


def copies_beyond(cache: int, size: int) -> int:
    """The same for a cache of so many bytes."""
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
    return replays(graph.replay) / len(launches)


def replays(replay: Callable[[], Any]) -> float:
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


def peers(kind: str, x: Any, k: int, n: int) -> Iterator[tuple[str, float]]:
    """onnxruntime's own operator for a kind of weight, where it has one."""
    node = ort_node(kind, k, n)
    if node is not None:
        name, inputs, attributes = node
        stored = sum(array.nbytes for array in inputs.values())
        timed = ort_time(name, inputs, attributes, x, n, copies(stored))
        if timed is not None:
            yield f"ort {name}", timed


def cublaslt_fp8(x: Any, k: int, n: int) -> float:
    """A product of FP8 operands with one scale each, through PyTorch: cuBLASLt alone."""
    import torch

    a = x.to(torch.float8_e4m3fn)
    b = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    others = [b, *(b.clone() for _ in range(copies(n * k) - 1))]
    one = torch.ones((), device="cuda")
    calls = [
        lambda w=w: torch._scaled_mm(
            a, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        for w in others
    ]
    return time_graph(calls)


def cublas_int8(m: int, k: int, n: int) -> float:
    """A product of int8 to int32 through PyTorch."""
    import torch

    a, b = (torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8) for rows in (m, n))
    others = [b, *(b.clone() for _ in range(copies(n * k) - 1))]
    return time_graph([lambda w=w: torch._int_mm(a, w.t()) for w in others])


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
    if name == "fp8" and k % 128 == 0:
        codes = rng.integers(0, 120, size=(n, k), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        scales = np.full((n, k // 128), 0.01, np.float32)
        return "MatMulBlockQuantizedFp8Weight", {"B": codes, "scales": scales}, {"block_size": 128}
    if name == "nvfp4":
        blob = rng.integers(0, 256, size=(n, k // 2), dtype=np.uint8)
        one = np.full((n, k // 16), 0x38, np.uint8)  # E4M3's code of 1
        constants = {"B": blob, "scales": one, "factor": np.array(0.01, np.float32)}
        return "MatMulBlockQuantizedFp4Weight", constants, {"block_size": 16}
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
    return replays(lambda: session.run_with_iobinding(binding)) / count
