"""What a matrix product costs on this machine at each precision: measured, not modelled.

Each shape is run by onnxruntime with all optimisations, in the form in which `qdq` writes it, the
precisions in turn, on one thread; the cost is the median processor time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from onnxq.errors import DataError

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

Level = Literal["int8", "int16", "float"]

ROUNDS: Final = 9
_OPSET: Final = 21
_IR_VERSION: Final = 10


class KernelCosts:
    """Seconds of ``[rows, K] x [K, N]`` by precision; measured once a shape.

    Args:
        rows: tokens.
        path: a file that keeps what was measured, so that a later run decides the same; empty for
            none.

    Raises:
        DataError: ``DATA-COSTS``: the file holds something else, or costs for other rows.
    """

    def __init__(self, rows: int, path: str = "") -> None:
        self._rows, self._path = rows, Path(path) if path else None
        self._known: dict[str, dict[str, float]] = {}
        if self._path is not None and self._path.exists():
            self._known = self._read(self._path)

    def of(self, k: int, n: int, levels: Sequence[Level]) -> Mapping[str, float]:
        """Seconds for each of ``levels``."""
        key = f"{k}x{n}"
        if not set(levels) <= set(self._known.get(key, {})):
            self._known[key] = measure(self._rows, k, n, levels)
            self._write()
        return self._known[key]

    def _read(self, path: Path) -> dict[str, dict[str, float]]:
        try:
            raw = json.loads(path.read_text())
            rows, costs = raw["rows"], {str(k): dict(v) for k, v in raw["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                "DATA-COSTS", f"{path} holds no costs of kernels", "give another file"
            ) from error
        if rows != self._rows:
            raise DataError(
                "DATA-COSTS",
                f"{path} holds costs for {rows} rows, not {self._rows}",
                f"set rows={rows}, or give another file",
            )
        return costs

    def _write(self) -> None:
        if self._path is not None:
            text = json.dumps({"rows": self._rows, "seconds": self._known}, indent=1)
            self._path.write_text(text)


def measure(rows: int, k: int, n: int, levels: Sequence[Level]) -> dict[str, float]:
    """Median seconds of one product at each level, run in turn."""
    x = {"x": np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32)}
    sessions = {level: _session(_model(k, n, level)) for level in levels}
    times: dict[str, list[float]] = {level: [] for level in levels}
    for _ in range(ROUNDS + 1):
        for level, session in sessions.items():
            began = time.thread_time()
            session.run(None, x)
            times[level].append(time.thread_time() - began)
    return {level: statistics.median(found[1:]) for level, found in times.items()}


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _model(k: int, n: int, level: Level) -> onnx.ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    arrays: dict[str, np.ndarray] = {"w": rng.standard_normal((k, n)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if level != "float":
        wide = np.uint8 if level == "int8" else np.uint16
        middle = np.iinfo(wide).max // 2 + 1
        arrays = {
            "codes": rng.integers(-127, 128, (k, n)).astype(np.int8),
            "scales": np.full(n, 0.01, np.float32),
            "scale": np.array(8.0 / middle, np.float32),
            "zero": np.array(middle, wide),
        }
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"]),
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
            helper.make_node("MatMul", ["a", "w"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        level,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
