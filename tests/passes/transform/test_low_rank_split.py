"""low-rank-split: same function in float64; the residual is smaller, and alone is rounded."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError, SpecError
from onnxq.graph.match import analyze
from onnxq.passes.decide.assign import Assign
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.transform.low_rank_split import LowRankSplit
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.validate import validate
from tests.passes.helpers import (
    Array,
    apply,
    model_of,
    normal,
    ops,
    reasons,
    relative_error,
    report_of,
    run,
)
from tests.passes.transform.wide import EXACT, TOKENS, llama, outputs, pre_layernorm


@pytest.mark.parametrize("build", [llama, pre_layernorm])
def test_the_function_stays(build: object) -> None:
    model = build()  # type: ignore[operator]
    result = apply(model, LowRankSplit(rank=3))
    for old, new in zip(outputs(model, TOKENS), outputs(result.model, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT
    report = report_of(result, "low-rank-split")
    assert len(report.changed) == ops(result.model)["Branch"] > 2
    assert len(analyze(result.model).linears) == len(analyze(model).linears)


def heavy(rows: int = 64, columns: int = 48) -> Array:
    """A weight with two directions that are far larger than the rest."""
    rng = np.random.default_rng(0)
    ones = rng.standard_normal((rows, 2)) @ rng.standard_normal((2, columns))
    return (3 * ones + 0.1 * rng.standard_normal((rows, columns))).astype(np.float32)


BODIES = {
    "matmul": "y = MatMul (x, w)",
    "bias": "p = MatMul (x, w)\n y = Add (p, b)",
    "gemm": "y = Gemm (x, w, b)",
    "transposed": "y = Gemm <transB = 1> (x, t, b)",
}


def model_with(body: str) -> ir.Model:
    weights = {"w": heavy(), "b": normal(48), "t": np.ascontiguousarray(heavy().T)}
    used = {name: array for name, array in weights.items() if f", {name}" in body}
    text = f"g (float[5, 64] x) => (float[5, 48] y) {{ {body} }}"
    return model_of(text, used, opset=21, ir_version=10)


@pytest.mark.parametrize("spelling", BODIES)
def test_spellings_and_outputs_of_the_model(spelling: str) -> None:
    model = model_with(BODIES[spelling])
    result = apply(model, LowRankSplit(rank=2))
    x = normal(5, 64, seed=3)
    assert relative_error(run(model, {"x": x})["y"], run(result.model, {"x": x})["y"]) <= 1e-5
    (linear,) = analyze(result.model).linears
    assert np.linalg.norm(linear.w) < 0.1 * np.linalg.norm(heavy())


def test_rounding_the_residual_is_better_than_rounding_the_whole() -> None:
    model, x = model_with(BODIES["matmul"]), normal(5, 64, seed=3)
    exact = run(model, {"x": x})["y"]
    rounding = (Assign(mode="per-token", activations="int8", weights="int4"), Qdq())
    whole = run(apply(model, *rounding).model, {"x": x})["y"]
    split = run(apply(model, LowRankSplit(rank=2), *rounding).model, {"x": x})["y"]
    assert relative_error(exact, split) < 0.3 * relative_error(exact, whole)


def test_layers_that_are_not_split_say_why() -> None:
    model = llama()
    result = apply(model, LowRankSplit(rank=32))
    assert "not thin" in reasons(report_of(result, "low-rank-split"))
    assert ops(result.model) == ops(model)
    shared = report_of(apply(model, LowRankSplit(rank=2)), "low-rank-split")
    assert "other readers" in reasons(shared)
    none = report_of(apply(model, LowRankSplit(layers=("x*",))), "low-rank-split")
    assert "no matrix product" in reasons(none)


def test_it_stands_before_the_plan() -> None:
    with pytest.raises(PipelineError):
        validate(parse("calibrate, assign, low-rank-split"))
    with pytest.raises(SpecError):
        LowRankSplit(rank=0)
