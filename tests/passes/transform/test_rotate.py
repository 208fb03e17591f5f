"""rotate: same function in float64, flatter activations, no node added."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.transform.fold_norm import FoldNorm
from onnxq.passes.transform.rotate import Rotate
from tests.passes.helpers import apply, ops, reasons, relative_error, report_of
from tests.passes.transform.wide import EXACT, TOKENS, llama, outputs, pre_layernorm


def rotate(model: ir.Model, centre: bool = True, **options: object) -> tuple[ir.Model, PassReport]:
    result = apply(model, FoldNorm(centre=centre), Rotate(**options))  # type: ignore[arg-type]
    return result.model, report_of(result, "rotate")


def assert_exact(before: ir.Model, after: ir.Model) -> None:
    for old, new in zip(outputs(before, TOKENS), outputs(after, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT


SIZES = {
    "power of two": {"hidden": 32, "heads": 4, "kv_heads": 2},
    "12 times two": {"hidden": 24, "heads": 6, "kv_heads": 2},
    "no Hadamard": {"hidden": 18, "heads": 3, "kv_heads": 1},
    "one query a key": {"hidden": 24, "heads": 2, "kv_heads": 2},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_function_stays_and_no_node_is_added(size: str, tied: bool) -> None:
    model = llama(**SIZES[size], tied=tied)
    rotated, report = rotate(model)
    assert_exact(model, rotated)
    assert ops(rotated) == ops(model)
    assert len(report.changed) == 3
    kind = "random orthogonal of order 18" if size == "no Hadamard" else "randomized Hadamard"
    assert kind in report.changed[0].what


def test_r1_turns_the_stream_by_an_orthogonal_matrix() -> None:
    model = llama()
    rotated, _ = rotate(model, r2=False)
    name = str(analyze(model).norms[2].x.name)
    (old,), (new,) = outputs(model, TOKENS, name), outputs(rotated, TOKENS, name)
    assert relative_error(old, new) > 0.5
    rows, turned = old.reshape(-1, old.shape[-1]), new.reshape(-1, new.shape[-1])
    np.testing.assert_allclose(turned @ turned.T, rows @ rows.T, atol=1e-10)


def test_an_outlier_channel_is_spread() -> None:
    model = llama(hidden=64, heads=4, kv_heads=2, outlier=50.0)
    rotated, _ = rotate(model)
    x = str(analyze(model).norms[0].x.name)

    def peak(each: ir.Model) -> float:
        (array,) = outputs(each, TOKENS, x)
        return float(np.abs(array).max() / array.std())

    assert peak(model) > 8
    assert peak(rotated) < 3


def test_r2_turns_each_value_head_alone() -> None:
    model = llama(hidden=32, heads=4, kv_heads=2)
    rotated, report = rotate(model, r1=False)
    structure = analyze(model)
    way = structure.v_to_o(structure.attentions[0])
    assert not isinstance(way, str)
    (old,) = outputs(model, TOKENS, str(way.value.output.name))
    (new,) = outputs(rotated, TOKENS, str(way.value.output.name))
    assert relative_error(old, new) > 0.5
    heads, turned = (a.reshape(-1, 2, way.head_dim) for a in (old, new))
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(heads, axis=-1), rtol=1e-9
    )
    assert_exact(model, rotated)
    assert "2 heads" in report.changed[0].what


@pytest.mark.parametrize("centre", [True, False])
def test_layernorm_streams_turn_around_the_ones(centre: bool) -> None:
    model = pre_layernorm()
    rotated, report = rotate(model, centre=centre)
    assert len(report.changed) == 1
    assert_exact(model, rotated)
    assert ("LayerNormalization" in ops(rotated)) is not centre


def test_a_cache_keeps_its_values() -> None:
    model = llama(kv_cache=True)
    _, report = rotate(model)
    assert "present.0.value' on the way of v is also read by the graph's outputs" in reasons(report)
    assert [c.what[:2] for c in report.changed] == ["R1"]


def test_a_graph_without_norms_and_attention_says_so() -> None:
    import onnx.parser

    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) {y = Relu(x)}'
    _, report = rotate(ir.from_proto(onnx.parser.parse_model(text)))
    assert not report.changed
    assert "no norms" in reasons(report)
    assert "no attention" in reasons(report)


def test_equal_seeds_give_equal_weights() -> None:
    first, _ = rotate(llama(), seed=1)
    again, _ = rotate(llama(), seed=1)
    other, _ = rotate(llama(), seed=2)
    table = str(analyze(first).embeddings[0].table.name)

    def array(model: ir.Model) -> np.ndarray:
        tensor = model.graph.initializers[table].const_value
        assert tensor is not None
        return tensor.numpy()

    np.testing.assert_array_equal(array(first), array(again))
    assert not np.allclose(array(first), array(other))


@pytest.mark.parametrize("block", [4, 8])
def test_blocks_are_rotated_each_by_itself(block: int) -> None:
    model = llama(hidden=32, heads=4, kv_heads=2)
    rotated, report = rotate(model, block=block)
    assert_exact(model, rotated)
    assert ops(rotated) == ops(model)
    assert f"of order {block}" in report.changed[0].what
    name = str(analyze(model).norms[1].x.name)
    (old,), (new,) = outputs(model, TOKENS, name), outputs(rotated, TOKENS, name)
    old, new = (a.reshape(-1, 32 // block, block) for a in (old, new))
    np.testing.assert_allclose(np.linalg.norm(new, axis=-1), np.linalg.norm(old, axis=-1))
    assert relative_error(old, new) > 0.5


def test_blocks_that_do_not_divide_are_said() -> None:
    _, report = rotate(llama(hidden=24, heads=4, kv_heads=2), block=16)
    assert not report.changed
    assert "24 channels are not divided by block=16" in reasons(report)
    with pytest.raises(SpecError, match="block=1"):
        Rotate(block=1)
