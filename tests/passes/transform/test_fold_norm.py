"""fold-norm: float64 before and after, the model's own outputs as the oracle."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError
from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.transform.fold_norm import FOLDED_NORMS, FoldNorm
from onnxq.pipeline.runner import Pipeline
from tests.passes.helpers import apply, model_of, normal, ops, reasons, relative_error, report_of
from tests.passes.transform.wide import EXACT, TOKENS, llama, outputs, pre_layernorm


def fold(model: ir.Model, **options: bool) -> tuple[ir.Model, PassReport]:
    result = apply(model, FoldNorm(**options))
    return result.model, report_of(result, "fold-norm")


def assert_exact(before: ir.Model, after: ir.Model) -> None:
    for old, new in zip(outputs(before, TOKENS), outputs(after, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT


@pytest.mark.parametrize("tied", [True, False])
def test_rmsnorm_gammas_become_one(tied: bool) -> None:
    model = llama(tied=tied)
    folded, report = fold(model)
    assert len(report.changed) == 5
    for norm in analyze(folded).norms:
        np.testing.assert_array_equal(norm.g, 1)
    assert_exact(model, folded)
    assert len(list(folded.graph)) == len(list(model.graph))


def test_a_tied_head_gets_its_own_table_and_the_embedding_keeps_its() -> None:
    model = llama(tied=True)
    before = analyze(model).embeddings[0].table.const_value
    folded, report = fold(model)
    embedding = analyze(folded).embeddings[0]
    assert not embedding.is_table_shared
    assert before is not None
    assert embedding.table.const_value is not None
    np.testing.assert_array_equal(embedding.table.const_value.numpy(), before.numpy())
    assert "copy of a shared weight" in report.changed[-1].detail


@pytest.mark.parametrize("spelling", ["operator", "decomposed"])
@pytest.mark.parametrize("opset", [17, 18])
def test_layernorms_lose_gamma_beta_and_mean(spelling: str, opset: int) -> None:
    model = pre_layernorm(spelling=spelling, opset=opset)
    folded, report = fold(model)
    structure = analyze(folded)
    assert [n.kind for n in structure.norms] == ["rmsnorm"] * 3
    assert all((n.g == 1).all() for n in structure.norms)
    assert "LayerNormalization" not in ops(folded)
    assert "Sub" not in ops(folded)
    assert report.changed[-1].what == "3 LayerNorms became RMSNorms"
    assert_exact(model, folded)


def test_the_standard_operator_is_used_where_the_opset_has_it() -> None:
    folded, _ = fold(pre_layernorm(opset=23))
    assert ops(folded)["RMSNormalization"] == 3


def test_the_centred_stream_has_mean_zero() -> None:
    model = pre_layernorm()
    folded, _ = fold(model)
    (stream,) = outputs(folded, TOKENS, "h2")
    (before,) = outputs(model, TOKENS, "h2")
    assert np.abs(before.mean(axis=-1)).max() > 0.1
    assert np.abs(stream.mean(axis=-1)).max() < 1e-12


def test_centre_false_keeps_layernorms() -> None:
    model = pre_layernorm()
    folded, _ = fold(model, centre=False)
    assert ops(folded)["LayerNormalization"] == 3
    assert_exact(model, folded)


def test_a_reader_without_bias_gets_one_for_beta() -> None:
    model = pre_layernorm(bias=False)
    folded, _ = fold(model)
    assert all(linear.bias is not None for linear in analyze(folded).linears)
    assert_exact(model, folded)


def test_a_shared_norm_is_left_alone_with_the_reason() -> None:
    body = """g (float[2, 4] x) => (float[2, 4] y) {
        n = LayerNormalization <axis = -1> (x, gamma, beta)
        h = MatMul (n, w)
        y = Add (n, h)
    }"""
    weights = {"gamma": normal(4, seed=1), "beta": normal(4, seed=2), "w": normal(4, 4, seed=3)}
    model = model_of(body, weights, opset=17)
    folded, report = fold(model)
    assert not report.changed
    assert "shared norm: Add reads its output too" in reasons(report)
    assert ops(folded) == ops(model)


def test_a_stream_that_something_else_reads_keeps_its_mean() -> None:
    body = """g (float[2, 4] x) => (float[2, 3] y, float[2, 4] z) {
        h = MatMul (x, v)
        n = LayerNormalization <axis = -1> (h, gamma, beta)
        y = MatMul (n, w)
        z = Relu (h)
    }"""
    weights = {
        "gamma": normal(4, seed=1),
        "beta": normal(4, seed=2),
        "v": normal(4, 4, seed=3),
        "w": normal(4, 3, seed=4),
    }
    model = model_of(body, weights, opset=17)
    folded, report = fold(model)
    assert ops(folded)["LayerNormalization"] == 1
    assert "LayerNorms keep their mean: Relu" in reasons(report)
    assert len(report.changed) == 1


def test_the_second_time_nothing_is_left_to_do() -> None:
    once, _ = fold(pre_layernorm())
    _, report = fold(once)
    assert not report.changed
    assert "gamma is 1 and beta 0 already" in reasons(report)


def test_rotate_before_fold_norm_is_refused_with_the_fix() -> None:
    with pytest.raises(PipelineError, match="folded-norms") as caught:
        Pipeline("rotate, fold-norm").run(llama())
    assert "put it before" in str(caught.value.hint)


def test_the_artifact_survives_storage() -> None:
    result = apply(llama(), FoldNorm())
    folded = result.artifacts.get(FOLDED_NORMS)
    assert len(folded.names) == 5
    assert type(folded).from_storage(*folded.to_storage()) == folded
