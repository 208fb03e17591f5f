"""online-hadamard: same function in float64; the inserted node against the dense matrix."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import scipy.linalg

from onnxq.errors import SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.transform.online_hadamard import OnlineHadamard, RotationPlan
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
from tests.passes.transform.wide import EXACT, TOKENS, llama, outputs, pre_layernorm


def hadamard(model: ir.Model, **options: object) -> tuple[ir.Model, PassReport]:
    result = apply(model, OnlineHadamard(**options))  # type: ignore[arg-type]
    return result.model, report_of(result, "online-hadamard")


def assert_exact(before: ir.Model, after: ir.Model) -> None:
    for old, new in zip(outputs(before, TOKENS), outputs(after, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT


@pytest.mark.parametrize("inner", [32, 40, 48])
@pytest.mark.parametrize("block", [0, 4, 8])
def test_down_keeps_the_function(inner: int, block: int) -> None:
    model = llama(inner=inner)
    rotated, report = hadamard(model, block=block)
    assert len(report.changed) == 2
    assert_exact(model, rotated)
    assert ops(rotated)["RotateBlocks" if block else "RotateKronecker"] == 2
    assert len(analyze(rotated).linears) == len(analyze(model).linears)


def test_the_rotated_input_is_flat_and_has_the_same_length() -> None:
    model = llama(inner=64)
    x = str(analyze(model).gated_mlps[0].down.x.name)
    rotated, _ = hadamard(model)
    (old,), (new,) = outputs(model, TOKENS, x), outputs(rotated, TOKENS, f"{x}_rotated")
    np.testing.assert_allclose(np.linalg.norm(new, axis=-1), np.linalg.norm(old, axis=-1))
    assert np.abs(new).max() < np.abs(old).max()


def test_kronecker_is_the_hadamard_matrix_up_to_the_order_of_columns() -> None:
    plan = RotationPlan.of(64, 0)
    assert (plan.outer, plan.inner) == (8, 8)
    dense = scipy.linalg.hadamard(64) / 8
    columns = {tuple(column) for column in dense.T}
    assert {tuple(column) for column in plan.matrix().T.round(9)} == columns


@pytest.mark.parametrize(("n", "outer", "inner"), [(1536, 48, 32), (576, 36, 16), (20, 0, 20)])
def test_the_cheapest_factors_are_taken(n: int, outer: int, inner: int) -> None:
    plan = RotationPlan.of(n, 0)
    assert (plan.outer, plan.inner) == (outer, inner)
    np.testing.assert_allclose(plan.matrix() @ plan.matrix().T, np.eye(n), atol=1e-12)


def test_the_layer_behind_relu_is_rotated_too() -> None:
    model = pre_layernorm()
    rotated, report = hadamard(model)
    assert [c.site for c in report.changed] == [
        linear.name for linear in analyze(model).linears if linear.in_features == 20
    ]
    assert_exact(model, rotated)


def test_queries_and_keys() -> None:
    model = llama(hidden=32, heads=4, kv_heads=2)
    rotated, report = hadamard(model, sites=("qk",))
    assert [c.what for c in report.changed] == ["R3: Hadamard of order 8"] * 2
    assert_exact(model, rotated)
    before, after = analyze(model).attentions[0], analyze(rotated).attentions[0]
    (old,) = outputs(model, TOKENS, str(before.q.name))
    (new,) = outputs(rotated, TOKENS, str(after.q.name))
    np.testing.assert_allclose(new, old @ scipy.linalg.hadamard(8) / np.sqrt(8), atol=1e-12)


def test_sizes_without_a_matrix_are_left_alone_with_the_reason() -> None:
    model = llama(inner=42)
    rotated, report = hadamard(model)
    assert not report.changed
    assert "order 42" in reasons(report)
    rotated, report = hadamard(model, block=4)
    assert "not divided by block=4" in reasons(report)
    assert ops(rotated) == ops(model)
    with pytest.raises(SpecError, match="block=6"):
        OnlineHadamard(block=6)


def test_no_mlp_is_said() -> None:
    body = "g (float[2, 4] x) => (float[2, 4] y) { y = MatMul (x, w) }"
    _, report = hadamard(model_of(body, {"w": normal(4, 4)}))
    assert "no MLP" in reasons(report)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8)])
def test_any_rank_and_no_rows(shape: tuple[int, ...]) -> None:
    dims = ", ".join(map(str, shape))
    out = ", ".join(map(str, (*shape[:-1], 4)))
    body = f"g (float[{dims}] x) => (float[{out}] y) {{ r = Relu (x)\n y = MatMul (r, w) }}"
    model = model_of(body, {"w": normal(8, 4)})
    rotated, report = hadamard(model)
    assert len(report.changed) == 1
    x = normal(*shape, seed=1)
    np.testing.assert_allclose(run(rotated, {"x": x})["y"], run(model, {"x": x})["y"], atol=1e-5)
