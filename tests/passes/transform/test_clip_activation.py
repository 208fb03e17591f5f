"""clip-activation: outputs are bounded where they go beyond, and left alone elsewhere."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError, SpecError
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.transform.clip_activation import ClipActivation
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.validate import validate
from tests.passes.helpers import (
    Array,
    apply,
    model_of,
    normal,
    ops,
    reasons,
    report_of,
    run,
    values,
)

BODY = """g (float[6, 8] x) => (float[6, 4] y) {
  a = MatMul (x, v)
  r = <function>
  y = MatMul (r, w)
}"""
SPELLINGS = {
    "relu": "Relu (a)",
    "gelu": "Gelu (a)",
    "gelu_tanh": 'Gelu <approximate = "tanh"> (a)',
}
WEIGHTS = {"v": normal(8, 16, scale=3.0), "w": normal(16, 4, seed=1)}
X = normal(6, 8, seed=2)


def clip(
    function: str,
    method: str = "minmax",
    data: Array = X,
    percentile: float = 99.99,
    **options: object,
) -> tuple[ir.Model, ir.Model, PassReport]:
    body = BODY.replace("<function>", SPELLINGS[function])
    model = model_of(body, WEIGHTS, opset=20, ir_version=9)
    passes = (Calibrate(method=method, percentile=percentile), ClipActivation(**options))  # type: ignore[arg-type]
    result = apply(model, *passes, samples=[{"x": data}])
    return model, result.model, report_of(result, "clip-activation")


@pytest.mark.parametrize("function", SPELLINGS)
def test_a_fixed_bound(function: str) -> None:
    model, clipped, report = clip(function, limit=4.0)
    (before,) = values(model, {"x": X}, ["r"]).values()
    assert before.max() > 4
    want = np.minimum(before, 4) @ WEIGHTS["w"]
    np.testing.assert_allclose(run(clipped, {"x": X})["y"], want, rtol=1e-5, atol=1e-5)
    assert "at most 4" in report.changed[0].what


def test_a_bound_that_is_never_reached_adds_no_node() -> None:
    model, clipped, report = clip("gelu", limit=1000.0)
    assert ops(clipped) == ops(model)
    assert "nothing to clip" in reasons(report)


def test_min_max_ranges_clip_nothing_and_a_percentile_clips_a_peak() -> None:
    many = X.copy()
    many[0] *= 30
    _, _, report = clip("relu", "minmax", many)
    assert "nothing to clip" in reasons(report)
    _, clipped, report = clip("relu", "percentile", many, percentile=90.0)
    (change,) = report.changed
    limit = float(change.what.rsplit(" ", 1)[1])
    (before,) = values(clipped, {"x": many}, ["r"]).values()
    (after,) = values(clipped, {"x": many}, ["r_clipped"]).values()
    np.testing.assert_allclose(after, np.minimum(before, limit), rtol=1e-3)
    assert after.max() < before.max()


def test_globs_and_outputs() -> None:
    _, clipped, report = clip("relu", limit=1.0, layers=("nothing*",))
    assert "Min" not in ops(clipped)
    assert "no activation function" in reasons(report)
    body = "g (float[6, 8] x) => (float[6, 8] y) { y = Relu (x) }"
    result = apply(
        model_of(body, opset=20, ir_version=9),
        Calibrate(),
        ClipActivation(limit=0.1),
        samples=[{"x": X}],
    )
    assert "output of the model" in reasons(report_of(result, "clip-activation"))


@pytest.mark.parametrize("order", ["clip-activation", "calibrate, assign, clip-activation"])
def test_wrong_orders_are_refused(order: str) -> None:
    with pytest.raises(PipelineError):
        validate(parse(order))


def test_limits_that_are_none() -> None:
    for limit in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SpecError):
            ClipActivation(limit=limit)
