"""correct-bias: mean outputs with rounded weights are those of the float layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError
from onnxq.passes.contract import Pass
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.weights.correct_bias import CorrectBias
from onnxq.passes.weights.gptq import Gptq
from tests.passes.helpers import Feeds, apply, model_of, normal, reasons, report_of, run

SAMPLES = [{"x": 1.0 + normal(2, 6, 9, 9, seed=s)} for s in range(6)]


def layer(kind: str) -> ir.Model:
    """One layer of 4 output channels, or 6 of a depthwise Conv, of very different ranges."""
    groups = 6 if kind == "depthwise" else 2 if kind == "grouped" else 1
    outputs = 6 if kind == "depthwise" else 4
    w = normal(outputs, 6 // groups, 3, 3, seed=7)
    w *= np.geomspace(0.02, 1.0, outputs, dtype=np.float32).reshape(-1, 1, 1, 1)
    body = f"""g (float[2, 6, 9, 9] x) => (float[2, {outputs}, 7, 7] y) {{
        y = Conv <group = {groups}> (x, w, b)
    }}"""
    return model_of(body, {"w": w, "b": normal(outputs, seed=8)})


def mean_error(model: ir.Model, other: ir.Model, samples: list[Feeds], axes: tuple[int, ...]):
    errors = [run(other, f)["y"].astype(np.float64) - run(model, f)["y"] for f in samples]
    return np.abs(np.mean(errors, axis=0).mean(axis=axes)).max()


TENSOR: list[Pass] = [Calibrate(), Assign(weight_scales="tensor", activations="uint16")]


@pytest.mark.parametrize("kind", ["plain", "grouped", "depthwise"])
def test_mean_outputs_of_a_conv_are_kept(kind):
    """Activations in 16 bits: what is left is the borders, which the means of 49 places blur."""
    model = apply(layer(kind), _Opset()).model
    before = apply(model, *TENSOR, Qdq(), samples=SAMPLES).model
    after = apply(model, *TENSOR, CorrectBias(), Qdq(), samples=SAMPLES).model
    plain = mean_error(model, before, SAMPLES, (0, 2, 3))
    assert mean_error(model, after, SAMPLES, (0, 2, 3)) < plain / 8


@pytest.mark.parametrize("solver", [[], [Gptq()]], ids=["nearest", "gptq"])
def test_mean_outputs_of_a_gemm_are_kept_exactly(solver):
    body = "g (float[40, 16] x) => (float[40, 8] y) { y = Gemm <transB = 1> (x, w, b) }"
    model = model_of(body, {"w": normal(8, 16, seed=1), "b": normal(8, seed=2)}, opset=21)
    model.ir_version = 10
    samples = [{"x": 2.0 + normal(40, 16, seed=s)} for s in range(3)]
    passes: list[Pass] = [Calibrate(), Assign(weights="int4", activations="uint16"), *solver]
    before = apply(model, *passes, Qdq(), samples=samples).model
    after = apply(model, *passes, CorrectBias(), Qdq(), samples=samples).model
    assert mean_error(model, before, samples, (0,)) > 5e-3
    assert mean_error(model, after, samples, (0,)) < 5e-4


def test_the_bias_is_moved_by_the_weights_error_times_the_mean_input():
    """Against numpy: one scale a tensor, symmetric int8."""
    body = "g (float[5, 3] x) => (float[5, 2] y) { m = MatMul (x, w) y = Add (m, b) }"
    w = np.array([[0.01, 1.27], [0.004, 0.3], [0.0149, -0.5]], np.float32)
    model = model_of(body, {"w": w, "b": np.zeros(2, np.float32)})
    x = np.abs(normal(5, 3, seed=3)) + 1
    result = apply(
        model, Calibrate(), Assign(weight_scales="tensor"), CorrectBias(), samples=[{"x": x}]
    )
    delta = w - np.rint(w / np.float32(0.01)) * np.float32(0.01)
    want = x.mean(0, dtype=np.float64) @ delta
    (found,) = (
        v.const_value.numpy()
        for v in result.model.graph.initializers.values()
        if v.const_value is not None and v.const_value.shape == (2,)
    )
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_layers_without_a_bias_or_a_plan_are_told():
    body = "g (float[5, 16] x) => (float[5, 16] y) { m = MatMul (x, w) y = MatMul (m, v) }"
    model = model_of(body, {"w": normal(16, 16), "v": normal(16, 16, seed=1)})
    samples = [{"x": normal(5, 16)}]
    report = report_of(
        apply(model, Calibrate(), Assign(), CorrectBias(), samples=samples), "correct-bias"
    )
    assert not report.changed
    assert "has no bias" in reasons(report)
    with pytest.raises(PipelineError, match="plan"):
        apply(model, Calibrate(), CorrectBias(), samples=samples)


class _Opset(Pass):
    """16-bit activations need opset 21."""

    name = "opset"
    summary = ""

    def run(self, model, ctx):
        from onnxq.passes.contract import PassReport

        model.graph.opset_imports[""] = 21
        model.ir_version = 10
        return PassReport()
