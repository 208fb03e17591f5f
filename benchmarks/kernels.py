"""Claim: our packed products are faster than ONNX Runtime's best form of the same computation.

    python benchmarks/kernels.py                          the table; ten minutes
    python benchmarks/kernels.py --quick                  one shape: does it run at all?
    python benchmarks/kernels.py --json                   one object a line
    python benchmarks/kernels.py --cases w4a8_g32 --threads 2 --rows 128 --plot kernels.svg

Ours and its peers run in turn in one process. A time is the greatest of the threads' processor
times, and figures are the 25th percentile over the rounds (the least with several threads), so that
other load hardly counts; what it takes to wake a thread is not in it. `ratio` is the peer's time
divided by ours: above 1 we are faster. Every peer computes the product of the same shapes with
weights of as many bits, or what comes closest:

MatMulNBits level 4 rounds activations to INT8 a block, ours a token; DynamicQuantizeMatMul has one
scale for the whole tensor; "unfused" is per-token INT8 in standard operators. ONNX Runtime has no
FP4, MX or NVFP4 on the CPU: there the peer is its float32 MatMul, and ggml where `pip install
ggml-python` has put it. The rotation's peer is the
product with the matrix.

A call alone, of a session with one Relu of the same activations, is timed in turn with the rest
(`call_us`): of small products it is the greater part. `kernel_read_share` is the share of the
bandwidth without it.

The limits that shares refer to are measured in the same run (`_limits.cc`): arithmetic in
registers, INT8 or float; for up to 8 rows the bandwidth, by reading as many bytes as the weights
take, in turn with the rest, so from wherever the peers' weights have driven them to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _common
import _ggml
import _limits
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir

from onnxq import custom_ops
from onnxq.custom_ops.packed_weight import integer_levels, pack_table
from onnxq.errors import SpecError
from onnxq.formats import parse_format
from onnxq.runtime import usable_library
from onnxq.solvers.hadamard import hadamard_factors, hadamard_matrix

SHAPES = ((576, 1536), (2048, 2048), (4096, 4096), (4096, 11008))
ROWS = (1, 8, 128, 512)
SECONDS = 1.5
"""For each comparison; never fewer than MIN_ROUNDS rounds."""
MIN_ROUNDS, MAX_ROUNDS = 5, 60
PERCENTILE = 25
SLOW_SECONDS = 1.0
FEW_ROWS = 8
READ, CALL = "read", "call"
OPSET = 21

Array = np.ndarray[Any, Any]
Peer = Callable[[int, int, np.random.Generator], onnx.ModelProto]


@dataclass(frozen=True)
class Variant:
    """One of our forms, with what it is compared to.

    Attributes:
        name: the case's name.
        levels: of the codes.
        group: columns that share a scale; 0 for all.
        int8: whether activations are rounded to INT8: 0, 1 a scale a row, 2 a scale a group.
        scale: how scales are stored.
        peers: name and builder of each peer; the first decides the claim.
        ggml: type of ggml that is a peer too, where ggml-python is installed.
    """

    name: str
    levels: Array
    group: int
    int8: int
    scale: Any
    peers: Mapping[str, Peer]
    shapes: Sequence[tuple[int, int]] = SHAPES
    ggml: str = ""

    def operations(self, m: int, k: int, n: int) -> float:
        """Multiplications and additions of one run."""
        return 2.0 * m * k * n

    def model(self, k: int, n: int, rng: np.random.Generator) -> tuple[bytes, int]:
        """A model of one QuantMatMul, and the bytes that its weights take."""
        group = self.group or k
        scale = np.exp2(rng.integers(-8, -4, size=(n, -(-k // group)))).astype(np.float32)
        packed = pack_table(
            rng.choice(np.flatnonzero(np.isfinite(self.levels)).astype(np.uint8), size=(n, k)),
            self.levels,
            scale,
            group=group,
            scale_type=self.scale,
            int8_activations=self.int8,
        )
        stored = packed.inputs["codes"].nbytes + packed.inputs["scales"].nbytes
        model = _node_model("QuantMatMul", k, packed.inputs, packed.attributes)
        return model, stored


@dataclass(frozen=True)
class Rotation:
    """The fast Hadamard transform of the whole last axis, against the product with the matrix."""

    name: str = "hadamard"
    int8: bool = False
    peers: Mapping[str, Peer] = field(default_factory=lambda: {"ort MatMul fp32": fp32})
    shapes: Sequence[tuple[int, int]] = ((512, 512), (1536, 1536), (4096, 4096), (8192, 8192))
    ggml: str = ""

    def operations(self, m: int, k: int, n: int) -> float:
        """Additions of one run."""
        core, doublings = hadamard_factors(k)
        return float(m * n * (2 * core - 1 + doublings))

    def model(self, k: int, n: int, rng: np.random.Generator) -> tuple[bytes, int]:
        """A model of one Hadamard, and the bytes of its core."""
        core = hadamard_matrix(hadamard_factors(k)[0]).astype(np.float32)
        attributes = {"block": n, "scale": float(1 / np.sqrt(n))}
        return _node_model("Hadamard", k, {"core": core}, attributes), core.nbytes


def _node_model(
    op_name: str, k: int, constants: Mapping[str, Array], attributes: Mapping[str, int | float]
) -> bytes:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["M", k]))
    values = []
    for name, array in constants.items():
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=tensor.shape)
        value.type = ir.TensorType(tensor.dtype)
        values.append(value)
    node = custom_ops.make_node(op_name, [x, *values], attributes)
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=values, opset_imports={"": OPSET}
    )
    model = ir.Model(graph, ir_version=10)
    custom_ops.attach(model, op_name)
    proto: bytes = ir.to_proto(model).SerializeToString()
    return proto


# Peers ----------------------------------------------------------------------------------------


def _model(
    k: int, n: int, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Array]
) -> onnx.ModelProto:
    tensors = [nh.from_array(array, name) for name, array in constants.items()]
    return _tensor_model(k, n, nodes, tensors)


def _tensor_model(
    k: int, n: int, nodes: Sequence[onnx.NodeProto], tensors: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    graph = oh.make_graph(
        nodes,
        "peer",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", k])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["M", n])],
        tensors,
    )
    imports = [oh.make_opsetid("", OPSET), oh.make_opsetid("com.microsoft", 1)]
    return oh.make_model(graph, opset_imports=imports, ir_version=10)


def _scales(rng: np.random.Generator, *shape: int) -> Array:
    return rng.uniform(0.01, 0.02, size=shape).astype(np.float32)


def nbits(bits: int, group: int, level: int) -> Peer:
    """MatMulNBits; ``level`` 4 rounds activations to INT8, 1 keeps them in float."""

    def build(k: int, n: int, rng: np.random.Generator) -> onnx.ModelProto:
        blocks = -(-k // group)
        constants = {
            "b": rng.integers(0, 256, size=(n, blocks, group * bits // 8), dtype=np.uint8),
            "s": _scales(rng, n, blocks),
        }
        node = oh.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft",
            K=k, N=n, bits=bits, block_size=group, accuracy_level=level,
        )  # fmt: skip
        return _model(k, n, [node], constants)

    return build


def fp32(k: int, n: int, rng: np.random.Generator) -> onnx.ModelProto:
    """The float product."""
    weights = {"w": rng.standard_normal((k, n), dtype=np.float32)}
    return _model(k, n, [oh.make_node("MatMul", ["x", "w"], ["y"])], weights)


def call_alone(k: int) -> onnx.ModelProto:
    """What a call costs: one Relu of the activations."""
    graph = oh.make_graph(
        [oh.make_node("Relu", ["x"], ["y"])],
        "alone",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", k])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["M", k])],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", OPSET)], ir_version=10)


def _int8_weight(k: int, n: int, rng: np.random.Generator) -> dict[str, Array]:
    return {"w": rng.integers(-127, 128, size=(k, n), dtype=np.int8), "s": _scales(rng, n)}


def per_tensor(k: int, n: int, rng: np.random.Generator) -> onnx.ModelProto:
    """What onnxruntime fuses to DynamicQuantizeMatMul."""
    nodes = [
        oh.make_node("DynamicQuantizeLinear", ["x"], ["q", "xs", "z"]),
        oh.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        oh.make_node("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT),
        oh.make_node("Mul", ["xs", "s"], ["both"]),
        oh.make_node("Mul", ["f", "both"], ["y"]),
    ]
    return _model(k, n, nodes, _int8_weight(k, n, rng))


def per_token_unfused(k: int, n: int, rng: np.random.Generator) -> onnx.ModelProto:
    """INT8 with a scale a token in standard operators, which nothing fuses."""
    constants = {
        **_int8_weight(k, n, rng),
        "levels": np.array(127, np.float32),
        "axis": np.array([-1]),
    }
    nodes = [
        oh.make_node("Abs", ["x"], ["size"]),
        oh.make_node("ReduceMax", ["size", "axis"], ["top"], keepdims=1),
        oh.make_node("Div", ["top", "levels"], ["xs"]),
        oh.make_node("Div", ["x", "xs"], ["steps"]),
        oh.make_node("Round", ["steps"], ["whole"]),
        oh.make_node("Cast", ["whole"], ["q"], to=onnx.TensorProto.INT8),
        oh.make_node("MatMulInteger", ["q", "w"], ["i"]),
        oh.make_node("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT),
        oh.make_node("Mul", ["xs", "s"], ["both"]),
        oh.make_node("Mul", ["f", "both"], ["y"]),
    ]
    return _model(k, n, nodes, constants)


def fp8_dequantize(k: int, n: int, rng: np.random.Generator) -> onnx.ModelProto:
    """DequantizeLinear of an E4M3 weight before MatMul."""
    codes = rng.integers(0, 120, size=(k, n), dtype=np.uint8)
    weight = oh.make_tensor("w", onnx.TensorProto.FLOAT8E4M3FN, (k, n), codes.tobytes(), raw=True)
    nodes = [
        oh.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1),
        oh.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    return _tensor_model(k, n, nodes, [weight, nh.from_array(_scales(rng, n), "s")])


def bnb4(k: int, n: int, rng: np.random.Generator) -> onnx.ModelProto:
    """MatMulBnb4: NF4 in blocks of 64."""
    constants = {
        "b": rng.integers(0, 256, size=n * k // 2, dtype=np.uint8),
        "a": _scales(rng, n * k // 64),
    }
    node = oh.make_node(
        "MatMulBnb4", ["x", "b", "a"], ["y"], domain="com.microsoft",
        K=k, N=n, block_size=64, quant_type=1,
    )  # fmt: skip
    return _model(k, n, [node], constants)


def _levels(name: str) -> Array:
    fmt = parse_format(name)
    return np.asarray(fmt.decode(np.arange(1 << fmt.bits, dtype=np.uint8)), np.float32)


def variants() -> dict[str, Variant | Rotation]:
    """All cases by name."""
    int4, _ = integer_levels(4, signed=True)
    int8, _ = integer_levels(8, signed=True)
    e2m1 = _levels("fp4")
    float32: dict[str, Peer] = {"ort MatMul fp32": fp32}
    per_token: dict[str, Peer] = {
        "ort DynamicQuantizeMatMul": per_tensor, "ort unfused per token": per_token_unfused,
    }  # fmt: skip
    fp8: dict[str, Peer] = {**float32, "ort DequantizeLinear + MatMul": fp8_dequantize}
    made = [
        Variant(
            f"w4a8_g{g}",
            int4,
            g,
            True,
            "float16",
            {"ort MatMulNBits": nbits(4, g, 4), **float32},
            ggml="Q4_0" if g == 32 else "",
        )
        for g in (32, 128)
    ]
    made += [
        Variant(f"w4a8_g{g}_by_group", int4, g, 2, "float16", {"ort MatMulNBits": nbits(4, g, 4)})
        for g in (32, 128)
    ]
    made += [
        Variant(
            f"w4a8_g{g}_integer_scales", int4, g, True, "int16", {"ort MatMulNBits": nbits(4, g, 4)}
        )
        for g in (32, 128)
    ]
    made += [
        Variant("w4a32_g32", int4, 32, False, "float16", {"ort MatMulNBits": nbits(4, 32, 1)}),
        Variant("w8a8", int8, 0, True, "float32", {**per_token, **float32}),
        Variant("w8a8_g128", int8, 128, True, "float16", {"ort MatMulNBits": nbits(8, 128, 4)}),
        Variant("mxfp4a8", e2m1, 32, True, "e8m0", float32, ggml="MXFP4"),
        Variant("nvfp4a8", e2m1, 16, True, "e4m3", float32, ggml="NVFP4"),
        Variant("mxint8a8", int8, 32, True, "e8m0", float32, ggml="MXFP4"),
        Variant("nf4_g64", _levels("nf4"), 64, False, "float16", {"ort MatMulBnb4": bnb4}),
        Variant("fp8", _levels("fp8e4m3"), 0, False, "float32", fp8),
        Variant("mxfp8", _levels("fp8e4m3"), 32, False, "e8m0", float32),
    ]
    return {variant.name: variant for variant in [*made, Rotation()]}


# Measuring ------------------------------------------------------------------------------------


def open_session(model: bytes, threads: int) -> Any:
    """A session whose threads do not spin while another one runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    library = usable_library()
    if library is None:
        raise SystemExit("no kernels to measure: `onnxq doctor` says why")
    options.register_custom_ops_library(str(library.path))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def times(runs: Mapping[str, Callable[[], object]], threads: int, quick: bool) -> dict[str, float]:
    """Seconds of each run, in turn: the 25th percentile, or the least with several threads.

    Where other processes have taken a core, one thread does the work of two. A run of more than
    SLOW_SECONDS is measured once.
    """
    first = {name: busy_seconds(run) for name, run in runs.items()}
    slow = {name: seconds for name, seconds in first.items() if seconds > SLOW_SECONDS}
    runs = {name: run for name, run in runs.items() if name not in slow}
    once = sum(map(busy_seconds, runs.values()))
    rounds = MIN_ROUNDS if quick else int(min(max(SECONDS / once, MIN_ROUNDS), MAX_ROUNDS))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            taken[name].append(busy_seconds(runs[name]))
    percentile = PERCENTILE if threads == 1 else 0
    return slow | {name: float(np.percentile(v, percentile)) for name, v in taken.items()}


def busy_seconds(run: Callable[[], object]) -> float:
    """Processor time of the thread of this process that works longest on ``run``.

    On an idle machine that is the time on the clock, once all threads are awake.
    """
    began = _thread_seconds()
    run()
    return max(now - began.get(thread, 0) for thread, now in _thread_seconds().items())


def _thread_seconds() -> dict[int, float]:
    """Processor time of each thread, by Linux's clocks (``CPUCLOCK_SCHED``, per thread)."""
    found = {}
    for entry in os.scandir("/proc/self/task"):
        thread = int(entry.name)
        with suppress(OSError):  # it has ended
            found[thread] = time.clock_gettime((~thread << 3) | 6)
    return found


def compare(
    variant: Variant | Rotation,
    shape: tuple[int, int],
    rows: Sequence[int],
    threads: int,
    quick: bool,
) -> Iterator[dict[str, Any]]:
    """Rows of one case and shape, one for each peer and M."""
    k, n = shape
    rng = np.random.default_rng(0)
    model, stored = variant.model(k, n, rng)
    sessions = {"ours": open_session(model, threads)}
    for name, build in variant.peers.items():
        sessions[name] = open_session(build(k, n, rng).SerializeToString(), threads)
    weight = None
    if variant.ggml and _ggml.module() is not None:
        weight = _ggml.Weight(variant.ggml, k, n, threads)
    compute = _limits.operations_per_second(bool(variant.int8)) * threads
    alone = open_session(call_alone(k).SerializeToString(), threads)
    read = {READ: _limits.reader(stored)} if threads == 1 else {}
    for m in rows:
        x = rng.standard_normal((m, k), dtype=np.float32)
        runs = {name: _run(session, x) for name, session in sessions.items()}
        if weight is not None:
            runs[f"ggml {variant.ggml}{' repacked' * weight.repacked}"] = weight.product(x)
        runs[CALL] = _run(alone, x)
        taken = times({**runs, **(read if m <= FEW_ROWS else {})}, threads, quick)
        ours, call, reading = taken.pop("ours"), taken.pop(CALL), taken.pop(READ, None)
        rate = variant.operations(m, k, n) / ours
        for name, other in taken.items():
            yield {
                "case": variant.name,
                "M": m,
                "K": k,
                "N": n,
                "threads": threads,
                "ours": ours * 1e6,
                "peer": other * 1e6,
                "peer_name": name,
                "ratio": other / ours,
                "unit": "us",
                "better": "lower",
                "gops": rate / 1e9,
                "gb_s": stored / ours / 1e9,
                "compute_share": rate / compute,
                "compute_limit_gops": compute / 1e9,
                "call_us": call * 1e6,
                "read_share": None if reading is None else reading / ours,
                "kernel_read_share": None if reading is None else _over(reading, ours - call),
                "read_limit_gb_s": None if reading is None else stored / reading / 1e9,
            }


def _over(seconds: float, other: float) -> float | None:
    """Their ratio, where the other is more than noise."""
    return seconds / other if other > 0 else None


def _run(session: Any, x: Array) -> Callable[[], object]:
    return lambda: session.run(None, {"x": x})


COLUMNS = (
    ("case", "{}"), ("M", "{}"), ("K", "{}"), ("N", "{}"), ("threads", "{}"), ("ours", "{:.0f}"),
    ("peer", "{:.0f}"), ("peer_name", "{}"), ("ratio", "{:.2f}"), ("gops", "{:.0f}"),
    ("call_us", "{:.0f}"), ("gb_s", "{:.1f}"), ("compute_share", "{:.0%}"),
    ("read_share", "{:.0%}"), ("kernel_read_share", "{:.0%}"),
)  # fmt: skip


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """The table, and the geometric mean and the least ratio of each comparison."""
    print(" | ".join(name for name, _ in COLUMNS))
    for row in found:
        print(" | ".join("-" if row[c] is None else form.format(row[c]) for c, form in COLUMNS))
    print("\ncase | peer | M | threads | geometric mean | least")
    keys = ("case", "peer_name", "M", "threads")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in found):
        ratios = np.array([r["ratio"] for r in found if tuple(r[k] for k in keys) == key])
        mean = float(np.exp(np.log(ratios).mean()))
        print(" | ".join(map(str, key)), f"| {mean:.2f} | {ratios.min():.2f}")
    more = scaling(found)
    if more:
        print("\ncase | M | threads | times one thread, geometric mean | least")
        for key in dict.fromkeys((row["case"], row["M"], row["threads"]) for row in more):
            ratios = np.array(
                [r["ratio"] for r in more if (r["case"], r["M"], r["threads"]) == key]
            )
            mean = float(np.exp(np.log(ratios).mean()))
            print(" | ".join(map(str, key)), f"| {mean:.2f} | {ratios.min():.2f}")


def scaling(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our time with one thread beside that with more, a row for each shape and M."""
    ours = {(r["case"], r["M"], r["K"], r["N"], r["threads"]): r["ours"] for r in found}
    rows = []
    for (case, m, k, n, threads), time_taken in ours.items():
        alone = ours.get((case, m, k, n, 1))
        if threads == 1 or alone is None:
            continue
        rows.append(
            {
                "case": case,
                "M": m,
                "K": k,
                "N": n,
                "threads": threads,
                "ours": time_taken,
                "peer": alone,
                "peer_name": "ours, one thread",
                "ratio": alone / time_taken,
                "unit": "us",
                "better": "lower",
            }
        )
    return rows


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Ratios to each case's first peer, a bar for each M; geometric means over the shapes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = {name: next(iter(variant.peers)) for name, variant in variants().items()}
    rows = [row for row in found if row["peer_name"] == first[row["case"]]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    sizes = sorted({row["M"] for row in rows})
    figure, axes = plt.subplots(figsize=(9, 4))
    for place, m in enumerate(sizes):
        means = [
            np.exp(np.mean([np.log(r["ratio"]) for r in rows if (r["case"], r["M"]) == (c, m)]))
            for c in cases
        ]
        axes.bar(np.arange(len(cases)) + 0.8 * place / len(sizes), means, 0.8 / len(sizes), label=m)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(np.arange(len(cases)) + 0.3, [f"{c}\n{first[c]}" for c in cases], fontsize=6)
    axes.set_ylabel("times as fast")
    axes.legend(title="rows M")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    known = variants()
    parser = _common.parser(__doc__ or "")
    parser.add_argument("--cases", default=",".join(known), help="names, separated by commas")
    parser.add_argument("--threads", default="1,2", help="for example 1 or 1,2")
    parser.add_argument("--rows", default="", help="M, separated by commas")
    parser.add_argument("--plot", type=Path, help="write a plot of the ratios")
    arguments = parser.parse_args()
    unknown = set(arguments.cases.split(",")) - set(known)
    if unknown:
        raise SpecError("SPEC-CASE", f"no case {unknown.pop()}", f"one of {', '.join(known)}")
    rows = [int(m) for m in arguments.rows.split(",")] if arguments.rows else list(ROWS)
    if arguments.quick:
        rows = rows[:2]
    found = []
    if not arguments.json:
        print(_common.machine())
    for name in arguments.cases.split(","):
        for threads in map(int, arguments.threads.split(",")):
            for shape in known[name].shapes[: 1 if arguments.quick else None]:
                for row in compare(known[name], shape, rows, threads, arguments.quick):
                    found.append(row)
                    if arguments.json:
                        _common.emit([row])
    if arguments.json:
        _common.emit(scaling(found))
    else:
        show(found)
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
