"""Weights and inputs that are broken or odd: an error that names the layer, or a right answer."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.errors import DataError, SpecError, UnsupportedError
from onnxq.passes.contract import Pass
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.weights.gpfq import Gpfq
from onnxq.passes.weights.gptq import Gptq
from onnxq.passes.weights.hqq import Hqq
from onnxq.passes.weights.opt_rtn import OptRtn
from onnxq.passes.weights.sequential import Sequential

from .. import helpers as h

K, N = 48, 16
PLAIN = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ y = MatMul(x, w) }}"
W4 = Assign(mode="weight-only", weights="int4", block=32)
ASYM = Assign(mode="weight-only", weights="uint4", block=32, symmetric_weights=False)
FEEDS = [{"x": h.normal(20, K, seed=s)} for s in range(3)]
SOLVERS: list[tuple[Pass, ...]] = [
    (W4,),
    (Calibrate(), W4, Gptq()),
    (Calibrate(), W4, Gpfq()),
    (Calibrate(), W4, OptRtn()),
    (ASYM, Hqq()),
    (W4, Sequential()),
    (W4, Sequential(solver="gptaq")),
    (W4, Sequential(solver="qronos")),
    (Assign(mode="weight-only", weights="nvfp4"),),
    (Assign(mode="weight-only", weights="nvfp4"), Sequential()),
]
NAMES = ["+".join(p.name for p in passes) for passes in SOLVERS]
every = pytest.mark.parametrize("passes", SOLVERS, ids=NAMES)


def weights(seed: int = 0) -> h.Array:
    return h.normal(K, N, seed=seed, scale=0.2)


def outputs(w: h.Array, *passes: Pass, feeds: list[h.Feeds] = FEEDS) -> tuple[h.Array, h.Array]:
    model = h.model_of(PLAIN, {"w": w}, opset=21)
    after = h.apply(model, *passes, Qdq(), samples=feeds).model
    return h.run(model, FEEDS[0])["y"], h.run(after, FEEDS[0])["y"]


@every
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_inf_in_a_weight_is_refused_with_the_layers_name(
    passes: tuple[Pass, ...], value: float
) -> None:
    w = weights()
    w[3, 5] = value
    with pytest.raises((DataError, UnsupportedError), match=r"y: .*(NaN|Inf)"):
        outputs(w, *passes)


@every
def test_a_group_that_does_not_divide_k_and_channels_of_zeros_or_denormals(
    passes: tuple[Pass, ...],
) -> None:
    w = weights()
    w[:, 2] = 0
    w[:, 3] = 1e-40
    exact, found = outputs(w, *passes)
    assert np.isfinite(found).all()
    assert (found[:, 2] == 0).all()
    assert np.abs(found[:, 3]).max() < 1e-30
    assert h.relative_error(exact, found) < 0.2


@every
def test_inputs_that_are_zero_or_too_few_to_know_all_directions(passes: tuple[Pass, ...]) -> None:
    few = [{"x": h.normal(3, K, seed=1)}]
    few[0]["x"][:, 10:20] = 0
    exact, found = outputs(weights(), *passes, feeds=few)
    assert np.isfinite(found).all()
    assert h.relative_error(exact, found) < 0.8  # on inputs unlike those calibrated on


@every
def test_a_weight_with_two_readers_and_one_that_is_an_output_stay_what_they_were(
    passes: tuple[Pass, ...],
) -> None:
    body = f"""g (float[R,{K}] x) => (float[R,{N}] y, float[R,{N}] z, float[{K},{N}] v) {{
        y = MatMul(x, w)  a = Tanh(x)  z = MatMul(a, w)  v = Identity(w) }}"""
    model = h.model_of(body, {"w": weights()}, opset=21)
    after = h.apply(model, *passes, Qdq(), samples=FEEDS).model
    exact, found = h.run(model, FEEDS[0]), h.run(after, FEEDS[0])
    np.testing.assert_array_equal(found["v"], exact["v"])
    for name in ("y", "z"):
        assert 1e-4 < h.relative_error(exact[name], found[name]) < 0.2


def test_inputs_of_inf_are_refused_with_their_name() -> None:
    feeds = [{"x": np.full((4, K), 1e30, np.float32)}]
    with pytest.raises(DataError, match="`x`"):
        outputs(weights(), W4, Sequential(), feeds=feeds)


@every
def test_a_weight_that_is_itself_an_output_of_the_model_stays(passes: tuple[Pass, ...]) -> None:
    body = f"g (float[R,{K}] x) => (float[R,{N}] y, float[{K},{N}] w) {{ y = MatMul(x, w) }}"
    model = h.model_of(body, {"w": weights()}, opset=21)
    after = h.apply(model, *passes, Qdq(), samples=FEEDS).model
    exact, found = h.run(model, FEEDS[0]), h.run(after, FEEDS[0])
    np.testing.assert_array_equal(found["w"], exact["w"])
    assert 1e-4 < h.relative_error(exact["y"], found["y"]) < 0.2


@every
def test_a_hessian_of_rank_one_is_no_obstacle(passes: tuple[Pass, ...]) -> None:
    """One sample of one row, repeated: all directions but one are unknown."""
    row = h.normal(1, K, seed=4)
    exact, found = outputs(weights(), *passes, feeds=[{"x": np.repeat(row, 30, axis=0)}])
    assert np.isfinite(found).all()
    assert h.relative_error(exact, found) < 0.8


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("tract", "nvfp4"),
        ("iree", "int4"),
        ("qnn", "mxfp4"),
    ],
)
def test_formats_that_a_target_cannot_take_are_refused_by_name(target: str, text: str) -> None:
    model = h.model_of(PLAIN.replace("R,", "20,"), {"w": weights()}, opset=21)
    assign = Assign(mode="weight-only", weights=text)
    with pytest.raises((UnsupportedError, SpecError), match=target):
        h.apply(model, assign, Qdq(), samples=FEEDS, target=target)
