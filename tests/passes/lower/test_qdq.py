"""qdq: what stands in the graph means what the plan says, and onnxruntime makes integers of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PreconditionError
from onnxq.graph.edit import validate
from onnxq.passes.contract import Budget, Context, DeclaredArtifacts, Pass
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.decide.partial import Partial
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.prepare.canonicalize import Canonicalize
from onnxq.passes.targets import parse_target

from .. import helpers as h
from ..blocks import MASKS, Block, block, samples

CLOSE = 0.995
"""Cosine of a layer in 8 bits with itself in float32, on Gaussian numbers."""


def quantized(
    model: ir.Model, feeds: list[h.Feeds], *before: Pass, target: str = "cpu", **options: Any
) -> ir.Model:
    passes = [*before, Calibrate(margin=1.0), Assign(**options), Qdq()]
    return h.apply(model, *passes, samples=feeds, target=target).model


def linear_model(kind: str, bias: bool = True, k: int = 40, n: int = 24) -> ir.Model:
    """One layer ``[N, k] -> [N, n]``."""
    weights = {"w": h.normal(k, n, scale=0.3), "b": h.normal(n, seed=1)}
    weights["wt"] = np.ascontiguousarray(weights["w"].T)
    body = {
        "matmul": "m = MatMul(x, w) y = Add(m, b)" if bias else "y = MatMul(x, w)",
        "transposed": "t = Transpose <perm = [1, 0]> (wt) y = MatMul(x, t)",
        "gemm": f"y = Gemm(x, w{', b' if bias else ''})",
        "gemm, transB": f"y = Gemm <transB = 1> (x, wt{', b' if bias else ''})",
        "gemm, then add": "m = Gemm <transB = 1> (x, wt) y = Add(m, b)",
    }[kind]
    used = {name: array for name, array in weights.items() if re.search(rf"\b{name}\b", body)}
    return h.model_of(f"g (float[N, {k}] x) => (float[N, {n}] y) {{ {body} }}", used)


def linear_feeds(k: int = 40) -> list[h.Feeds]:
    return [{"x": h.normal(16, k, seed=s)} for s in range(3)]


KINDS = ["matmul", "transposed", "gemm", "gemm, transB", "gemm, then add"]


def weight_codes(model: ir.Model) -> h.Array:
    (name,) = (n for n in model.graph.initializers if n.endswith("weight_quantized"))
    return h.const(model, name)


# Static ---------------------------------------------------------------------------------------


def rounded(x: h.Array, lo: float, hi: float) -> h.Array:
    """QuantizeLinear then DequantizeLinear to uint8 as the ONNX standard defines them."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = np.float32((hi - lo) / 255)
    zero = np.clip(np.rint(-lo / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255)
    return ((codes - zero) * scale).astype(np.float64)


def rounded_weight(w: h.Array) -> h.Array:
    """Symmetric int8, one scale a column of ``[K, N]``."""
    scale = (np.abs(w).max(axis=0) / 127).astype(np.float32)
    return np.clip(np.rint(w / scale), -127, 127) * scale.astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_layer_is_the_product_of_what_was_rounded(kind: str) -> None:
    model, feeds = linear_model(kind), linear_feeds()
    done = quantized(model, feeds)
    xs = np.concatenate([f["x"] for f in feeds])
    w = h.normal(40, 24, scale=0.3)
    want = rounded(feeds[0]["x"], xs.min(), xs.max()) @ rounded_weight(w)
    if kind != "transposed":
        want += h.normal(24, seed=1)
    assert h.relative_error(want, h.run(done, feeds[0])["y"]) < 1e-4
    assert weight_codes(done).dtype == np.int8


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("matmul", "QGemm"),
        ("transposed", "MatMulIntegerToFloat"),
        ("gemm", "QGemm"),
        ("gemm, transB", "QGemm"),
        ("gemm, then add", "QGemm"),
    ],
)
def test_onnxruntime_runs_a_static_layer_on_integers(
    kind: str, kernel: str, tmp_path: Path
) -> None:
    model, feeds = linear_model(kind), linear_feeds()
    done = quantized(model, feeds, Canonicalize())
    fused = h.fused_ops(done, tmp_path)
    assert fused[kernel] == 1, fused
    assert not fused["MatMul"] + fused["Gemm"]
    exact = h.run(model, feeds[0])["y"]
    assert h.cosine(exact, h.run(done, feeds[0], optimised=True)["y"]) > CLOSE


CONV = """g (float[1, 8, 10, 10] x) => (float[1, 16, A, B] y) {{
    c = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = {groups}> (x, w, b)
    y = {after}(c)
}}"""


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("after", ["Relu", "Identity"])
def test_a_convolution_runs_on_integers(groups: int, after: str, tmp_path: Path) -> None:
    weights = {"w": h.normal(16, 8 // groups, 3, 3, scale=0.3), "b": h.normal(16, seed=1)}
    model = h.model_of(CONV.format(groups=groups, after=after), weights)
    feeds = [{"x": h.normal(1, 8, 10, 10, seed=s)} for s in range(3)]
    done = quantized(model, feeds, Canonicalize())
    fused = h.fused_ops(done, tmp_path)
    assert fused["QLinearConv"] == 1, fused
    assert not fused["Conv"] + fused["Relu"]
    for optimised in (False, True):
        got = h.run(done, feeds[0], optimised=optimised)["y"]
        assert h.cosine(h.run(model, feeds[0])["y"], got) > CLOSE


def test_convolution_weights_have_one_scale_a_channel() -> None:
    w = h.normal(16, 4, 3, 3) * np.logspace(-3, 0, 16).reshape(-1, 1, 1, 1).astype(np.float32)
    model = h.model_of(
        "g (float[1, 4, 6, 6] x) => (float[1, 16, A, B] y) { y = Conv(x, w) }", {"w": w}
    )
    done = quantized(model, [{"x": h.normal(1, 4, 6, 6)}])
    (scale,) = (n for n in done.graph.initializers if n.endswith("weight_scale"))
    want = np.abs(w).max(axis=(1, 2, 3)) / 127
    np.testing.assert_allclose(h.const(done, scale), want, rtol=1e-6)
    codes = weight_codes(done) * want.reshape(-1, 1, 1, 1)
    assert np.abs(codes - w).max() <= want.max() / 2 * 1.001


def cnn() -> tuple[ir.Model, list[h.Feeds]]:
    """Conv, ReLU6, residual Add, poolings, Flatten and a Gemm."""
    model = h.model_of(
        """g (float[1, 3, 8, 8] x) => (float[1, 10] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            ar = Clip(a, zero, six)
            m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (ar)
            c = Conv <pads = [1, 1, 1, 1]> (m, w2, b1)
            s = Add(c, m)
            sr = Relu(s)
            p = GlobalAveragePool(sr)
            f = Flatten(p)
            y = Gemm <transB = 1> (f, fc, fb)
        }""",
        {
            "w1": h.normal(8, 3, 3, 3, scale=0.3),
            "w2": h.normal(8, 8, 3, 3, seed=1, scale=0.2),
            "b1": h.normal(8, seed=2),
            "fc": h.normal(10, 8, seed=3),
            "fb": h.normal(10, seed=4),
            "zero": np.array(0, np.float32),
            "six": np.array(6, np.float32),
        },
    )
    return model, [{"x": h.normal(1, 3, 8, 8, seed=s)} for s in range(4)]


def test_codes_flow_through_a_small_cnn(tmp_path: Path) -> None:
    model, feeds = cnn()
    done = quantized(model, feeds, Canonicalize())
    fused = h.fused_ops(done, tmp_path)
    assert fused["QLinearConv"] == 2
    assert fused["QLinearAdd"] == 1
    assert fused["QLinearGlobalAveragePool"] == 1
    assert fused["QGemm"] == 1
    assert fused["QuantizeLinear"] == 1, "only the input is quantized"
    assert not fused["Conv"] + fused["Clip"] + fused["Relu"] + fused["Add"] + fused["Gemm"]
    for sample in feeds:
        exact = h.run(model, sample)["y"]
        assert h.cosine(exact, h.run(done, sample, optimised=True)["y"]) > CLOSE


def test_a_pooling_shares_the_codes_of_what_it_reads() -> None:
    model, feeds = cnn()
    done = quantized(model, feeds, Canonicalize())
    pool = next(n for n in done.graph if n.op_type == "MaxPool")
    before = pool.inputs[0].producer()
    (after,) = (n for n in pool.outputs[0].consumers() if n.op_type == "QuantizeLinear")
    assert before is not None
    assert before.op_type == "DequantizeLinear"
    assert before.inputs[1] is after.inputs[1]
    assert before.inputs[2] is after.inputs[2]


def test_two_heads_read_one_quantized_value() -> None:
    model = h.model_of(
        """g (float[N, 40] x) => (float[N, 8] y, float[N, 8] z, float[N, 40] r) {
            y = MatMul(x, w1)
            z = MatMul(x, w2)
            r = Relu(x)
        }""",
        {"w1": h.normal(40, 8), "w2": h.normal(40, 8, seed=1)},
    )
    done = quantized(model, linear_feeds())
    assert h.ops(done)["QuantizeLinear"] == 1
    relu = next(n for n in done.graph if n.op_type == "Relu")
    assert relu.inputs[0] is done.graph.inputs[0], "a float reader sees the float value"


@pytest.mark.parametrize("options", [{}, {"mode": "dynamic"}, {"mode": "weight-only", "block": 16}])
def test_layers_that_share_a_weight_and_feed_each_other(options: dict[str, Any]) -> None:
    """The second layer reads the first one's output as such, with nothing between."""
    model = h.model_of(
        """g (float[N, 32] x) => (float[N, 32] y, float[N, 32] z) {
            z = MatMul(x, w)
            y = MatMul(z, w)
        }""",
        {"w": h.normal(32, 32, scale=0.2)},
    )
    feeds = linear_feeds(32)
    done = quantized(model, feeds, **options)
    exact, got = h.run(model, feeds[0]), h.run(done, feeds[0], optimised=True)
    for name, array in exact.items():
        assert h.cosine(array, got[name]) > 0.99, name
    np.testing.assert_array_equal(h.const(model, "w"), h.normal(32, 32, scale=0.2))


def test_a_large_bias_over_small_weights_does_not_overflow_int32() -> None:
    """bias / (input scale * weight scale) would be 5e11: the bias has to stay float."""
    model = h.model_of(
        "g (float[N, 8] x) => (float[N, 4] y) { y = Gemm(x, w, b) }",
        {"w": h.normal(8, 4, scale=1e-7), "b": np.array([500, -500, 0, 1], np.float32)},
    )
    feeds = [{"x": h.normal(4, 8)}]
    done = quantized(model, feeds)
    np.testing.assert_allclose(h.run(done, feeds[0])["y"], h.run(model, feeds[0])["y"], 1e-3, 1e-6)


def test_a_column_of_zeros_stays_zero() -> None:
    w = h.normal(40, 24)
    w[:, 3] = 0
    model = h.model_of("g (float[N, 40] x) => (float[N, 24] y) { y = MatMul(x, w) }", {"w": w})
    for options in (
        {},
        {"mode": "dynamic"},
        {"mode": "weight-only", "weights": "int4", "block": 16},
    ):
        done = quantized(model, linear_feeds(), **options)
        got = h.run(done, linear_feeds()[0], optimised=True)["y"]
        assert np.abs(got[:, 3]).max() < 1e-4 * np.abs(got).max()
        assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("options", "opset", "least"),
    [
        ({"activations": "uint16"}, 21, 0.9999),
        ({"weights": "int4"}, 21, 0.98),
        ({"weights": "int2"}, 25, 0.5),
    ],
)
def test_the_opset_is_raised_to_what_the_formats_need(
    options: dict[str, Any], opset: int, least: float
) -> None:
    model, feeds = linear_model("matmul"), linear_feeds()
    done = quantized(model, feeds, Canonicalize(), **options)
    assert done.opset_imports[""] == opset
    if opset <= 21:
        assert h.cosine(h.run(model, feeds[0])["y"], h.run(done, feeds[0])["y"]) > least
    with pytest.raises(PreconditionError) as caught:
        h.apply(model, Calibrate(), Assign(**options), Qdq(), samples=feeds)
    assert caught.value.code == "PASS-OPSET"
    assert f"canonicalize{{opset={opset}}}" in caught.value.hint


# Dynamic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_dynamic_layer_takes_its_range_at_run_time(kind: str, tmp_path: Path) -> None:
    model, feeds = linear_model(kind), linear_feeds()
    done = quantized(model, feeds, Canonicalize(), mode="dynamic")
    assert h.ops(done)["DynamicQuantizeLinear"] == 1
    fused = h.fused_ops(done, tmp_path)
    assert fused["DynamicQuantizeMatMul"] == 1, fused
    assert not fused["MatMul"] + fused["Gemm"] + fused["MatMulInteger"]
    large = {"x": 1000 * h.normal(16, 40, seed=9)}  # a thousand times what was calibrated on
    x = large["x"]
    want = rounded(x, float(x.min()), float(x.max())) @ rounded_weight(h.normal(40, 24, scale=0.3))
    if kind != "transposed":
        want += h.normal(24, seed=1)
    assert h.relative_error(want, h.run(done, large)["y"]) < 1e-4
    assert h.cosine(want, h.run(done, large, optimised=True)["y"]) > 0.9999


def test_layers_that_read_one_value_quantize_it_once(tmp_path: Path) -> None:
    done = quantized(block(), samples(), Canonicalize(), mode="dynamic")
    assert h.ops(done)["DynamicQuantizeLinear"] == 4
    assert h.ops(done)["MatMulInteger"] == 6
    fused = h.fused_ops(done, tmp_path)
    assert fused["DynamicQuantizeMatMul"] + fused["MatMulIntegerToFloat"] == 6, fused


# Weights only ---------------------------------------------------------------------------------


def nibbles(model: ir.Model, k: int) -> h.Array:
    """MatMulNBits' ``[N, blocks, bytes]`` as ``[N, K]`` codes, low nibble first."""
    (name,) = (n for n in model.graph.initializers if n.endswith("packed"))
    packed = h.const(model, name)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return codes[:, :k].astype(np.float64)


@pytest.mark.parametrize("k", [32, 64, 40, 70])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["matmul", "gemm, transB"])
def test_packed_codes_stand_for_the_weight(k: int, symmetric: bool, kind: str) -> None:
    """The last block is shorter when 32 does not divide K."""
    n = 24
    model, feeds = linear_model(kind, k=k, n=n), linear_feeds(k)
    done = quantized(
        model, feeds, mode="weight-only", weights="int4", block=32, symmetric_weights=symmetric
    )
    blocks = -(-k // 32)
    (scale,) = (x for x in done.graph.initializers if x.endswith("weight_scale"))
    scales = h.const(done, scale).reshape(n, blocks)
    zeros = np.full((n, blocks), 8.0)
    if not symmetric:
        (name,) = (x for x in done.graph.initializers if x.endswith("zero_point"))
        packed = h.const(done, name).reshape(n, -1)
        zeros = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, -1)[:, :blocks]
    of_block = np.arange(k) // 32
    w = (nibbles(done, k) - zeros[:, of_block]) * scales[:, of_block]
    exact = h.normal(k, n, scale=0.3).T
    # Signed scales reach 8 steps to the side of the largest weight, 7 to the other.
    steps = 1.0001 if symmetric else 0.5001
    assert np.all(np.abs(w - exact) <= np.abs(scales[:, of_block]) * steps)
    x = feeds[0]["x"].astype(np.float64)
    want = x @ w.T + h.normal(n, seed=1)
    assert h.cosine(want, h.run(done, feeds[0])["y"]) > 0.9995  # activations round to int8
    assert h.ops(done)["MatMulNBits"] == 1
    assert not h.ops(done)["Add"], "the bias is inside"


def test_eight_bit_blocks_are_packed_too() -> None:
    model, feeds = linear_model("matmul", k=64), linear_feeds(64)
    done = quantized(model, feeds, mode="weight-only", weights="int8", block=32)
    assert h.ops(done)["MatMulNBits"] == 1
    assert h.cosine(h.run(model, feeds[0])["y"], h.run(done, feeds[0])["y"]) > 0.9995


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["int4", "uint4"])
def test_targets_without_the_packed_operator_get_standard_blocks(kind: str, weights: str) -> None:
    model, feeds = linear_model(kind, k=64), linear_feeds(64)
    options = {"mode": "weight-only", "weights": weights, "block": 64, "target": "tensorrt"}
    options["symmetric_weights"] = weights == "int4"
    done = quantized(model, feeds, Canonicalize(), **options)
    assert not h.ops(done)["MatMulNBits"]
    (node,) = (n for n in done.graph if n.op_type == "DequantizeLinear")
    assert node.attributes["block_size"].as_int() == 64
    assert h.cosine(h.run(model, feeds[0])["y"], h.run(done, feeds[0])["y"]) > 0.98


# Embeddings -----------------------------------------------------------------------------------


def test_an_embedding_is_stored_by_rows() -> None:
    table = h.normal(500, 64) * np.logspace(-3, 1, 500).reshape(-1, 1).astype(np.float32)
    model = h.model_of(
        "g (int64[N, 3] i) => (float[N, 3, 64] y) { y = Gather(table, i) }", {"table": table}
    )
    done = h.apply(model, Assign(mode="weight-only"), Qdq()).model
    ids = np.array([[0, 250, 499], [3, 3, 10]])
    want = table[ids].astype(np.float64)
    step = np.abs(want).max(axis=-1, keepdims=True) / 127
    assert np.all(np.abs(h.run(done, {"i": ids})["y"] - want) <= step * 0.5001)
    sizes = [t.nbytes for v in done.graph.initializers.values() if (t := v.const_value)]
    assert sum(sizes) == 500 * 64 + 500 * 4
    assert done.graph.outputs[0].name == "y"


# Together -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("guard", [False, True])
def test_no_mask_constant_ruins_a_padded_batch(mask: str, guard: bool) -> None:
    from onnxq.passes.transform.simplify_attention import SimplifyAttention
    from onnxq.passes.transform.smooth_quant import SmoothQuant

    model = block(Block(mask=MASKS[mask], guard=guard), outliers=True)
    before = [Canonicalize(), SimplifyAttention(), Calibrate(), SmoothQuant()]
    done = quantized(model, samples(8), *before)
    for sample in samples(8):
        exact = h.run(model, sample)["y"]
        for optimised in (False, True):
            assert h.cosine(exact, h.run(done, sample, optimised=optimised)["y"]) >= 0.99


def test_what_partial_left_in_float_is_not_touched() -> None:
    model, feeds = cnn()
    clean = h.apply(model, Canonicalize()).model
    result = h.apply(
        clean, Calibrate(), Assign(), Partial(op_types=("Gemm",)), Qdq(), samples=feeds
    )
    gemm = next(n for n in result.model.graph if n.op_type == "Gemm")
    weight = gemm.inputs[1]
    assert weight is not None
    assert weight.name == "fc"


def test_a_quantized_model_is_quantized_no_further() -> None:
    model, feeds = cnn()
    once = quantized(model, feeds, Canonicalize())
    again = h.apply(once, Canonicalize(), Calibrate(), Assign(), samples=feeds)
    assert not h.report_of(again, "assign").changed
    assert "quantized already" in h.reasons(h.report_of(again, "assign"))
    h.assert_same_function(once, again.model, feeds)


@pytest.mark.parametrize("limit", [0, 1, 2, 4])
def test_a_budget_lowers_only_the_first_sites(limit: int) -> None:
    """``--bisect`` runs the pass with fewer and fewer rewrites; each model must be valid."""
    model, feeds = cnn()
    clean = h.apply(model, Canonicalize())
    planned = h.apply(clean.model, Calibrate(), Assign(), samples=feeds)
    budget, how = Budget(limit), Qdq()
    done = ir.from_proto(ir.to_proto(planned.model))
    artifacts = DeclaredArtifacts(planned.artifacts, how)
    context = Context(artifacts, parse_target("cpu"), None, None, model, budget=budget)
    report = how.run(done, context)
    validate(done)
    assert len(report.changed) == len(budget.sites) == limit
    assert (h.ops(done)["QuantizeLinear"] > 0) is (limit > 0)
    exact = h.run(model, feeds[0])["y"]
    assert h.cosine(exact, h.run(done, feeds[0])["y"]) > CLOSE
