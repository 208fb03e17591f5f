"""Claim: integer GELU, LayerNorm and softmax are faster than float ones; what models cost.

    python benchmarks/integer_only.py                       the operators
    python benchmarks/integer_only.py --models FP32 W8A8 INTEGER   and whole models, one thread
    python benchmarks/integer_only.py --json                one object a line

Shapes are those of MiniLM at 128 tokens. Ours and ONNX Runtime's run in turn in one process with
one thread, and a time is the thread's processor time, the 25th percentile over the rounds. The
integer operators read int32 sums (int16 sums for LayerNorm) and write 8 bits (16), with bias and
rescaling; the float ones read and write float32, without. `ratio` is the peer's time divided by
ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _common
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir

from onnxq import custom_ops
from onnxq.runtime import session
from onnxq.solvers.integer_only import dyadic, erf_constants, exp_constants

ROUNDS = 200
PERCENTILE = 25

Arrays = dict[str, np.ndarray]


def own(op_name: str, inputs: Arrays, constants: Arrays, attributes: dict[str, int]) -> Any:
    """A session of one of our operators, and what runs it."""
    operator = custom_ops.get(op_name)
    values = []
    for name in operator.inputs:
        array = {**inputs, **constants}[name]
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        if name in constants:
            value.const_value = ir.tensor(array, name=name)
            value.shape = ir.Shape(array.shape)
        values.append(value)
    node = custom_ops.make_node(op_name, values, attributes)
    (output,) = operator.reference(**inputs, **constants, **attributes)
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(output.dtype))
    fed = [v for v in values if v.const_value is None]
    kept = [v for v in values if v.const_value is not None]
    graph = ir.Graph(
        fed, node.outputs, nodes=[node], initializers=kept, opset_imports={"": 21}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    custom_ops.attach(model, op_name)
    made = session(ir.to_proto(model).SerializeToString(), threads=1, library=True)
    return lambda: made.run(None, inputs)


def floats(op_type: str, x: np.ndarray, constants: Arrays) -> Callable[[], Any]:
    """The same function in ONNX Runtime's float32."""
    node = oh.make_node(op_type, ["x", *constants], ["y"])
    graph = oh.make_graph(
        [node],
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, x.shape)],
        [nh.from_array(array, name) for name, array in constants.items()],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    made = session(model.SerializeToString(), threads=1, library=False)
    return lambda: made.run(None, {"x": x})


def cases() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, ours, theirs."""
    rng = np.random.default_rng(0)
    scores = rng.integers(-9000, 9000, size=(1, 12, 128, 128)).astype(np.int32)
    mask = np.zeros((1, 1, 1, 128), np.int32)
    softmax = {**exp_constants(1e-3).attributes(), "bits": 8, "rounding": 1}
    yield (
        "softmax 12x128x128",
        own("IntegerSoftmax", {"x": scores, "mask": mask}, {}, softmax),
        floats("Softmax", scores.astype(np.float32) * 1e-3, {}),
    )
    for width in (384, 1536):
        sums = rng.integers(-50_000, 50_000, size=(1, 128, width)).astype(np.int32)
        multiplier, shift = dyadic(np.full(width, 0.4))
        columns = {"bias": np.zeros(width, np.int32), "multiplier": multiplier, "shift": shift}
        erf = erf_constants(2.4e-4 / 1.4142)
        factor, places = dyadic(2.4e-4 * erf.scale / 2 / 0.03)
        attributes = {**erf.attributes(), "one": erf.one, "low": 0, "high": 255}
        attributes |= {"out_multiplier": int(factor), "out_shift": int(places)}
        zero = {"zero_point": np.array(6, np.uint8)}
        yield (
            f"gelu 128x{width}",
            own("IntegerGelu", {"x": sums}, {**columns, **zero}, attributes),
            floats("Gelu", sums.astype(np.float32) * 1e-4, {}),
        )
    rows = rng.integers(-9000, 9000, size=(1, 128, 384)).astype(np.int16)
    norm = {
        "multiplier": np.full(384, 1 << 29, np.int32),
        "beta": np.zeros(384, np.int64),
    }
    limits = {"shift": 0, "epsilon": 0, "out_shift": 44, "low": -32767, "high": 32767}
    ones = {"g": np.ones(384, np.float32), "b": np.zeros(384, np.float32)}
    yield (
        "layernorm 128x384",
        own("IntegerLayerNorm", {"x": rows}, norm, limits),
        floats("LayerNormalization", rows.astype(np.float32), ones),
    )


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.thread_time()
            run()
            times[name].append(time.thread_time() - began)
    return {name: float(np.percentile(t, PERCENTILE)) * 1e3 for name, t in times.items()}


def main() -> None:
    """Measure and print."""
    parser = _common.parser(__doc__)
    parser.add_argument("--models", nargs=3, type=Path, metavar=("FP32", "W8A8", "INTEGER"))
    options = parser.parse_args()
    rounds = 5 if options.quick else ROUNDS
    rows: list[dict[str, Any]] = []
    for case, ours, theirs in cases():
        times = measure({"ours": ours, "ort": theirs}, rounds)
        rows.append(_row(case, times["ours"], times["ort"], "ort float32"))
    if options.models:
        names = ("fp32", "w8a8", "ours")
        feeds = {
            "input_ids": np.random.default_rng(1).integers(1000, 20_000, size=(1, 128)),
            "attention_mask": np.ones((1, 128), np.int64),
            "token_type_ids": np.zeros((1, 128), np.int64),
        }
        made = [session(path, threads=1, library=True) for path in options.models]
        runs = {name: lambda s=s: s.run(None, feeds) for name, s in zip(names, made, strict=True)}
        times = measure(runs, max(5, rounds // 8))
        rows += [_row("model 1x128", times["ours"], times[peer], peer) for peer in names[:2]]
    if options.json:
        _common.emit(rows)
        return
    for row in rows:
        figures = f"{row['ours']:8.3f} ms {row['peer']:8.3f} ms {row['ratio']:6.2f}x"
        print(f"{row['case']:22}{figures}  {row['peer_name']}")


def _row(case: str, ours: float, peer: float, name: str) -> dict[str, Any]:
    return {
        "case": case, "ours": ours, "peer": peer, "peer_name": name,
        "ratio": peer / ours, "unit": "ms",
    }  # fmt: skip


if __name__ == "__main__":
    main()
