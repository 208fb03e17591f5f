"""mixed-precision on a chain with one layer that 8 bits break."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onnxq.errors import DataError, PreconditionError, QualityError, SpecError
from onnxq.passes.contract import Pass
from onnxq.passes.decide import kernel_cost
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.decide.mixed_precision import MixedPrecision
from onnxq.passes.keys import PLAN
from onnxq.passes.lower.qdq import Qdq
from tests.passes.decide.test_sensitivity import HURT, LAYERS, SAMPLES, chain, sqnr
from tests.passes.helpers import apply, model_of, normal, ops, reasons, report_of, run

SECONDS = {"int8": 1.0, "int16": 3.0, "float": 2.0}


@pytest.fixture(autouse=True)
def known_costs(monkeypatch):
    """Costs that do not depend on the machine."""
    monkeypatch.setattr(kernel_cost, "measure", lambda *_: dict(SECONDS))


def wide_chain():
    model = chain()
    model.graph.opset_imports[""] = 21
    model.ir_version = 10
    return model


def go(*passes: Pass):
    return apply(wide_chain(), Calibrate(), Assign(), *passes, samples=SAMPLES)


def levels_of(result) -> dict[str, str]:
    plan = result.artifacts.get(PLAN)
    found = dict.fromkeys(plan.floats, "float")
    return found | {s.site: plan.values[s.inputs[0]].format for s in plan.sites.values()}


def test_a_budget_of_size_gives_16_bits_where_they_help():
    found = levels_of(go(MixedPrecision(levels=("int8", "int16"), max_size=1.0)))
    assert found[HURT] == "uint16"


def test_a_budget_of_time_is_spent_where_it_helps_most():
    """Five layers of 1 s; one may become float (+1 s), or none 16 bits (+2 s)."""
    result = go(MixedPrecision(max_latency=1.25))
    assert levels_of(result) == {f"m{i}": "uint8" for i in range(LAYERS)} | {HURT: "float"}
    report = report_of(result, "mixed-precision")
    assert "1.200 times the time of int8" in report.notes[0]
    (curve,) = report.curves
    assert curve.chosen[0] == pytest.approx(1.2)
    xs = [x for x, _, _ in curve.points]
    ys = [y for _, y, _ in curve.points]
    assert xs == sorted(xs)
    assert ys == sorted(ys, reverse=True), "more time, less damage"


def test_no_slack_leaves_the_plan_as_it_is():
    result = go(MixedPrecision(max_latency=1.0))
    assert set(levels_of(result).values()) == {"uint8"}
    assert report_of(result, "mixed-precision").changed[0].what == "stay int8"


def test_the_chosen_plan_is_nearer_to_float_than_int8():
    exact = [run(wide_chain(), f)["y"] for f in SAMPLES]

    def after(*passes: Pass) -> float:
        model = go(*passes, Qdq()).model
        return sqnr(exact, [run(model, f)["y"] for f in SAMPLES])

    plain, mixed = after(), after(MixedPrecision(levels=("int8", "int16"), max_size=1.0))
    assert mixed > plain + 6
    model = go(MixedPrecision(levels=("int8", "int16"), max_size=1.0), Qdq()).model
    kinds = {v.const_value.dtype.name for v in model.graph.initializers.values() if v.const_value}
    assert "UINT16" in kinds
    assert ops(model)["QuantizeLinear"] == LAYERS


def test_a_budget_that_cannot_be_met_says_how_far_off_it_is():
    with pytest.raises(QualityError, match=r"takes 1 times .* 0.1 above 0.9") as caught:
        go(MixedPrecision(max_latency=0.9))
    assert caught.value.code == "QUALITY-BUDGET"
    assert caught.value.details["distance"] == pytest.approx(0.1)


def test_sixteen_bits_need_opset_21():
    with pytest.raises(PreconditionError, match="opset 21"):
        apply(chain(), Calibrate(), Assign(), MixedPrecision(max_size=1.0), samples=SAMPLES)
    result = apply(
        chain(),
        Calibrate(),
        Assign(),
        MixedPrecision(levels=("int8", "float"), max_size=1.9),
        samples=SAMPLES,
    )
    assert HURT in result.artifacts.get(PLAN).floats


def test_costs_are_kept_in_a_file(tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    first = go(MixedPrecision(max_latency=1.25, costs=str(path)))
    assert json.loads(path.read_text())["seconds"]["16x16"] == SECONDS
    monkeypatch.setattr(kernel_cost, "measure", lambda *_: pytest.fail("measured again"))
    assert levels_of(go(MixedPrecision(max_latency=1.25, costs=str(path)))) == levels_of(first)
    with pytest.raises(DataError, match="for 128 rows, not 8"):
        go(MixedPrecision(max_latency=1.25, rows=8, costs=str(path)))
    path.write_text("[]")
    with pytest.raises(DataError, match="holds no costs"):
        go(MixedPrecision(max_latency=1.25, costs=str(path)))


def test_layers_that_are_no_candidates_are_told():
    body = "g (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) { y = Conv <pads=[1,1,1,1]> (x, w) }"
    model = model_of(body, {"w": normal(4, 4, 3, 3)}, opset=21)
    samples = [{"x": normal(1, 4, 6, 6)}]
    result = apply(model, Calibrate(), Assign(), MixedPrecision(max_size=1.0), samples=samples)
    assert "integer kernels" in reasons(report_of(result, "mixed-precision"))


def test_bad_options():
    for options in (
        {},
        {"max_size": 1.0, "max_latency": 1.0},
        {"max_size": 1.0, "levels": ("int16", "float")},
        {"max_size": 1.0, "rows": 0},
    ):
        with pytest.raises(SpecError):
            MixedPrecision(**options)


def test_kernels_are_measured_in_processor_time(monkeypatch):
    monkeypatch.undo()
    found = kernel_cost.measure(4, 32, 16, ("int8", "int16", "float"))
    assert set(found) == {"int8", "int16", "float"}
    assert all(0 < seconds < 1 for seconds in found.values())
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    for level in ("int8", "int16"):
        session = kernel_cost._session(kernel_cost._model(32, 16, level))  # type: ignore[arg-type]
        assert session.run(None, {"x": x})[0].shape == (4, 16)
