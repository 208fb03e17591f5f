"""Graphs as text, and onnxruntime as the judge of what a match claims.

A match says that one value is a known function of others. These helpers run the graph with
every optimisation off, read the values that the match names, and compute the function again from
the published formula, so a match that named the wrong value, axis or constant would fail.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.graph.edit import set_bias, set_weight
from onnxq.graph.match import Activation, Linear, Norm, Structure, ValueToOutput, analyze

Array = npt.NDArray[Any]

#: float32 sums of at most a few thousand terms, in another order.
RTOL, ATOL = 2e-4, 2e-5


def model_from(body: str, *, opset: int = 21, ir_version: int = 10, extra: str = "") -> ir.Model:
    """The model whose graph is ``body`` in ONNX text."""
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(head + body + extra))


def expanded(body: str, op_type: str, opset: int = 24) -> ir.Model:
    """``body`` with ``op_type`` replaced by the function that the ONNX standard defines for it."""
    text = f'<ir_version: 11, opset_import: ["" : {opset}]>\n{body}'
    proto = onnx.inliner.inline_selected_functions(
        onnx.parser.parse_model(text), [("", op_type)], exclude=False, inline_schema_functions=True
    )
    return ir.from_proto(proto)


def structure_of(body: str, *, opset: int = 21, ir_version: int = 10) -> Structure:
    """What :func:`onnxq.graph.match.analyze` finds in ``body``."""
    return analyze(model_from(body, opset=opset, ir_version=ir_version))


def reasons(structure: Structure, what: str) -> list[str]:
    """The reasons of the near misses of one kind."""
    return [r.reason for r in structure.rejected if r.what == what]


def run(model: ir.Model, feeds: Mapping[str, Array], names: list[str]) -> dict[str, Array]:
    """The values ``names`` of ``model``, by onnxruntime without optimisations."""
    proto = ir.to_proto(model)
    outputs = {o.name for o in proto.graph.output}
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in outputs
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    given = {i.name for i in session.get_inputs()}
    wanted = list(dict.fromkeys(names))
    results = session.run(wanted, {k: v for k, v in feeds.items() if k in given})
    return dict(zip(wanted, results, strict=True))


def name_of(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name
    return value.name


_ERF = np.vectorize(math.erf)
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: x * 0.5 * (1 + _ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.minimum(np.maximum(x, 0), 6),
    "hard_swish": lambda x: x * np.minimum(np.maximum(x + 3, 0), 6) / 6,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def expected_linear(linear: Linear, x: Array) -> Array:
    """``alpha * x . W + b`` of a MatMul or Gemm in float64, from what the match names."""
    w = linear.w.astype(np.float64)
    w = w if linear.in_axis == 0 else w.T
    y = linear.alpha * (x.astype(np.float64) @ w)
    return y if linear.b is None else y + linear.b


def expected_norm(norm: Norm, x: Array) -> Array:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) in float64."""
    x = x.astype(np.float64)
    if norm.kind == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + norm.epsilon) * norm.g
    return y if norm.b is None else y + norm.b


def check_against_runtime(
    model: ir.Model, structure: Structure, feeds: Mapping[str, Array]
) -> None:
    """Compute the output of each linear layer (no Conv), norm and activation from its input."""
    matched: list[Linear | Norm | Activation] = [
        *(linear for linear in structure.linears if linear.kind != "conv"),
        *(norm for norm in structure.norms if norm.skip is None),
        *(a for a in structure.activations if a.kind in FUNCTIONS),
    ]
    names = [name_of(v) for match in matched for v in (match.x, match.output)]
    values = run(model, feeds, names)
    for match in matched:
        x, got = values[name_of(match.x)], values[name_of(match.output)]
        if isinstance(match, Linear):
            want = expected_linear(match, x)
        elif isinstance(match, Norm):
            want = expected_norm(match, x)
        else:
            want = FUNCTIONS[match.kind](x.astype(np.float64))
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got / scale, want / scale, RTOL, ATOL, err_msg=match.name)


def assert_scaling_changes_nothing(
    model: ir.Model, way: ValueToOutput, feeds: dict[str, np.ndarray]
) -> None:
    """Scale v's channels down and o's inputs up along the map; the output must stay."""
    feeds = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in feeds.items()}
    names = [name_of(v) for v in model.graph.outputs]
    before = run(model, feeds, names)
    scale = np.random.default_rng(1).uniform(0.5, 2.0, way.value.out_features).astype(np.float32)
    arriving = scale[list(way.channel_map)]
    value, output = way.value, way.output
    bias = value.b
    set_weight(value, value.w / np.expand_dims(scale, value.in_axis))
    if bias is not None:
        set_bias(value, bias / scale)
    inner = run(model, feeds, names)
    set_weight(output, output.w * np.expand_dims(arriving, output.out_axis))
    after = run(model, feeds, names)
    name = names[0]
    size = float(np.abs(before[name]).max())
    assert not np.allclose(inner[name] / size, before[name] / size, atol=1e-3), "v has an effect"
    np.testing.assert_allclose(after[name] / size, before[name] / size, RTOL, ATOL)


def shared(*parts: str) -> Path:
    """A file or folder of the shared models and data; skips the test where it is absent."""
    root = os.environ.get("ONNXQ_SHARED")
    base = Path(root) if root else Path(__file__).resolve().parents[2].parent / "shared"
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {'/'.join(parts)}: set ONNXQ_SHARED to the shared folder")
    return path
