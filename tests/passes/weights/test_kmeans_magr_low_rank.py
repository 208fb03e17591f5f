"""kmeans, magr and low-rank-compensate: what each promises, on inputs that are not alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxq.errors import PipelineError, SpecError, UnsupportedError
from onnxq.passes.contract import Pass
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.weights.gptq import Gptq
from onnxq.passes.weights.kmeans import KMeans
from onnxq.passes.weights.low_rank_compensate import LowRankCompensate
from onnxq.passes.weights.magr import MagR
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.validate import validate

from .. import helpers as h

K, N = 96, 48
BODY = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ m = MatMul(x, w)  y = Add(m, b) }}"
GEMM = f"g (float[R,{K}] x) => (float[R,{N}] y) {{ y = Gemm<transB = 1>(x, w, b) }}"
WEIGHT = h.normal(K, N, seed=1, scale=0.1)
MIXING = h.normal(K, K // 4, seed=3) * np.exp(h.normal(K, 1, seed=4))


def rows(seed: int, count: int = 40) -> h.Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, K // 4)) @ MIXING.T + 0.2 * rng.standard_normal((count, K))
    return x.astype(np.float32)


SAMPLES = [{"x": rows(seed)} for seed in range(12)]
W2 = Assign(mode="weight-only", weights="uint2", block=32, symmetric_weights=False)
W3 = Assign(mode="weight-only", weights="int3", block=32)
KM3 = Assign(mode="weight-only", weights="kmeans3")


def model_of(gemm: bool = False) -> Any:
    w = np.ascontiguousarray(WEIGHT.T) if gemm else WEIGHT
    return h.model_of(GEMM if gemm else BODY, {"w": w, "b": h.normal(N, seed=2)}, opset=21)


def error(*passes: Pass, gemm: bool = False, before: tuple[Pass, ...] = ()) -> float:
    model = model_of(gemm)
    after = h.apply(model, Calibrate(), *before, *passes, Qdq(), samples=SAMPLES).model
    fresh = {"x": rows(99, 400)}
    return h.relative_error(h.run(model, fresh)["y"], h.run(after, fresh)["y"])


@pytest.mark.parametrize("gemm", [False, True])
def test_weighted_centroids_lose_less_at_the_output(gemm: bool) -> None:
    assert error(KM3, KMeans(), gemm=gemm) < 0.9 * error(KM3, gemm=gemm)


def test_kmeans_refuses_other_formats_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"m: `kmeans` finds codebooks; uint2"):
        error(W2, KMeans())


def test_magr_shrinks_weights_and_helps_at_two_bits() -> None:
    model = model_of()
    result = h.apply(model, Calibrate(), MagR(alpha=0.01), samples=SAMPLES)
    (weight,) = (
        v.const_value.numpy()
        for v in result.model.graph.initializers.values()
        if v.const_value is not None and v.const_value.shape.rank() == 2
    )
    assert np.abs(weight).max() < 0.9 * np.abs(WEIGHT).max()
    small = h.relative_error(h.run(model, SAMPLES[0])["y"], h.run(result.model, SAMPLES[0])["y"])
    assert 1e-5 < small < 0.05
    (change,) = h.report_of(result, "magr").changed
    assert change.what.startswith("largest weight ")
    channels = Assign(mode="weight-only", weights="uint2", block=0, symmetric_weights=False)
    assert error(channels, before=(MagR(alpha=0.01),)) < 0.8 * error(channels)
    assert error(W2, Gptq(), before=(MagR(),)) < 0.97 * error(W2, Gptq())


@pytest.mark.parametrize("solver", [(), (Gptq(),)], ids=["nearest", "gptq"])
@pytest.mark.parametrize("gemm", [False, True], ids=["matmul", "gemm"])
def test_the_branch_undoes_part_of_the_error(solver: tuple[Pass, ...], gemm: bool) -> None:
    without = error(W3, *solver, gemm=gemm)
    thin = error(W3, *solver, LowRankCompensate(rank=4), gemm=gemm)
    wide = error(W3, *solver, LowRankCompensate(rank=16), gemm=gemm)
    assert wide < thin < without
    assert wide < 0.6 * without


def test_the_report_of_the_branch_says_what_it_gained() -> None:
    result = h.apply(model_of(), Calibrate(), W3, LowRankCompensate(rank=8), Qdq(), samples=SAMPLES)
    (change,) = h.report_of(result, "low-rank-compensate").changed
    before, after = (float(part.split()[2]) for part in change.detail.split(" to "))
    assert change.what == "rank 8"
    assert after > before + 2
    assert h.ops(result.model)["Branch"] == 1


def test_layers_that_cannot_take_a_branch_are_named() -> None:
    plan = (Calibrate(), W3, LowRankCompensate(rank=40))
    result = h.apply(model_of(), *plan, samples=SAMPLES)
    assert "rank 40 is not thin beside 96 x 48" in h.reasons(
        h.report_of(result, "low-rank-compensate")
    )
    static = (Calibrate(), Assign(), LowRankCompensate(rank=4))
    found = h.apply(model_of(), *static, samples=SAMPLES)
    report = h.report_of(found, "low-rank-compensate")
    assert not report.changed
    assert "activations are quantized (static)" in h.reasons(report)


def test_a_weight_with_two_readers_is_left_by_magr() -> None:
    body = f"""g (float[R,{K}] x) => (float[R,{N}] y) {{
        a = MatMul(x, w)  t = Tanh(x)  b = MatMul(t, w)  y = Add(a, b) }}"""
    model = h.model_of(body, {"w": WEIGHT}, opset=21)
    report = h.report_of(h.apply(model, Calibrate(), MagR(), samples=SAMPLES), "magr")
    assert not report.changed
    assert len(report.skipped) == 2


def test_options_and_order() -> None:
    with pytest.raises(SpecError, match="alpha=0"):
        MagR(alpha=0.0)
    with pytest.raises(SpecError, match="rank=0"):
        LowRankCompensate(rank=0)
    for text in ("assign, low-rank-compensate, qdq", "magr, calibrate, assign, qdq"):
        with pytest.raises(PipelineError):
            validate(parse(text), has_data=True)
