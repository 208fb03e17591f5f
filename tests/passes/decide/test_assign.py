"""assign: the plan of a small CNN and of a transformer block, and the reasons for what stays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import SpecError, UnsupportedError
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.keys import PLAN
from onnxq.passes.plan import QuantPlan
from onnxq.passes.prepare.canonicalize import Canonicalize

from .. import helpers as h
from ..blocks import Block, block, samples


def plan_of(
    model: ir.Model, feeds: list[h.Feeds], *, target: str = "cpu", **options: Any
) -> tuple[QuantPlan, PassReport]:
    passes = (Canonicalize(), Calibrate(margin=1.0), Assign(**options))
    result = h.apply(model, *passes, samples=feeds, target=target)
    return result.artifacts.get(PLAN), h.report_of(result, "assign")


def cnn() -> ir.Model:
    return h.model_of(
        """g (float[1, 3, 8, 8] x) => (float[1, 10] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            ar = Clip(a, zero, six)
            c = Conv <pads = [1, 1, 1, 1]> (ar, w2)
            s = Add(c, ar)
            sr = Relu(s)
            p = GlobalAveragePool(sr)
            f = Flatten(p)
            y = Gemm(f, fc)
        }""",
        {
            "w1": h.normal(8, 3, 3, 3),
            "w2": h.normal(8, 8, 3, 3, seed=1),
            "fc": h.normal(8, 10, seed=2),
            "zero": np.array(0, np.float32),
            "six": np.array(6, np.float32),
        },
    )


CNN_FEEDS = [{"x": h.normal(1, 3, 8, 8, seed=s)} for s in range(3)]


def test_a_cnn_is_planned_as_one_region_of_integers() -> None:
    plan, _ = plan_of(cnn(), CNN_FEEDS)
    got = {s.site: (s.kind, s.mode, s.inputs, s.output) for s in plan.sites.values()}
    assert got == {
        "a": ("conv", "static", ("x",), "ar"),
        "c": ("conv", "static", ("ar",), "c"),
        "s": ("op", "static", ("c", "ar"), "sr"),
        "p": ("op", "static", ("sr",), "p"),
        "f": ("op", "static", ("p",), "f"),
        "y": ("gemm", "static", ("f",), ""),
    }
    assert not plan.floats
    assert all(s.weight.per_channel for s in plan.sites.values() if s.weight)


def test_ranges_are_those_of_the_values_within_what_a_clamp_allows() -> None:
    plan, _ = plan_of(cnn(), CNN_FEEDS)
    names = ["ar", "c", "sr", "p", "f"]
    seen = [h.values(cnn(), feeds, names) for feeds in CNN_FEEDS]
    for name in names:
        lo = min(float(v[name].min()) for v in seen)
        hi = max(float(v[name].max()) for v in seen)
        planned = plan.values[name]
        assert planned.lo == pytest.approx(min(lo, 0.0), rel=1e-5)
        assert planned.hi == pytest.approx(max(hi, 0.0), rel=1e-5)
    assert (plan.values["ar"].lo, plan.values["ar"].hi) == (0.0, 6.0)
    assert plan.values["f"].same_as == "p"


def test_between_the_layers_of_a_transformer_everything_stays_float() -> None:
    plan, report = plan_of(block(Block(mask=-1e4)), samples())
    assert {s.kind for s in plan.sites.values()} == {"matmul"}
    assert len(plan.sites) == 6
    assert not any(s.output for s in plan.sites.values())
    text = h.reasons(report)
    for reason in (
        "layernorm stays float",
        "gelu stays float",
        "mask constant",
        "both operands are activations",
        "residual add stays float",
    ):
        assert reason in text


def test_a_pooling_behind_a_float_value_stays_float() -> None:
    model = h.model_of(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 1, 1] y, float[1, 3, 1, 1] z) {
            a = Conv(x, w)
            t = Tanh(a)
            y = GlobalAveragePool(t)
            z = GlobalAveragePool(x)
        }""",
        {"w": h.normal(4, 3, 3, 3)},
    )
    plan, _ = plan_of(model, CNN_FEEDS)
    assert list(plan.sites) == ["a"]


def test_small_and_unwanted_tables_stay_float() -> None:
    model = h.model_of(
        """g (int64[N] i) => (float[N, 64] y) {
            a = Gather(large, i)
            b = Gather(small, i)
            y = Add(a, b)
        }""",
        {"large": h.normal(1000, 64), "small": h.normal(20, 64)},
    )
    feeds = [{"i": np.array([1, 2])}]
    plan, report = plan_of(model, feeds, mode="weight-only")
    assert plan.sites["a"].kind == "embedding"
    assert "b: a table of 5,120 bytes: too small" in h.reasons(report)
    plan, report = plan_of(model, feeds, mode="weight-only", embeddings="float")
    assert not plan.sites
    assert "embeddings=float" in h.reasons(report)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("dynamic", "slower than float"), ("weight-only", "no kernel on packed weights")],
)
def test_convolutions_stay_float_outside_static_mode(mode: str, reason: str) -> None:
    plan, report = plan_of(cnn(), CNN_FEEDS, mode=mode)
    assert [s.kind for s in plan.sites.values()] == ["gemm"]
    assert reason in h.reasons(report)


def test_layers_of_other_types_say_so() -> None:
    half = h.normal(8, 4).astype(np.float16)
    model = h.model_of("g (float16[N, 8] x) => (float16[N, 4] y) { y = MatMul(x, w) }", {"w": half})
    _, report = plan_of(model, [{"x": h.normal(2, 8).astype(np.float16)}])
    assert not report.changed
    assert "only float32 layers" in h.reasons(report)


def test_near_misses_and_layers_that_no_pass_treats_say_why() -> None:
    model = h.model_of(
        """g (float[S, 1, 8] x, float[8, 8] dynamic)
            => (float[S, 1, 8] y, float[S, D, 1, 8] r, float[S, 1, 8] i) {
            a = MatMul(w, x)
            y = MatMul(x, dynamic)
            r = LSTM <hidden_size = 8> (x, lw, lr)
            q, qs, qz = DynamicQuantizeLinear(a)
            p = MatMulInteger(q, codes)
            i = Cast <to = 1> (p)
        }""",
        {
            "w": h.normal(1, 1),
            "lw": h.normal(1, 32, 8),
            "lr": h.normal(1, 32, 8, seed=1),
            "codes": np.ones((8, 8), np.uint8),
        },
    )
    _, report = plan_of(model, [{"x": h.normal(3, 1, 8), "dynamic": h.normal(8, 8)}])
    text = h.reasons(report)
    assert "the constant is the left operand" in text
    assert "LSTM stays float" in text
    assert "MatMulInteger computes on integers already" in text


def test_layers_inside_of_branches_are_counted() -> None:
    model = h.model_of(
        """g (float[2, 8] x, bool c) => (float[2, 8] y) {
            y = If (c) <
                then_branch = t () => (float[2, 8] a) { a = MatMul(x, w) },
                else_branch = e () => (float[2, 8] b) { b = Neg(x) }
            >
        }""",
        {"w": h.normal(8, 8)},
    )
    _, report = plan_of(model, [{"x": h.normal(2, 8), "c": np.array(True)}])
    assert "1 linear layers inside of subgraphs" in h.reasons(report)


def test_the_target_chooses_formats() -> None:
    plan, _ = plan_of(block(), samples(), target="tensorrt")
    assert {(v.format, v.symmetric) for v in plan.values.values()} == {("int8", True)}
    plan, _ = plan_of(h.fixed(block(), 2), samples(), target="qnn")
    assert not any(s.weight.per_channel for s in plan.sites.values() if s.weight)
    with pytest.raises(UnsupportedError) as caught:
        plan_of(block(), samples(), target="tensorrt", mode="dynamic")
    assert caught.value.code == "TARGET-DYNAMIC"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"weights": "fp8e4m3"}, "SPEC-FORMAT"),
        ({"activations": "uint5"}, "SPEC-FORMAT"),
        ({"block": 24}, "SPEC-RANGE"),
        ({"mode": "weight-only", "weights": "int4", "block": 1 << 32}, "SPEC-RANGE"),
        ({"mode": "weight-only", "weights": f"int4g{1 << 32}"}, "SPEC-RANGE"),
        ({"weights": "int8", "symmetric_weights": False}, "SPEC-COMBINATION"),
        ({"block": 32}, "SPEC-COMBINATION"),
        ({"mode": "dynamic", "block": 32}, "SPEC-COMBINATION"),
        ({"mode": "dynamic", "weights": "int4"}, "SPEC-COMBINATION"),
    ],
)
def test_options_that_no_kernel_takes_are_refused(options: dict[str, Any], code: str) -> None:
    with pytest.raises(SpecError) as caught:
        Assign(**options)
    assert caught.value.code == code


def test_a_plan_survives_storage() -> None:
    plan, _ = plan_of(cnn(), CNN_FEEDS)
    plan.leave_float("c", "to have one")
    header, arrays = plan.to_storage()
    again = QuantPlan.from_storage(json.loads(json.dumps(header)), arrays)
    assert again == plan
    assert list(again.sites) == list(plan.sites)


def test_weights_may_have_one_scale_a_tensor() -> None:
    made = h.apply(
        cnn(), Canonicalize(), Calibrate(), Assign(weight_scales="tensor"), samples=CNN_FEEDS
    )
    sites = made.artifacts.get(PLAN).sites.values()
    assert {s.weight.per_channel for s in sites if s.weight is not None} == {False}
    with pytest.raises(SpecError, match="weight-scales=tensor"):
        Assign(mode="weight-only", weight_scales="tensor")
