"""simplify-attention: softmax hides key biases, value biases move on, idle guards go."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.graph import io
from onnxq.passes.contract import PassReport
from onnxq.passes.prepare.canonicalize import Canonicalize
from onnxq.passes.transform.simplify_attention import SimplifyAttention

from .. import helpers as h
from ..blocks import Block, block, samples


def simplified(model: ir.Model) -> tuple[ir.Model, ir.Model, PassReport]:
    """The clean model, the simplified one and the report."""
    clean = h.apply(model, Canonicalize()).model
    result = h.apply(clean, SimplifyAttention())
    return clean, result.model, h.report_of(result, "simplify-attention")


def changes(report: PassReport) -> str:
    return "\n".join(f"{c.site}: {c.what}" for c in report.changed)


@pytest.mark.parametrize("mask", [None, -1e4, float(np.finfo(np.float32).min)])
def test_key_and_value_biases_go_and_the_function_stays(mask: float | None) -> None:
    clean, done, report = simplified(block(Block(mask=mask)))
    assert "key bias dropped" in changes(report)
    assert "value bias folded" in changes(report)
    assert "k_b" not in done.graph.initializers
    assert "v_b" not in done.graph.initializers
    h.assert_same_function(clean, done, samples())


@pytest.mark.parametrize(("fill", "drops"), [(-5.0, False), (0.0, False), (-1e3, True)])
def test_a_key_bias_stays_where_a_mask_fill_competes_with_the_scores(
    fill: float, drops: bool
) -> None:
    """Scores move by ``q . b_k``, what is written over them does not."""
    model = h.model_of(
        """g (float[1, 5, 8] x, bool[1, 5, 5] m) => (float[1, 5, 8] y) {
            q = MatMul(x, qw)
            k0 = MatMul(x, kw)
            k = Add(k0, kb)
            v = MatMul(x, vw)
            kt = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul(q, kt)
            w = Where(m, s, fill)
            p = Softmax <axis = -1> (w)
            c = MatMul(p, v)
            y = MatMul(c, ow)
        }""",
        {
            **{f"{n}w": h.normal(8, 8, seed=i, scale=0.5) for i, n in enumerate("qkvo")},
            "kb": h.normal(8, seed=9, scale=3.0),
            "fill": np.array(fill, np.float32),
        },
    )
    result = h.apply(model, SimplifyAttention())
    report = h.report_of(result, "simplify-attention")
    assert ("key bias dropped" in changes(report)) == drops
    assert ("may be above -1000" in h.reasons(report)) != drops
    mask = np.tril(np.ones((1, 5, 5), bool))
    h.assert_same_function(model, result.model, [{"x": h.normal(1, 5, 8, seed=3), "m": mask}])


def test_the_value_bias_arrives_multiplied_by_the_output_weight() -> None:
    """``b_o + W_o^T b_v`` for the block's heads, which lie side by side (Vaswani et al. 2017)."""
    _, done, _ = simplified(block())
    v, o, w = (h.const(block(), n).astype(np.float64) for n in ("v_b", "o_b", "o_w"))
    np.testing.assert_allclose(h.const(done, "o_b"), o + v @ w, rtol=1e-6, atol=1e-6)


def test_a_value_head_that_is_repeated_brings_its_bias_to_each_head() -> None:
    clean, done, report = simplified(block(Block(heads=1)))
    assert "value bias folded" in changes(report)
    h.assert_same_function(clean, done, samples())


def test_a_rotated_key_keeps_its_bias() -> None:
    clean, done, report = simplified(block(Block(rope=True)))
    assert "key bias" not in changes(report)
    assert "moved by position" in h.reasons(report)
    assert "k_b" in done.graph.initializers
    h.assert_same_function(clean, done, samples())


@pytest.mark.parametrize("mask", [-1e4, -1e9, float(np.finfo(np.float32).min)])
def test_a_guard_behind_a_finite_mask_goes(mask: float) -> None:
    clean, done, report = simplified(block(Block(mask=mask, guard=True)))
    assert "guard against NaN removed" in changes(report)
    assert not h.ops(done)["IsNaN"]
    h.assert_same_function(clean, done, samples())


def masked_throughout() -> list[h.Feeds]:
    """Samples of which one sentence is padding from its first token on."""
    made = samples(1)
    made[0]["attention_mask"] = np.array([[1] * 5, [0] * 5], np.int64)
    return made


def test_a_guard_behind_an_infinite_mask_stays_and_keeps_the_value_bias() -> None:
    clean, done, report = simplified(block(Block(mask=-np.inf, guard=True)))
    assert h.ops(done)["IsNaN"] == 1
    assert "may be infinite" in h.reasons(report)
    assert "fully masked rows" in h.reasons(report)
    h.assert_same_function(clean, done, masked_throughout())


ATTENTION = """g (float[1, 2, 5, 8] q, float[1, 2, 8, 5] k, float[1, 2, 5, 8] v,
    bool[1, 1, 1, 5] keep, bool[1, 1, 5, 1] rows) => (float[1, 2, 5, 8] y) {{ {body} }}"""


def bare(body: str, dtype: str = "float") -> ir.Model:
    weights = {"low": np.float32(-np.inf), "few": np.float32(-1e4), "zero": np.float32(0)}
    numpy = {"float": np.float32, "float16": np.float16}[dtype]
    return h.model_of(
        ATTENTION.replace("float[", f"{dtype}[").format(body=body),
        {name: np.asarray(w).astype(numpy) for name, w in weights.items()},
    )


def bare_feeds(*, some: bool = True) -> list[h.Feeds]:
    keep = np.array([[[[some, some, some, False, False]]]])
    rows = np.array([True, True, True, True, False]).reshape(1, 1, 5, 1)
    return [
        {
            "q": h.normal(1, 2, 5, 8),
            "k": h.normal(1, 2, 8, 5, seed=1),
            "v": h.normal(1, 2, 5, 8, seed=2),
            "keep": keep,
            "rows": rows,
        }
    ]


GUARD = "p = Softmax(i) n = IsNaN(p) w = Where(n, zero, p) y = MatMul(w, v)"


@pytest.mark.parametrize(
    ("mask", "goes"),
    [
        ("i = Where(keep, s, few)", True),
        ("i = Where(keep, s, low)", False),
        ("a = Where(keep, s, low) i = Where(rows, a, few)", False),
        ("a = Where(keep, s, few) i = Where(rows, a, few)", True),
        ("m = Where(keep, zero, few) i = Add(s, m)", True),
        ("m = Where(keep, zero, low) i = Add(s, m)", False),
        ("m = Where(keep, zero, few) a = Add(s, m) i = Where(rows, a, low)", False),
    ],
)
def test_a_guard_goes_only_if_every_mask_is_finite(mask: str, goes: bool) -> None:
    model = bare(f"s = MatMul(q, k) {mask} {GUARD}")
    result = h.apply(model, SimplifyAttention())
    assert (h.ops(result.model)["IsNaN"] == 0) is goes
    assert h.ops(result.model)["Where"] == h.ops(model)["Where"] - goes
    for some in (True, False):
        h.assert_same_function(model, result.model, bare_feeds(some=some))


def test_rows_that_a_model_sets_to_zero_on_purpose_stay_zero() -> None:
    body = "s = MatMul(q, k) m = Where(keep, zero, few) i = Add(s, m) p = Softmax(i)"
    model = bare(f"{body} w = Where(rows, zero, p) y = MatMul(w, v)")
    result = h.apply(model, SimplifyAttention())
    assert "does not test for NaN" in h.reasons(h.report_of(result, "simplify-attention"))
    h.assert_same_function(model, result.model, bare_feeds())


def test_a_guard_stays_where_scores_may_overflow() -> None:
    """In float16 a score below -16 plus the lowest number is -inf."""
    body = "s = MatMul(q, k) m = Where(keep, zero, few) i = Add(s, m)"
    result = h.apply(bare(f"{body} {GUARD}", "float16"), SimplifyAttention())
    assert h.ops(result.model)["IsNaN"] == 1


@pytest.mark.parametrize("factor", ["Mul(k_t, per_token)", "Div(ones, k_t)"])
def test_a_key_that_is_scaled_by_position_keeps_its_bias(factor: str) -> None:
    text = f"""g (float[1, 5, 16] x) => (float[1, 5, 16] y) {{
        q = MatMul(x, qw)
        kp = MatMul(x, kw)
        k = Add(kp, kb)
        k_t = Transpose <perm = [0, 2, 1]> (k)
        k_s = {factor}
        s = MatMul(q, k_s)
        p = Softmax <axis = -1> (s)
        v = MatMul(x, vw)
        y = MatMul(p, v)
    }}"""
    weights = {n: h.normal(16, 16, seed=i, scale=0.2) for i, n in enumerate(("qw", "kw", "vw"))}
    weights |= {
        "kb": h.normal(16, seed=5) + 4,
        "per_token": h.normal(1, 1, 5, seed=4),
        "ones": np.ones((1, 1, 1), np.float32),
    }
    model = h.model_of(text, weights)
    result = h.apply(model, SimplifyAttention())
    assert "kb" in result.model.graph.initializers
    h.assert_same_function(model, result.model, [{"x": h.normal(1, 5, 16)}])


def test_a_value_that_is_read_twice_keeps_its_bias() -> None:
    """A cache that is handed out must hold v as it was."""
    model = block(extra_output="v_layer")
    clean, done, report = simplified(model)
    assert "value bias folded" not in changes(report)
    assert "also read by" in h.reasons(report)
    h.assert_same_function(clean, done, samples())


def test_a_key_that_is_handed_out_keeps_its_bias() -> None:
    clean, done, report = simplified(block(extra_output="k_layer"))
    assert "key bias dropped" not in changes(report)
    h.assert_same_function(clean, done, samples())


def test_a_key_inside_a_gemm_is_said_to_stay() -> None:
    clean, done, report = simplified(block(Block(gemm=True)))
    assert "key bias" in h.reasons(report)
    h.assert_same_function(clean, done, samples())


def test_the_second_time_nothing_is_left_to_do() -> None:
    _, done, _ = simplified(block(Block(mask=-1e4, guard=True)))
    again = h.report_of(h.apply(done, SimplifyAttention()), "simplify-attention")
    assert not again.changed


def test_a_real_bert_keeps_its_function() -> None:
    model = io.load(h.shared("models", "sst2-bert-tiny", "model.onnx"))
    clean, done, report = simplified(model)
    assert report.changed
    h.assert_same_function(clean, done, h.made_up_feeds(model, 2))
