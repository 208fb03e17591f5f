"""shift-scale: same function, smaller error of the quantized layers; the rule from the paper."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError, SpecError
from onnxq.formats import parse_format
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.transform.shift_scale import ShiftScale
from onnxq.pipeline.runner import Pipeline
from onnxq.solvers.shift_scale import centre, limit, search_shift_scale
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

BODY = """g (float[256, 32] x) => (float[256, 24] y, float[256, 8] z) {
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    a = MatMul (n, w)
    y = Add (a, b)
    z = MatMul (n, v)
}"""
SAMPLES = [{"x": normal(256, 32, seed=seed)} for seed in range(8)]
UNSEEN = {"x": normal(256, 32, seed=99)}


def off_centre(shared_beta: bool = False) -> ir.Model:
    """Two layers behind a LayerNorm whose beta is larger than its gamma."""
    gamma = np.ones(32, np.float32)
    gamma[4] = 3.0
    beta = normal(32, seed=1, scale=8.0)
    weights = {
        "gamma": gamma,
        "beta": beta,
        "w": normal(32, 24, seed=2),
        "b": normal(24, seed=3),
        "v": normal(32, 8, seed=4),
    }
    body = BODY
    if shared_beta:
        body = body.replace("(float[256, 24] y,", "(float[32] again, float[256, 24] y,")
        body = body.replace("    a =", "    again = Neg (beta)\n    a =")
    return model_of(body, weights, opset=17)


@pytest.mark.parametrize("shared_beta", [False, True])
def test_the_function_stays(shared_beta: bool) -> None:
    model = off_centre(shared_beta)
    result = apply(model, Calibrate(), ShiftScale(), samples=SAMPLES)
    assert [c.what for c in report_of(result, "shift-scale").changed] == [
        "shift and scale in the norm"
    ]
    for feeds in SAMPLES:
        before, after = run(model, feeds), run(result.model, feeds)
        for name in before:
            assert relative_error(before[name], after[name]) < 1e-5, name
    # The layer without a bias has one now.
    assert ops(result.model)["Add"] == 2


def test_eight_bit_activations_lose_less() -> None:
    model = off_centre()
    exact = run(model, UNSEEN)
    errors = []
    for before in ((), (Calibrate(), ShiftScale()), (Calibrate(), ShiftScale(shift=False))):
        result = apply(model, *before, Calibrate(), Assign(), Qdq(), samples=SAMPLES)
        quantized = run(result.model, UNSEEN)
        errors.append(relative_error(exact["y"], quantized["y"]))
    plain, both, scale_only = errors
    assert both < 0.5 * plain
    assert both < 0.7 * scale_only


def test_the_rules_of_the_paper() -> None:
    lo, hi = np.array([-1.0, 2.0, -8.0]), np.array([3.0, 6.0, 8.0])
    z = centre(lo, hi)
    np.testing.assert_array_equal(z, [1.0, 4.0, 0.0])
    np.testing.assert_array_equal(limit(lo - z, hi - z, 2.0), [1.0, 1.0, 4.0])


@pytest.mark.parametrize("may_shift", [True, False])
def test_the_search_never_shifts_what_cannot_take_it(may_shift: bool) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((64, 16)) + 20 * rng.standard_normal(16)).astype(np.float32)
    found = search_shift_scale(
        rows,
        rows.min(axis=0),
        rows.max(axis=0),
        rng.standard_normal((16, 8)).astype(np.float32),
        may_shift=may_shift,
        activation=parse_format("uint8"),
        weight_format=parse_format("int8"),
    )
    assert bool(found.shift.any()) is may_shift
    assert (found.scale >= 1).all()
    assert found.gain_db >= 0


def test_even_channels_are_left_alone() -> None:
    body = """g (float[256, 32] x) => (float[256, 8] y) {
        n = LayerNormalization <axis = -1> (x, gamma, beta)
        y = MatMul (n, w)
    }"""
    weights = {
        "gamma": np.ones(32, np.float32),
        "beta": np.zeros(32, np.float32),
        "w": normal(32, 8),
    }
    model = model_of(body, weights, opset=17)
    pass_ = ShiftScale(min_gain_db=3.0)
    report = report_of(apply(model, Calibrate(), pass_, samples=SAMPLES), "shift-scale")
    assert not report.changed
    assert "gain below 3 dB" in reasons(report)


def test_bad_options_and_order() -> None:
    with pytest.raises(SpecError, match="rows=3"):
        ShiftScale(rows=3)
    with pytest.raises(PipelineError, match="statistics"):
        Pipeline([ShiftScale()]).run(off_centre())
