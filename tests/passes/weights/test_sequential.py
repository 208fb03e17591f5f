"""sequential: each layer sees what the rounded layers before it hand on, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxq.errors import SpecError
from onnxq.formats import IntFormat
from onnxq.graph.match import analyze
from onnxq.passes.contract import Pass
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.keys import ROUNDED
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.weights import sequential as module
from onnxq.passes.weights.gptq import Gptq
from onnxq.passes.weights.opt_rtn import OptRtn
from onnxq.passes.weights.rounding import searched_scales
from onnxq.passes.weights.segments import cut
from onnxq.passes.weights.sequential import Sequential
from onnxq.solvers.gptq import gptq

from .. import helpers as h

Array = npt.NDArray[Any]
K = 64
W2 = Assign(mode="weight-only", weights="uint2", block=32, symmetric_weights=False)
W4 = Assign(mode="weight-only", weights="int4", block=32)
W4A4 = Assign(mode="per-token", weights="int4", block=32, activations="int4")
W4A4_GRID = IntFormat(4, True, "full")

DEEP = f"""g (float[R,{K}] x) => (float[R,{K}] y) {{
    a = MatMul(x, wa)  b = MatMul(x, wb)  s = Sigmoid(a)  p = Mul(s, b)
    c = MatMul(p, wc)  r = Add(x, c)
    d = Tanh(r)  e = MatMul(d, wd)  t = Tanh(e)  f = MatMul(t, we)  y = Add(r, f) }}"""
WEIGHTS = {f"w{name}": h.normal(K, K, seed=i, scale=0.2) for i, name in enumerate("abcde")}
MIXING = h.normal(K, K // 4, seed=9)


def rows(seed: int) -> Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((48, K // 4)) @ MIXING.T + 0.2 * rng.standard_normal((48, K))
    return (0.5 * x).astype(np.float32)


SAMPLES = [{"x": rows(seed)} for seed in range(12)]


def deep() -> ir.Model:
    return h.model_of(DEEP, WEIGHTS, opset=21)


def run(*passes: Pass) -> Any:
    return h.apply(deep(), *passes, samples=SAMPLES)


def error(*passes: Pass) -> float:
    fresh = {"x": np.concatenate([rows(seed) for seed in range(50, 60)])}
    return h.relative_error(h.run(deep(), fresh)["y"], h.run(run(*passes, Qdq()).model, fresh)["y"])


def test_stages_hold_layers_that_do_not_depend_on_each_other() -> None:
    model = deep()
    stages = cut(model.graph, analyze(model).linears)
    names = [[layer.weight.name for layer in stage.layers] for stage in stages]
    assert names == [["wa", "wb"], ["wc"], ["wd"], ["we"]]
    inputs = [{v.name for v in stage.inputs} for stage in stages]
    assert inputs == [set(), {"x"}, {"p", "x"}, {"d"}]
    assert {v.name for v in stages[2].outputs} == {"d"}  # r feeds the output alone
    assert [set(stage.finished) for stage in stages] == [set(), set(), {"p", "x"}, {"d", "t"}]


def test_a_layer_is_rounded_on_what_the_rounded_layers_hand_on() -> None:
    found = run(W4, Sequential(sweeps=0, token_cap=0.0)).artifacts.get(ROUNDED)
    model = deep()
    linears = {layer.weight.name: layer.name for layer in analyze(model).linears}
    # The input of wc with rounded wa and wb, by onnxruntime on a graph made here.
    replaced = {
        name: np.ascontiguousarray(found.get(linears[name]).values().T) for name in ("wa", "wb")
    }
    prefix = h.model_of(DEEP, {**WEIGHTS, **replaced}, opset=21)
    p = np.concatenate([h.values(prefix, feeds, ["p"])["p"] for feeds in SAMPLES])
    gram = p.astype(np.float64).T @ p
    # Codes of a solver on that Gram matrix are those of the pass.
    fmt = IntFormat(4, True, "full")
    wc = np.ascontiguousarray(WEIGHTS["wc"].T)
    params = searched_scales(wc, gram, fmt, 32)
    wanted = gptq(wc, gram, fmt, group=32, params=params, damp=0.01)
    same = found.get(linears["wc"]).codes == wanted.codes.astype(np.int8)
    assert same.mean() > 0.999


def test_inputs_that_are_rounded_at_run_time_reach_the_solver_rounded() -> None:
    """wc's codes are those of a solver on the moments of what its node multiplies in the result."""
    result = run(W4A4, Sequential(token_cap=0.0), Qdq())
    lowered = result.model
    product = next(n for n in lowered.graph if n.op_type == "MatMul" and n.outputs[0].name == "c")
    met = str(product.inputs[0].name)
    p = np.concatenate([h.values(lowered, feeds, [met])[met] for feeds in SAMPLES])
    gram = p.astype(np.float64).T @ p
    wc = np.ascontiguousarray(WEIGHTS["wc"].T)
    params = searched_scales(wc, gram, W4A4_GRID, 32)
    wanted = gptq(wc, gram, W4A4_GRID, group=32, params=params, damp=0.01)
    got = h.values(lowered, SAMPLES[0], [str(product.inputs[1].name)])
    values = next(iter(got.values()))
    np.testing.assert_allclose(values, wanted.values().T, atol=1e-5)


def test_rounding_on_rounded_inputs_loses_less() -> None:
    plan = Assign(
        mode="per-token", weights="uint2", block=32, symmetric_weights=False, activations="int3"
    )
    blind, seeing = (Sequential(solver="qronos", round_inputs=on) for on in (False, True))
    assert error(plan, seeing) < 0.9 * error(plan, blind)


def test_solvers_that_undo_the_error_of_the_inputs_beat_gptq_on_the_float_model() -> None:
    plain = error(Calibrate(), W2, Gptq(damping=0.01))
    assert error(W2, Sequential(solver="qronos")) < 0.95 * plain
    assert error(W2, Sequential(sweeps=2)) < 0.95 * plain


@pytest.mark.parametrize("solver", ["gptaq", "qronos", "gpfq"])
def test_solvers_with_both_streams_beat_rounding_to_nearest(solver: Any) -> None:
    assert error(W2, Sequential(solver=solver)) < 0.8 * error(Calibrate(), W2, OptRtn())


def test_layers_that_are_rounded_already_keep_their_codes() -> None:
    first = OptRtn(layers=("*",))
    result = run(Calibrate(), W4, first, Sequential())
    assert not h.report_of(result, "sequential").changed
    assert len(h.report_of(result, "sequential").skipped) == 5


def test_a_run_that_was_cut_off_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(W4, Sequential()).artifacts.get(ROUNDED)
    calls = 0
    real = module.gptq

    def dies(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    resumable = Sequential(cache=str(tmp_path))
    monkeypatch.setattr(module, "gptq", dies)
    with pytest.raises(KeyboardInterrupt):
        run(W4, resumable)
    assert calls == 4
    again = run(W4, resumable)
    assert calls == 6  # two stages were done: the layers of the third and the fourth are left
    assert len(h.report_of(again, "sequential").changed) == 5
    found = again.artifacts.get(ROUNDED)
    for site in whole:
        np.testing.assert_array_equal(found.get(site).codes, whole.get(site).codes)
        np.testing.assert_array_equal(found.get(site).scale, whole.get(site).scale)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(SpecError, match="damping"):
        Sequential(damping=0.0)
    with pytest.raises(SpecError, match="alpha"):
        Sequential(alpha=2.0)


def test_a_loud_token_is_scaled_down_to_the_cap() -> None:
    from onnxq.passes.weights.stream import token_weights

    x = h.normal(9, 16, seed=1)
    x[4] *= 100
    weights = token_weights(x, 4.0)
    energy = np.square(x.astype(np.float64)).sum(axis=1)
    assert (weights[np.arange(9) != 4] == 1).all()
    assert weights[4] * energy[4] == pytest.approx(4 * np.median(energy), rel=1e-6)
    assert (token_weights(np.zeros((3, 4), np.float32), 4.0) == 1).all()
