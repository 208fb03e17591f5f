"""Which kernel runs each node: against ONNX Runtime's own account of the session."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxq.runtime import model_kernels, require_onnxruntime
from onnxq.runtime.library import library_problem, shipped_path
from tests.passes import helpers as h

K, N = 64, 48
MODEL = f"""g (float[B,{K}] x) => (float[B,{N}] y) {{
    a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, v)  y = Softmax(c) }}"""


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """One layer packed, one in float."""
    from onnxq.graph.io import save
    from onnxq.passes.decide.assign import Assign
    from onnxq.passes.decide.partial import Partial
    from onnxq.passes.lower.pack import Pack

    weights = {"w": h.normal(K, N, seed=1), "v": h.normal(N, N, seed=2)}
    model = h.model_of(MODEL, weights, opset=21)
    done = h.apply(
        model,
        Assign(mode="weight-only", weights="int4", block=32),
        Partial(layers=("c",)),
        Pack(),
    ).model
    path = tmp_path / "packed.onnx"
    save(done, path)
    return path


def test_our_kernels_and_theirs(packed: Path) -> None:
    if library_problem() is not None:
        pytest.skip("no kernels")
    found = model_kernels(packed)
    assert found.why_bodies is None
    by_op = {node.op: node for node in found.nodes}
    ours = by_op["com.onnxq:QuantMatMul"]
    assert ours.by == "onnxq"
    assert ours.detail.endswith("bits 4, group 32, K 64, int8 activations")
    assert by_op["MatMul"].by == by_op["Softmax"].by == "onnxruntime"
    # ONNX Runtime says the same of the nodes it was given before it fused any.
    options = require_onnxruntime().SessionOptions()
    options.register_custom_ops_library(str(shipped_path()))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    made = require_onnxruntime().InferenceSession(str(packed), options)
    theirs = {
        node.op_type
        for part in made.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }
    assert "QuantMatMul" in theirs


def test_bodies_are_told_apart(packed: Path) -> None:
    found = model_kernels(packed, library=False)
    assert found.why_bodies == "asked for"
    bodies = {node.detail for node in found.nodes if node.by == "body"}
    assert "of QuantMatMul" in bodies
    assert not [node for node in found.nodes if node.by == "onnxq"]
    assert sum(found.counts().values()) == len(found.nodes)
