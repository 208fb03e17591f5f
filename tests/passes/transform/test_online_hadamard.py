"""online-hadamard: same function in float64; the inserted node against the dense matrix."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import scipy.linalg

from onnxq.errors import SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.transform.online_hadamard import OnlineHadamard
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
    assert ops(rotated)["Hadamard"] == 2
    assert len(analyze(rotated).linears) == len(analyze(model).linears)


def test_a_width_without_a_matrix_is_rotated_in_its_largest_divisor_that_has_one() -> None:
    model = llama(inner=172)
    rotated, report = hadamard(model)
    assert [change.what for change in report.changed] == ["R4: Hadamard of order 4"] * 2
    assert_exact(model, rotated)
    again, more = hadamard(llama(inner=2 * 172))
    assert [change.what for change in more.changed] == ["R4: Hadamard of order 8"] * 2
    assert_exact(llama(inner=2 * 172), again)
    _, odd = hadamard(llama(inner=86))
    assert "no Hadamard matrix of order 86" in reasons(odd)


def test_the_rotated_input_is_flat_and_has_the_same_length() -> None:
    model = llama(inner=64)
    x = str(analyze(model).gated_mlps[0].down.x.name)
    rotated, _ = hadamard(model)
    (old,), (new,) = outputs(model, TOKENS, x), outputs(rotated, TOKENS, f"{x}_rotated")
    np.testing.assert_allclose(np.linalg.norm(new, axis=-1), np.linalg.norm(old, axis=-1))
    assert np.abs(new).max() < np.abs(old).max()


@pytest.mark.parametrize(("n", "block"), [(64, 0), (40, 0), (48, 12), (48, 16)])
def test_the_weight_takes_up_the_inverse_of_what_the_node_computes(n: int, block: int) -> None:
    """R from the node, R' W from the weight: against scipy where scipy has the order."""
    model = llama(inner=n)
    down = analyze(model).gated_mlps[0].down
    x, before = str(down.x.name), down.w.astype(np.float64)
    rotated, _ = hadamard(model, block=block)
    (old,), (new,) = outputs(model, TOKENS, x), outputs(rotated, TOKENS, f"{x}_rotated")
    order = block or n
    if order & (order - 1) == 0:
        dense = np.kron(np.eye(n // order), scipy.linalg.hadamard(order)) / np.sqrt(order)
        np.testing.assert_allclose(new, old @ dense, atol=1e-5)
    after = next(d.w for d in analyze(rotated).linears if d.name == down.name).astype(np.float64)
    np.testing.assert_allclose(new @ after, old @ before, atol=1e-5)


def test_the_node_is_the_operator_that_kernels_know() -> None:
    rotated, _ = hadamard(llama(inner=48))
    node = next(n for n in rotated.graph if n.op_type == "Hadamard")
    assert node.domain == "com.onnxq"
    assert ("com.onnxq", "Hadamard", "") in rotated.functions
    assert node.attributes["block"].as_int() == 48
    assert node.attributes["scale"].as_float() == np.float32(1 / np.sqrt(48))


def test_an_opset_that_the_operator_does_not_know_is_said() -> None:
    model = pre_layernorm(opset=17)
    _, report = hadamard(model)
    assert not report.changed
    assert "canonicalize{opset=18}" in reasons(report)


def test_the_layer_behind_relu_is_rotated_too() -> None:
    model = pre_layernorm(opset=18)
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
    np.testing.assert_allclose(new, old @ scipy.linalg.hadamard(8) / np.sqrt(8), atol=1e-6)


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
    _, report = hadamard(model_of(body, {"w": normal(4, 4)}, opset=18))
    assert "no MLP" in reasons(report)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8)])
def test_any_rank_and_no_rows(shape: tuple[int, ...]) -> None:
    dims = ", ".join(map(str, shape))
    out = ", ".join(map(str, (*shape[:-1], 4)))
    body = f"g (float[{dims}] x) => (float[{out}] y) {{ r = Relu (x)\n y = MatMul (r, w) }}"
    model = model_of(body, {"w": normal(8, 4)}, opset=18)
    rotated, report = hadamard(model)
    assert len(report.changed) == 1
    x = normal(*shape, seed=1)
    np.testing.assert_allclose(run(rotated, {"x": x})["y"], run(model, {"x": x})["y"], atol=1e-5)


@pytest.mark.parametrize("product", ["Mul (r, s)", "Mul (s, r)"])
def test_a_scale_between_activation_and_layer_is_looked_through(product: str) -> None:
    """`smooth-quant` leaves one where nothing can take it up."""
    nodes = f"r = Relu (x)\n m = {product}\n y = MatMul (m, w)"
    body = f"g (float[3, 8] x) => (float[3, 4] y) {{ {nodes} }}"
    scale = np.linspace(0.5, 2, 8, dtype=np.float32)
    model = model_of(body, {"w": normal(8, 4), "s": scale}, opset=18)
    rotated, report = hadamard(model)
    assert len(report.changed) == 1
    x = normal(3, 8, seed=1)
    np.testing.assert_allclose(run(rotated, {"x": x})["y"], run(model, {"x": x})["y"], atol=1e-5)
