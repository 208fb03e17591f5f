"""Every kernel of ops.def against the operator's body and its numpy reference, bit for bit.

The body runs in onnx's ReferenceEvaluator and in ONNX Runtime without our library; neither is code
of this project.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxq import custom_ops
from onnxq.runtime import Library, require_onnxruntime, session
from tests.custom_ops.cases import CASES, Array, Inputs, same_bits, single_node_model

ROWS = [(kernel.op, kernel.dtype) for kernel in custom_ops.kernels() if kernel.provider == "CPU"]
IDS = [f"{op}-{dtype}" for op, dtype in ROWS]


def run_kernel(
    model: bytes, inputs: Inputs, isa: str, monkeypatch: pytest.MonkeyPatch, threads: int = 1
) -> list[Array]:
    monkeypatch.setenv("ONNXQ_ISA", isa)
    return list(session(model, threads=threads, library=True).run(None, inputs))


def assert_same(op: str, got: list[Array], expected: tuple[Array, ...], what: str) -> None:
    for name, left, right in zip(custom_ops.get(op).outputs, got, expected, strict=True):
        assert same_bits(left, right), f"{what}: {name}: {left.shape} {left} != {right}"


@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=IDS)
def test_body_in_the_reference_evaluator(op: str, dtype: str) -> None:
    evaluator = ReferenceEvaluator(onnx.load_from_string(single_node_model(op, dtype)))
    for name, inputs in CASES[op](dtype):
        with np.errstate(all="ignore"):
            got = evaluator.run(None, inputs)
        assert_same(op, got, custom_ops.get(op).reference(**inputs), name)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=IDS)
def test_body_in_onnxruntime(op: str, dtype: str, optimize: bool) -> None:
    model = single_node_model(op, dtype)
    body = session(model, threads=1, optimize=optimize, library=False)
    for name, inputs in CASES[op](dtype):
        assert_same(op, body.run(None, inputs), custom_ops.get(op).reference(**inputs), name)


@pytest.mark.parametrize("opset", range(18, 26))
@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=IDS)
def test_body_in_every_opset(op: str, dtype: str, opset: int) -> None:
    body = session(single_node_model(op, dtype, opset=opset), threads=1, library=False)
    cases = dict(CASES[op](dtype))
    for name in ("edges", "normal (5, 0)", "normal (0, 4)"):
        got = body.run(None, cases[name])
        assert_same(op, got, custom_ops.get(op).reference(**cases[name]), name)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512bw"])
@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=IDS)
def test_kernel(
    op: str, dtype: str, isa: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in library.isa_levels:
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("ONNXQ_ISA", isa)
    kernel = session(single_node_model(op, dtype), threads=1, library=True)
    for name, inputs in CASES[op](dtype):
        assert_same(op, kernel.run(None, inputs), custom_ops.get(op).reference(**inputs), name)


@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=IDS)
def test_kernel_with_two_threads(
    op: str, dtype: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = dict(CASES[op](dtype))["large"]
    got = run_kernel(
        single_node_model(op, dtype), inputs, library.isa_levels[-1], monkeypatch, threads=2
    )
    assert_same(op, got, custom_ops.get(op).reference(**inputs), "large")


@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=IDS)
@pytest.mark.parametrize("kernels", [True, False])
def test_which_form_runs(
    op: str, dtype: str, kernels: bool, library: Library, tmp_path: Path
) -> None:
    """With the library one node of ours runs; without it, only standard nodes do."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    if kernels:
        options.register_custom_ops_library(str(library.path))
    profiled = ort.InferenceSession(
        single_node_model(op, dtype), options, providers=["CPUExecutionProvider"]
    )
    profiled.run(None, dict(CASES[op](dtype))["large"])
    events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
    ran = {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    assert (ran == {op}) if kernels else (op not in ran and len(ran) > 1)


def test_per_token_agrees_with_quantize_linear() -> None:
    """ONNX Runtime's own QuantizeLinear, given our scales, differs only where x/scale is a tie."""
    x = np.random.default_rng(3).normal(size=(50, 400)).astype(np.float32)
    q, scale = custom_ops.get("DynamicQuantizePerToken").reference(x)
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[M,K] x, float[M] s, int8[M] z) => (int8[M,K] y) {
            y = QuantizeLinear <axis = 0> (x, s, z)
        }""")
    theirs = session(model.SerializeToString(), threads=1, library=False).run(
        None, {"x": x, "s": scale[:, 0], "z": np.zeros(50, np.int8)}
    )[0]
    assert np.abs(theirs.astype(int) - q).max() <= 1
    assert np.count_nonzero(theirs != q) <= 2
    assert np.abs(q).max(axis=1).tolist() == [127] * 50


def test_per_token_error_bound() -> None:
    x = np.random.default_rng(4).standard_cauchy(size=(40, 333)).astype(np.float32)
    q, scale = custom_ops.get("DynamicQuantizePerToken").reference(x)
    error = np.abs(x.astype(np.float64) - scale.astype(np.float64) * q)
    assert (error <= 0.5001 * scale).all()
