"""Small graphs as text, passes run on them, and onnxruntime as the judge.

``run`` executes a model exactly as it is written, with every optimisation off; ``fused_ops`` says
which kernels onnxruntime's own optimizer makes of it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.calibration.data import open_data
from onnxq.graph.edit import validate
from onnxq.passes.contract import Pass, PassReport
from onnxq.passes.targets import Target
from onnxq.pipeline.runner import Pipeline, RunResult

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

SAME = 1e-5
"""Relative error of a rewrite that keeps the function: float32 sums in another order."""


def model_of(
    body: str,
    weights: Mapping[str, Array] | None = None,
    *,
    opset: int = 13,
    ir_version: int = 8,
) -> ir.Model:
    """The model whose graph is ``body`` in ONNX text, with ``weights`` as initializers."""
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(head + body)
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def fixed(model: ir.Model, size: int = 1) -> ir.Model:
    """A copy in which every free dimension of the inputs is ``size``."""
    copy = model.clone()
    for value in copy.graph.inputs:
        dims = value.shape or ()
        value.shape = ir.Shape([d if isinstance(d, int) else size for d in dims])
    return copy


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Gaussian float32 numbers."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def apply(
    model: ir.Model,
    *passes: Pass,
    samples: Sequence[Feeds] | None = None,
    target: str | Target = "cpu",
) -> RunResult:
    """Run ``passes`` on a copy of ``model``; the result is valid IR that onnx.checker accepts."""
    data = None if samples is None else open_data(list(samples), model)
    result = Pipeline(passes).run(model, data=data, holdout=data, target=target, verify=False)
    validate(result.model)
    return result


def report_of(result: RunResult, name: str) -> PassReport:
    """What the last pass called ``name`` did."""
    return next(step.report for step in reversed(result.reports) if step.name == name)


def reasons(report: PassReport) -> str:
    """All reasons of a report in one text."""
    return "\n".join(f"{skip.site}: {skip.reason}" for skip in report.skipped)


def _session(proto: onnx.ModelProto, level: Any, save: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if save:
        options.optimized_model_filepath = save
    return ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])


def run(model: ir.Model, feeds: Mapping[str, Array], *, optimised: bool = False) -> dict[str, Any]:
    """All outputs by name."""
    level = ort.GraphOptimizationLevel
    session = _session(
        ir.to_proto(model), level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def values(model: ir.Model, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Inner values by name, with every optimisation off."""
    proto = ir.to_proto(model)
    known = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    session = _session(proto, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


def assert_same_function(
    before: ir.Model, after: ir.Model, samples: Sequence[Feeds], tolerance: float = SAME
) -> None:
    """Every output of every sample is the same up to ``tolerance`` of its size."""
    for feeds in samples:
        old, new = run(before, feeds), run(after, feeds)
        assert list(old) == list(new)
        for name, array in old.items():
            assert relative_error(array, new[name]) <= tolerance, name


def relative_error(exact: Array, other: Array) -> float:
    """``|exact - other| / |exact|`` in float64 over the elements that are finite in ``exact``."""
    assert exact.shape == other.shape
    a, b = exact.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    np.testing.assert_array_equal(a[~finite], b[~finite])
    norm = float(np.linalg.norm(a[finite]))
    return float(np.linalg.norm(a[finite] - b[finite])) / (norm or 1.0)


def cosine(a: Array, b: Array) -> float:
    """Cosine of the flattened arrays in float64."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def ops(model: ir.Model) -> Counter[str]:
    """How many nodes of each type there are, subgraphs included."""
    return Counter(node.op_type for node in model.graph.all_nodes())


def fused_ops(model: ir.Model, folder: Path) -> Counter[str]:
    """How many nodes of each type are left after onnxruntime's optimizer."""
    path = folder / "optimised.onnx"
    _session(ir.to_proto(model), ort.GraphOptimizationLevel.ORT_ENABLE_ALL, str(path))
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def const(model: ir.Model, name: str) -> Array:
    """The initializer called ``name``."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def shared(*parts: str) -> Path:
    """A file or folder of the shared models and data; skips the test where it is absent."""
    default = Path(__file__).resolve().parents[2].parent / "shared"
    path = Path(os.environ.get("ONNXQ_SHARED", default)).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {'/'.join(parts)}: set ONNXQ_SHARED to the shared folder")
    return path


def shared_models() -> list[str]:
    """The real models below the shared folder, by path; empty where there is none."""
    default = Path(__file__).resolve().parents[2].parent / "shared"
    folder = Path(os.environ.get("ONNXQ_SHARED", default)) / "models"
    return sorted(str(path.relative_to(folder)) for path in folder.glob("**/*.onnx"))


def light_models() -> list[str]:
    """The graphs of well-known CNNs inside the onnx wheel, by name."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return sorted(str(path) for path in folder.glob("*.onnx"))


_SIZES = {"input": 512, "state": 1, "h": 1, "c": 1}
"""Lengths of free dimensions that the odd models need, by input."""


def made_up_feeds(model: ir.Model, count: int = 3) -> list[Feeds]:
    """Random inputs that the shared models accept."""
    rng = np.random.default_rng(0)
    return [{v.name or "": _made_up(v, rng) for v in _open_inputs(model)} for _ in range(count)]


def _open_inputs(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.inputs if v.name not in model.graph.initializers]


def _made_up(value: ir.Value, rng: np.random.Generator) -> Array:
    name, dims = value.name or "", list(value.shape or [])
    first_is_batch = len(dims) > 1
    shape = [
        dim if isinstance(dim, int) else 1 if i == 0 and first_is_batch else _SIZES.get(name, 16)
        for i, dim in enumerate(dims)
    ]
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    if name == "sr":
        return np.full(shape, 16000, dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if "len" in name:
        return np.full(shape, 16, dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 2 if "type" in name else 20, shape).astype(dtype)
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    return (0.3 * rng.standard_normal(shape)).astype(dtype)
