"""Every kernel of ops.def against the operator's body and its numpy reference.

Kernels give the reference's bits on every instruction set; bodies too, or they stay within the
error budget that the operator names.

The body runs in onnx's ReferenceEvaluator and in ONNX Runtime without our library; neither is code
of this project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxq import custom_ops
from onnxq.runtime import Library, require_onnxruntime, session
from tests.custom_ops.cases import CASES, Case, agrees, model_of

ROWS = [(kernel.op, kernel.dtype) for kernel in custom_ops.kernels() if kernel.provider == "CPU"]
# Those that no CPU kernel is of: the body's own operators have some.
BODIES = [*ROWS, ("DynamicFloat8MatMul", "float32"), ("DynamicFloat8MatMul", "float16")]
BODY_IDS = [f"{op}-{dtype}" for op, dtype in BODIES]
IDS = [f"{op}-{dtype}" for op, dtype in ROWS]


class Runner:
    """Runs cases; those that differ only in what is fed share a session.

    Args:
        op: operator name.
        opset: of the model.
        options: of `session`.
    """

    def __init__(self, op: str, opset: int = 21, **options: Any) -> None:
        self._op, self._opset, self._options = op, opset, options
        self._shared: Any = None

    def check(self, case: Case) -> None:
        """The results agree with the contract."""
        if case.attributes or case.constants:
            made = self._session(case)
        else:
            made = self._shared = self._shared or self._session(case)
        got = made.run(None, case.inputs)
        kernel = self._options["library"] is True
        assert agrees(self._op, case, got, kernel=kernel), f"{case.name}: {got}"

    def _session(self, case: Case) -> Any:
        return session(model_of(self._op, case, opset=self._opset), threads=1, **self._options)


@pytest.mark.parametrize(("op", "dtype"), BODIES, ids=BODY_IDS)
def test_body_in_the_reference_evaluator(op: str, dtype: str) -> None:
    for case in CASES[op](dtype):
        evaluator = ReferenceEvaluator(onnx.load_from_string(model_of(op, case)))
        with np.errstate(all="ignore"):
            got = evaluator.run(None, case.inputs)
        assert agrees(op, case, got, kernel=False), case.name


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize(("op", "dtype"), BODIES, ids=BODY_IDS)
def test_body_in_onnxruntime(op: str, dtype: str, optimize: bool) -> None:
    runner = Runner(op, optimize=optimize, library=False)
    for case in CASES[op](dtype):
        runner.check(case)


@pytest.mark.parametrize("opset", range(18, 26))
@pytest.mark.parametrize(("op", "dtype"), BODIES, ids=BODY_IDS)
def test_body_in_every_opset(op: str, dtype: str, opset: int) -> None:
    if opset < custom_ops.get(op).min_opset:
        pytest.skip("the body needs a newer opset")
    runner = Runner(op, opset, library=False)
    cases = [case for case in CASES[op](dtype) if case.every_opset]
    assert cases
    for case in cases:
        runner.check(case)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512bw", "avx512vnni"])
@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=IDS)
def test_kernel(
    op: str, dtype: str, isa: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in library.isa_levels:
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("ONNXQ_ISA", isa)
    runner = Runner(op, library=True)
    for case in CASES[op](dtype):
        runner.check(case)


@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=IDS)
def test_kernel_with_two_threads(
    op: str, dtype: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXQ_ISA", library.isa_levels[-1])
    case = next(case for case in CASES[op](dtype) if case.name == "large")
    made = session(model_of(op, case), threads=2, library=True)
    assert agrees(op, case, made.run(None, case.inputs), kernel=True)


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
    case = next(case for case in CASES[op](dtype) if case.name == "large")
    profiled = ort.InferenceSession(model_of(op, case), options, providers=["CPUExecutionProvider"])
    profiled.run(None, case.inputs)
    events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
    ran = {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    assert (ran == {op}) if kernels else (op not in ran and len(ran) > 1)


def test_a_body_s_operators_run_on_their_kernels(library: Library) -> None:
    """FP8 on both sides on the CPU: the body in a session with our kernels; bad rows are NaN."""
    for case in CASES["DynamicFloat8MatMul"]("float32"):
        got = session(model_of("DynamicFloat8MatMul", case), threads=1, library=True).run(
            None, case.inputs
        )
        assert agrees("DynamicFloat8MatMul", case, got, kernel=False), case.name
        (expected,) = case.reference("DynamicFloat8MatMul")
        assert np.array_equal(np.isnan(got[0]), np.isnan(expected)), case.name


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
