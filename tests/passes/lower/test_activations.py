"""Activations rounded at run time: the bodies against the formats, group by group."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PreconditionError, SpecError
from onnxq.formats import Granularity, parse_format
from onnxq.graph.match import analyze
from onnxq.passes.decide.assign import Assign
from onnxq.passes.lower.activations import ActivationRounding, rounded_values
from onnxq.passes.lower.pack import Pack
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.plan import ActivationPlan
from tests.passes.helpers import (
    Array,
    apply,
    model_of,
    normal,
    ops,
    reasons,
    report_of,
    run,
    values,
)
from tests.passes.transform.wide import llama

NAMES = (
    "int8", "int4", "int3", "int4-narrow", "int8-asym", "int4g32-asym", "uint4g16-asym", "int4g32",
    "fp8e4m3", "fp8e5m2", "fp8e4m3g32", "fp4", "fp4g16", "mxfp4", "mxfp4-ceil", "mxfp6e2m3",
    "mxfp6e3m2", "mxfp8e4m3", "mxfp8e5m2", "mxint8", "nvfp4",
)  # fmt: skip


def rounded(x: Array, name: str, clip: float = 1.0) -> Array:
    """``x`` through the node, as onnxruntime runs it."""
    dims = ", ".join(map(str, x.shape))
    body = f"g (float[{dims}] x) => (float[{dims}] y) {{ y = Neg (x) }}"
    model = model_of(body, opset=21, ir_version=10)
    ActivationRounding(model).read_rounded(
        model.graph.node(0), 0, x.shape[-1], ActivationPlan(name, clip)
    )
    result: Array = -run(model, {"x": x})["y"]
    return result


def expected(x: Array, name: str) -> Array:
    """The format's own numpy, row by row, so that NVFP4's tensor is a token."""
    fmt = parse_format(name)
    granularity = None if fmt.block else Granularity.per_tensor()
    rows = [fmt.fake_quant(row[None], granularity) for row in x.reshape(-1, x.shape[-1])]
    return np.concatenate(rows).reshape(x.shape)


def wide_values(seed: int = 0) -> Array:
    """Rows of sizes from 1e-6 to 1e4, with outliers, a row and a block of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 9, 96)) * 10.0 ** rng.uniform(-6, 4, (3, 9, 1))
    x[0, 1, 7] *= 300
    x[1, 2], x[1, 3, 32:64] = 0, 0
    return x.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_body_computes_what_the_format_says(name: str) -> None:
    x = wide_values()
    got, exact = rounded(x, name), expected(x, name)
    # A tie may fall either way where a scale is rounded otherwise; nothing else may differ.
    close = np.isclose(got, exact, rtol=1e-5, atol=0)
    assert close.mean() > 0.999
    gaps = (
        np.abs(got - exact)[~close] / np.abs(x).max(axis=-1, keepdims=True).repeat(96, -1)[~close]
    )
    assert (gaps < 0.6).all()
    assert (got[1, 2] == 0).all()


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_in_numpy(name: str, clip: float) -> None:
    """What solvers see of a layer's inputs is what onnxruntime computes."""
    x = wide_values(1)
    plan = ActivationPlan(name, clip if "mx" not in name and name != "nvfp4" else 1.0)
    got = rounded(x, name, plan.clip)
    same = np.isclose(rounded_values(x, plan), got, rtol=1e-6, atol=0)
    assert same.mean() > 0.9999


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-ceil", "mxfp8e4m3", "mxint8"])
def test_blocks_right_at_powers_of_two(name: str) -> None:
    """floor(log2) must be exact just below, at and just above each power."""
    powers = (2.0 ** np.arange(-100, 100, dtype=np.float64)).astype(np.float32)
    below, above = np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(3e38))
    tops = np.concatenate([below, powers, above])
    x = (normal(len(tops), 32).clip(-0.9, 0.9) * tops[:, None]).astype(np.float32)
    x[:, 3] = tops
    np.testing.assert_array_equal(rounded(x, name), expected(x, name))


def test_every_level_and_tie_of_fp4() -> None:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], np.float32)
    x = np.concatenate([ties, -ties, np.zeros(16, np.float32)])[None]
    nearest = [0, 1, 1, 2, 2, 4, 4, 6]
    np.testing.assert_array_equal(rounded(x, "mxfp4")[0, :8], nearest)
    np.testing.assert_array_equal(rounded(x, "mxfp4")[0, 8:16], -np.array(nearest))


def test_clip_shortens_the_reach() -> None:
    x = np.array([[10.0, 1.0, -10.0, 0.4]], np.float32)
    step = 9.0 / 7
    want = step * np.clip(np.rint(x / step), -8, 7)
    np.testing.assert_allclose(rounded(x, "int4", clip=0.9), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_no_rows(name: str) -> None:
    assert rounded(np.zeros((0, 32), np.float32), name).shape == (0, 32)


@pytest.mark.parametrize("name", ["int8", "mxfp4", "nvfp4", "fp8e4m3"])
def test_faults_stay_visible(name: str) -> None:
    x = normal(2, 32)
    x[0, 5] = np.nan
    got = rounded(x, name)
    assert np.isnan(got[0, 5])
    np.testing.assert_array_equal(got[1], rounded(x[1:], name)[0])


def test_a_token_does_not_depend_on_its_batch() -> None:
    x = wide_values(1)
    for name in ("nvfp4", "int4", "mxfp4"):
        np.testing.assert_array_equal(rounded(x, name)[1, 4], rounded(x[1:2, 4:5], name)[0, 0])


# Through the pipeline -------------------------------------------------------------------------

TWO = """g (float[5, 64] x) => (float[5, 32] y, float[5, 16] z) {
  a = Relu (x)
  y = MatMul (a, v)
  z = MatMul (a, w)
}"""
WEIGHTS = {"v": normal(64, 32, seed=1), "w": normal(64, 16, seed=2)}


def planned(**options: object) -> tuple[ir.Model, Array, Array]:
    model = model_of(TWO, WEIGHTS, opset=21, ir_version=10)
    done = apply(model, Assign(mode="per-token", **options), Qdq()).model  # type: ignore[arg-type]
    x = normal(5, 64, seed=3)
    return done, run(done, {"x": x})["y"], x


@pytest.mark.parametrize(
    ("weights", "activations", "block"),
    [("int8", "int8", 0), ("int4", "int8", 32), ("int4", "int4g32", 32), ("mxfp4", "mxfp4", 0),
     ("nvfp4", "nvfp4", 0), ("int4", "float8", 32)],
)  # fmt: skip
def test_products_of_rounded_operands(weights: str, activations: str, block: int) -> None:
    if activations == "float8":
        activations = "fp8e4m3"
    done, y, x = planned(weights=weights, activations=activations, block=block)
    assert ops(done)["QuantizeBlock"] == 1  # shared by both
    left = expected(np.maximum(x, 0), activations)
    name = f"{weights}g{block}-full" if block else weights
    fmt = parse_format(name)
    granularity = Granularity.per_channel(0) if not fmt.block else None
    right = fmt.fake_quant(np.ascontiguousarray(WEIGHTS["v"].T), granularity).T
    np.testing.assert_allclose(y, left @ right, rtol=2e-4, atol=2e-4)


def test_int8_tokens_are_packed() -> None:
    model = model_of(TWO, WEIGHTS, opset=21, ir_version=10)
    result = apply(model, Assign(mode="per-token"), Pack())
    assert ops(result.model)["QuantMatMul"] == 2
    _, y, x = planned()
    np.testing.assert_allclose(run(result.model, {"x": x})["y"], y, rtol=0.01, atol=0.01)


def test_int8_groups_of_the_weight_are_rounded_inside() -> None:
    model = model_of(TWO, WEIGHTS, opset=21, ir_version=10)
    assign = Assign(mode="per-token", activations="int8g32", weights="int4", block=32)
    packed = apply(model, assign, Pack()).model
    assert ops(packed)["QuantMatMul"] == 2
    assert ops(packed)["QuantizeBlock"] == 0
    x = normal(5, 64, seed=3)
    _, y, _ = planned(activations="int8g32", weights="int4", block=32)
    np.testing.assert_allclose(run(packed, {"x": x})["y"], y, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("options", [
    {"activations": "mxfp4", "weights": "mxfp4"}, {"activations": "nvfp4", "weights": "nvfp4"},
    {"activations": "int4", "weights": "int4", "clip": 0.9}, {"activations": "int8", "clip": 0.9},
    {"activations": "int8-asym"},
])  # fmt: skip
def test_other_formats_are_packed_behind_a_rounding(options: dict[str, object]) -> None:
    """The same numbers as `qdq` gives, but for the scales of weights in half precision."""
    model = model_of(TWO, WEIGHTS, opset=21, ir_version=10)
    packed = apply(model, Assign(mode="per-token", **options), Pack()).model  # type: ignore[arg-type]
    assert ops(packed)["QuantMatMul"] == 2
    assert ops(packed)["QuantizeBlock"] + ops(packed)["Int8Asym"] == 1  # shared by both
    _, y, x = planned(**options)
    np.testing.assert_allclose(run(packed, {"x": x})["y"], y, rtol=2e-3, atol=2e-3)


def test_widths_that_blocks_do_not_divide_stay_float_with_the_reason() -> None:
    body = "g (float[2, 40] x) => (float[2, 4] y) { y = MatMul (x, w) }"
    model = model_of(body, {"w": normal(40, 4)}, opset=21, ir_version=10)
    result = apply(model, Assign(mode="per-token", activations="mxfp4", weights="mxfp4"))
    assert "not divided by blocks of 32" in reasons(report_of(result, "assign"))


def test_an_old_opset_is_refused_with_the_fix() -> None:
    body = "g (float[2, 32] x) => (float[2, 4] y) { y = MatMul (x, w) }"
    model = model_of(body, {"w": normal(32, 4)}, opset=17)
    with pytest.raises(PreconditionError, match="opset 18"):
        apply(model, Assign(mode="per-token"), Qdq())


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "nf4"},
        {"activations": "int4-full"},
        {"activations": "nvfp4-46"},
        {"clip": 0.0},
        {"clip": 1.5},
        {"activations": "mxfp4", "clip": 0.9},
        {"mode": "static", "clip": 0.9},
        {"mode": "static", "activations": "mxfp4"},
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        Assign(**{"mode": "per-token", **options})  # type: ignore[arg-type]


def test_keys_and_values_are_rounded_where_attention_reads_them() -> None:
    model = small_decoder()
    done = apply(model, Assign(mode="per-token", cache="int4-asym"), Qdq())
    rounding = [n for n in done.model.graph if n.op_type == "Int4Asym"]
    assert len(rounding) == 4  # keys and values of two layers
    structure = analyze(model)
    tokens = {"input_ids": np.arange(9)[None] % 50}
    names = [str(node.inputs[0].name) for node in rounding if node.inputs[0] is not None]
    names += [str(node.outputs[0].name) for node in rounding]
    found = values(done.model, tokens, names)
    for before, after in zip(names[:4], names[4:], strict=True):
        np.testing.assert_allclose(
            found[after].reshape(-1, 8),
            expected(found[before].reshape(-1, 8), "int4-asym"),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    assert len(structure.attentions) == 2
    with pytest.raises(SpecError, match="cache=int4"):
        Assign(cache="int4")


def test_a_cache_that_blocks_do_not_divide_stays_float() -> None:
    result = apply(small_decoder(), Assign(mode="per-token", cache="int4g32"))
    assert "heads of 8 are not divided by blocks of 32" in reasons(report_of(result, "assign"))


def small_decoder() -> ir.Model:
    """Two layers, four query heads of 8 on two value heads, in float32."""
    return llama(hidden=32, heads=4, kv_heads=2, double=False)
