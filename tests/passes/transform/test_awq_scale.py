"""awq-scale: same function, smaller error of the rounded layers; the rule against llm-awq's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError, SpecError
from onnxq.formats import parse_format
from onnxq.passes.contract import Pass, PassReport
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.transform.awq_scale import AwqScale
from onnxq.pipeline.runner import Pipeline
from onnxq.solvers.awq import awq_scale, duo_scale, search_awq
from onnxq.solvers.rtn import rtn
from tests.passes.helpers import (
    apply,
    model_of,
    normal,
    ops,
    reasons,
    relative_error,
    report_of,
    run,
)

INT4 = parse_format("int4")

BODY = """g (float[16, 64] x) => (float[16, 24] y) {
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    g1 = MatMul (n, gate)
    s = Sigmoid (g1)
    a = Mul (g1, s)
    u = MatMul (n, up)
    m = Mul (a, u)
    y = MatMul (m, down)
}"""
SAMPLES = [{"x": normal(16, 64, seed=seed)} for seed in range(8)]


def gated() -> ir.Model:
    gamma = np.ones(64, np.float32)
    gamma[[3, 40]] = 30.0
    up = normal(64, 96, seed=2, scale=0.1)
    up[:, 7] *= 40
    weights = {
        "gamma": gamma,
        "beta": normal(64, seed=3),
        "gate": normal(64, 96, seed=1, scale=0.1),
        "up": up,
        "down": normal(96, 24, seed=4),
    }
    return model_of(BODY, weights, opset=21, ir_version=10)


def test_the_function_stays_and_nothing_is_added() -> None:
    model = gated()
    result = apply(model, Calibrate(), AwqScale(), samples=SAMPLES)
    report: PassReport = report_of(result, "awq-scale")
    assert [c.what for c in report.changed] == ["1/s in the norm", "1/s in the up layer"]
    assert ops(result.model) == ops(model)
    for feeds in SAMPLES:
        assert relative_error(run(model, feeds)["y"], run(result.model, feeds)["y"]) < 1e-5


def test_four_bit_weights_lose_less() -> None:
    model = gated()
    tail: list[Pass] = [Assign(mode="weight-only", weights="int4", block=32), Qdq()]
    unseen = {"x": normal(16, 64, seed=99)}
    exact = run(model, unseen)["y"]
    plain = run(apply(model, *tail).model, unseen)["y"]
    scaled = run(apply(model, Calibrate(), AwqScale(), *tail, samples=SAMPLES).model, unseen)["y"]
    assert relative_error(exact, scaled) < 0.7 * relative_error(exact, plain)


def test_the_search_uses_the_format_of_the_assign_that_follows() -> None:
    tail = Assign(mode="weight-only", weights="int8", block=16)
    result = apply(gated(), Calibrate(), AwqScale(), tail, samples=SAMPLES)
    assert report_of(result, "awq-scale").notes == ["searched with int8, 16 columns a scale"]


def test_the_rule_for_s() -> None:
    mean = np.array([4.0, 1.0, 0.25, 0.0])
    scale = awq_scale(mean, 0.5)
    raw = np.array([2.0, 1.0, 0.5, 1e-4])
    np.testing.assert_allclose(scale, raw / np.sqrt(2.0 * 1e-4))


def test_the_gain_is_that_of_the_output_on_the_rows() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 32)) * np.exp(rng.standard_normal(32))
    weight = rng.standard_normal((16, 32)).astype(np.float32)
    found = search_awq(np.abs(x).mean(axis=0), x.T @ x, weight, INT4, 32)

    def error(scale: np.ndarray) -> float:
        w = rtn(weight * scale, INT4, group=32).values()
        return float(np.square((x / scale) @ w.T - x @ weight.T).sum())

    gain = 10 * np.log10(error(np.ones(32, np.float32)) / error(found.scale))
    assert found.ratio > 0
    assert found.gain_db == pytest.approx(gain, abs=1e-3)


def test_inputs_of_one_size_are_left_alone() -> None:
    weight = np.ones((4, 8), np.float32)
    found = search_awq(np.ones(8), np.eye(8), weight, INT4, 0)
    assert (found.ratio, found.gain_db) == (0.0, 0.0)
    np.testing.assert_array_equal(found.scale, 1)


def test_duo_evens_out_columns_that_differ_in_size() -> None:
    """MXFP6's smallest step is that of its block: columns smaller than their neighbours suffer."""
    rng = np.random.default_rng(0)
    size = np.exp(1.5 * rng.standard_normal(64))
    x = rng.standard_normal((500, 64))
    weight = (rng.standard_normal((48, 64)) * size).astype(np.float32)
    mean, gram, mx = np.abs(x).mean(axis=0), x.T @ x, parse_format("mxfp6e2m3")
    alone = search_awq(mean, gram, weight, mx, 32)
    both = search_awq(mean, gram, weight, mx, 32, duo=True, steps=4)
    assert both.gain_db > alone.gain_db + 1
    assert both.changes

    def error(scale: np.ndarray) -> float:
        w = rtn(weight * scale, mx, group=32).values()
        return float(np.square((x / scale) @ w.T - x @ weight.T).sum())

    gain = 10 * np.log10(error(np.ones(64, np.float32)) / error(both.scale))
    assert both.gain_db == pytest.approx(gain, abs=1e-2)


def test_the_rule_for_s_of_duo() -> None:
    scale = duo_scale(np.array([4.0, 1.0, 9.0]), np.array([0.25, 4.0, 0.0]), 0.5)
    raw = np.array([2 / 0.5, 1 / 2, 1.0])
    np.testing.assert_allclose(scale, raw / np.sqrt(4.0 * 0.5))


def test_duo_keeps_the_function() -> None:
    model = gated()
    result = apply(model, Calibrate(), AwqScale(duo=True, weights="mxfp6e2m3"), samples=SAMPLES)
    assert len(report_of(result, "awq-scale").changed) == 2
    for feeds in SAMPLES:
        assert relative_error(run(model, feeds)["y"], run(result.model, feeds)["y"]) < 1e-5


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(SpecError, match="steps=1"):
        AwqScale(steps=1)


def test_a_layer_on_the_input_is_left_alone_with_the_reason() -> None:
    body = "g (float[2, 4] x) => (float[2, 4] y) { y = MatMul (x, w) }"
    model = model_of(body, {"w": normal(4, 4)})
    result = apply(model, Calibrate(), AwqScale(), samples=[{"x": normal(2, 4)}])
    assert "nothing that writes the input" in reasons(report_of(result, "awq-scale"))


def test_bad_options_and_order() -> None:
    with pytest.raises(SpecError):
        AwqScale(weights="int99")
    with pytest.raises(SpecError, match="block"):
        AwqScale(block=-2)
    with pytest.raises(PipelineError, match="statistics"):
        Pipeline([AwqScale()]).run(gated())
