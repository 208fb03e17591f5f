"""sensitivity, and partial with a budget, on a chain with one layer that 8 bits break."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration.data import open_data
from onnxq.errors import DataError, PipelineError, QualityError, SpecError
from onnxq.passes.contract import Context, Curve, Pass, PassReport
from onnxq.passes.decide import measure_sites
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.decide.measure import Score
from onnxq.passes.decide.partial import Partial
from onnxq.passes.decide.sensitivity import SENSITIVITY, Sensitivities, Sensitivity
from onnxq.passes.keys import PLAN
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.weights.gptq import Gptq
from onnxq.pipeline.executors import open_executor
from onnxq.pipeline.runner import Pipeline, RunResult
from tests.passes.helpers import apply, model_of, normal, report_of, run

LAYERS = 5
SITES = [f"m{i}" for i in range(LAYERS)]
HURT = "m3"
SAMPLES = [{"x": normal(12, 16, seed=seed)} for seed in range(4)]


def chain() -> ir.Model:
    """Five layers with residuals; the input of m3 has a channel 300 times the others."""
    lines, h = [], "x"
    weights = {}
    for i in range(LAYERS):
        weights[f"w{i}"] = normal(16, 16, seed=i, scale=0.2)
        weights[f"s{i}"] = np.ones(16, np.float32)
        if SITES[i] == HURT:
            weights[f"s{i}"][2] = 300.0
            weights[f"w{i}"][2] /= 300.0
        lines += [
            f"c{i} = Mul ({h}, s{i})",
            f"m{i} = MatMul (c{i}, w{i})",
            f"h{i} = Add ({h}, m{i})",
        ]
        h = f"h{i}"
    body = "\n".join(lines) + f"\ny = Identity ({h})"
    return model_of(f"g (float[12, 16] x) => (float[12, 16] y) {{\n{body}\n}}", weights)


HEAD: list[Pass] = [Calibrate(), Assign()]


def go(*passes: Pass) -> RunResult:
    return apply(chain(), *HEAD, *passes, samples=SAMPLES)


def sqnr(exact: list[np.ndarray], other: list[np.ndarray]) -> float:
    noise = sum(
        float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(exact, other, strict=True)
    )
    signal = sum(float(np.square(a.astype(np.float64)).sum()) for a in exact)
    return 10 * np.log10(signal / noise)


def measured(floats: list[str]) -> float:
    """The oracle: the pipeline with these layers left out by name, run by onnxruntime."""
    passes: list[Pass] = [*HEAD, *([Partial(layers=tuple(floats))] if floats else []), Qdq()]
    model = apply(chain(), *passes, samples=SAMPLES).model
    exact = [run(chain(), feeds)["y"] for feeds in SAMPLES[:2]]
    return sqnr(exact, [run(model, feeds)["y"] for feeds in SAMPLES[:2]])


def test_each_score_is_that_of_the_layer_quantized_alone() -> None:
    found = go(Sensitivity()).artifacts.get(SENSITIVITY)
    assert found.worst_first()[0] == HURT
    for site in SITES:
        others = [s for s in SITES if s != site]
        assert found.scores[site].sqnr_db == pytest.approx(measured(others), abs=0.01)


def test_storage_changes_nothing() -> None:
    one = go(Sensitivity()).artifacts.get(SENSITIVITY)
    assert Sensitivities.from_storage(*one.to_storage()) == one


def test_a_run_that_was_killed_goes_on_with_identical_results(tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    whole = go(Sensitivity(cache=str(cache))).artifacts.get(SENSITIVITY)
    lines = cache.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + LAYERS
    cache.write_text("".join(lines[:3]) + lines[3][:9])  # killed in the middle of a line
    result = go(Sensitivity(cache=str(cache)))
    assert result.artifacts.get(SENSITIVITY) == whole
    assert "2 of 5 layers from the cache" in report_of(result, "sensitivity").notes[0]
    assert sorted(cache.read_text().splitlines()) == sorted("".join(lines).splitlines())


def test_a_cache_of_another_run_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    cache.write_text(json.dumps({"sensitivity": "other"}) + "\n")
    with pytest.raises(DataError, match="another model, plan or samples"):
        go(Sensitivity(cache=str(cache)))


def test_the_fewest_layers_are_left_in_float() -> None:
    target = measured([HURT]) - 0.05
    assert measured([]) < target
    result = go(Sensitivity(), Partial(min_sqnr=float(target)))
    plan = result.artifacts.get(PLAN)
    assert list(plan.floats) == [HURT]
    assert report_of(result, "partial").changed[0].what == "stays float"
    notes = report_of(result, "partial").notes
    assert any("1 layers in float" in note and "80.0%" in note for note in notes)


@pytest.mark.parametrize("count", [2, 4])
def test_the_search_finds_the_least_count_of_the_ranking(count: int) -> None:
    ranked = go(Sensitivity()).artifacts.get(SENSITIVITY).worst_first()
    by_count = [measured(ranked[:n]) for n in range(LAYERS)]
    target = by_count[count] - 0.05
    least = next(n for n in range(LAYERS) if by_count[n] >= target)
    result = go(Sensitivity(), Partial(min_sqnr=float(target)))
    floats = result.artifacts.get(PLAN).floats
    assert set(floats) <= set(ranked[:least])
    assert measured(list(floats)) >= target
    for site in floats:
        assert measured([s for s in floats if s != site]) < target, "none can be given back"


def test_a_budget_that_is_met_changes_nothing() -> None:
    result = go(Sensitivity(), Partial(min_sqnr=1.0))
    assert not result.artifacts.get(PLAN).floats
    assert [c.what for c in report_of(result, "partial").changed] == ["stay quantized"]


def test_a_budget_that_cannot_be_met_says_how_near_it_came() -> None:
    best = max(measured([s]) for s in SITES)
    with pytest.raises(QualityError, match=f"best found is {best:.2f} dB with 1") as caught:
        go(Sensitivity(), Partial(min_sqnr=80.0, max_layers=1))
    assert caught.value.code == "QUALITY-BUDGET"


def logits_model() -> ir.Model:
    body = """g (int64[2, 6] input_ids) => (float[2, 6, 11] logits) {
        e = Gather (table, input_ids)
        logits = MatMul (e, head)
    }"""
    return model_of(
        body, {"table": normal(11, 16), "head": normal(16, 11, seed=1)}, opset=21, ir_version=10
    )


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_kl_and_perplexity_against_scipy(metric: str) -> None:
    import scipy.special

    model = logits_model()
    ids = np.random.default_rng(0).integers(0, 11, (2, 6))
    samples = [{"input_ids": ids}]
    head: list[Pass] = [Calibrate(), Assign(weights="int4")]
    done = apply(model, *head, Sensitivity(metric=metric), samples=samples)  # type: ignore[arg-type]
    score = done.artifacts.get(SENSITIVITY).scores["logits"]
    a, b = (
        scipy.special.log_softmax(run(m, samples[0])["logits"].astype(np.float64), axis=-1)
        for m in (model, apply(model, *head, Qdq(), samples=samples).model)
    )
    if metric == "kl":
        assert score.kl == pytest.approx(scipy.special.rel_entr(np.exp(a), np.exp(b)).sum() / 12)
        return

    def nll(p: np.ndarray) -> float:
        places = itertools.product((0, 1), range(5))
        return -float(np.mean([p[r, t, ids[r, t + 1]] for r, t in places]))

    # Log-probabilities are in float32.
    assert score.drop == pytest.approx(100 * (np.exp(nll(b) - nll(a)) - 1), rel=1e-4)


def test_perplexity_of_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="token ids"):
        go(Sensitivity(metric="perplexity"))


def test_order_compute_prefers_cheap_layers() -> None:
    scores = {"big": Score(10.0), "small": Score(12.0)}
    found = Sensitivities("sqnr", scores)
    plan = go(Sensitivity()).artifacts.get(PLAN)
    sites = {name: dataclasses.replace(plan.sites["m0"], site=name) for name in scores}
    plan = dataclasses.replace(plan, sites=sites)
    costs = {"big": 1000, "small": 10}
    assert Partial(min_sqnr=1.0, order="layers")._rank(found, plan, costs) == ["big", "small"]
    assert Partial(min_sqnr=1.0)._rank(found, plan, costs) == ["small", "big"]


def test_bad_options_and_order() -> None:
    for options in ({}, {"min_sqnr": 1.0, "max_kl": 1.0}, {"min_sqnr": 1.0, "samples": 0}):
        with pytest.raises(SpecError):
            Partial(**options)  # type: ignore[arg-type]
    with pytest.raises(SpecError):
        Sensitivity(samples=0)
    with pytest.raises(PipelineError, match="sensitivity"):
        go(Partial(min_sqnr=1.0))


def test_a_run_with_a_budget_shows_its_trials_as_a_curve() -> None:
    target = measured([HURT]) - 0.05
    report = report_of(go(Sensitivity(), Partial(min_sqnr=float(target))), "partial")
    (curve,) = report.curves
    assert curve.limit == target
    assert curve.chosen == (pytest.approx(80.0), pytest.approx(measured([HURT]), abs=0.01))
    by_share = {x: y for x, y, _ in curve.points}
    assert by_share[100.0] == pytest.approx(measured([]), abs=0.01)
    assert Curve.from_json(json.loads(json.dumps(dataclasses.asdict(curve)))) == curve


def test_named_layers_are_left_in_float_before_the_budget_is_met() -> None:
    target = measured([HURT, "m0"]) - 0.05
    result = go(Sensitivity(), Partial(layers=("m0",), min_sqnr=float(target)))
    floats = result.artifacts.get(PLAN).floats
    assert floats["m0"] == "layers=m0"
    assert set(floats) == {"m0", HURT}


def test_the_distance_to_a_budget_is_told() -> None:
    best = max(measured([s]) for s in SITES)
    with pytest.raises(QualityError, match=r"80 dB|off") as caught:
        go(Sensitivity(), Partial(min_sqnr=80.0, max_layers=1))
    assert caught.value.details["distance"] == pytest.approx(80 - best, abs=0.01)


def test_a_budget_needs_samples_and_names_do_not() -> None:
    from onnxq.pipeline.validate import validate

    with pytest.raises(DataError, match="partial"):
        apply(chain(), Assign(mode="dynamic"), _Known(), Partial(min_sqnr=1.0))
    validate([Assign(mode="dynamic"), Partial(layers=("m0",))], has_data=False)


@dataclasses.dataclass(frozen=True)
class _Known(Pass):
    """Provides sensitivities without samples."""

    name: ClassVar[str] = "known"
    summary: ClassVar[str] = ""
    provides: ClassVar = (SENSITIVITY,)

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        ctx.artifacts.put(SENSITIVITY, Sensitivities("sqnr", {"m0": Score(10.0)}))
        return PassReport()


KILLED = """
import sys, time
from onnxq.passes.decide.measure import PlanMeter
from tests.passes.decide.test_sensitivity import Sensitivity, go

score = PlanMeter.score

def slowly(self, outputs):
    time.sleep(0.3)
    return score(self, outputs)

PlanMeter.score = slowly
go(Sensitivity(cache=sys.argv[1]))
"""


def test_a_process_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(cache)], env=environment, cwd=root)
    try:
        while not cache.exists() or len(cache.read_text().splitlines()) < 3:
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    assert len(cache.read_text().splitlines()) < 1 + LAYERS
    resumed = go(Sensitivity(cache=str(cache)))
    assert resumed.artifacts.get(SENSITIVITY) == go(Sensitivity()).artifacts.get(SENSITIVITY)
    assert not report_of(resumed, "sensitivity").notes[0].startswith("2 samples, 0 of")


@pytest.mark.parametrize("solver", [[], [Gptq()]], ids=["nearest", "gptq"])
def test_other_processes_find_the_same_numbers(solver: list[Pass], monkeypatch) -> None:
    monkeypatch.setattr(measure_sites, "_SITES_A_TASK", 2)
    alone = go(*solver, Sensitivity()).artifacts.get(SENSITIVITY)
    data = open_data(SAMPLES, chain())
    with open_executor(2) as executor:
        result = Pipeline([*HEAD, *solver, Sensitivity()]).run(
            chain(), data=data, holdout=data, verify=False, executor=executor
        )
    assert result.artifacts.get(SENSITIVITY) == alone
