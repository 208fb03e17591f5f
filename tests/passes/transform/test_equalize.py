"""equalize: same function, ranges that agree, less error of per-tensor weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.transform.equalize import Equalize
from onnxq.solvers.equalize import equalizing_scale
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

FEEDS = {"x": normal(2, 3, 9, 9, scale=4.0)}


def mobile(act: str = "Relu", between: str = "") -> ir.Model:
    """Expand, depthwise, project: the block of a mobile CNN, with uneven channels."""
    rng = np.random.default_rng(0)
    uneven = np.exp(rng.uniform(-3, 3, 8)).astype(np.float32)
    weights = {
        "w1": normal(8, 3, 1, 1, seed=1) * uneven[:, None, None, None],
        "b1": normal(8, seed=2) * uneven,
        "w2": normal(8, 1, 3, 3, seed=3),
        "b2": normal(8, seed=4),
        "w3": normal(5, 8, 1, 1, seed=5) / uneven[None, :, None, None],
        "six": np.float32(6),
        "zero": np.float32(0),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
    }
    call = {"Relu": "Relu ({})", "Relu6": "Clip ({}, zero, six)", "Sigmoid": "Sigmoid ({})"}[act]
    pad = between or "Identity ({})"
    body = f"""g (float[2, 3, 9, 9] x) => (float[2, 5, H, W] y) {{
        c1 = Conv (x, w1, b1)
        a1 = {call.format("c1")}
        p1 = {pad.format("a1")}
        c2 = Conv <group = 8> (p1, w2, b2)
        a2 = {call.format("c2")}
        y = Conv (a2, w3)
    }}"""
    used = {k: v for k, v in weights.items() if k in body}
    return model_of(body, used)


def equalize(model: ir.Model, **options: str) -> tuple[ir.Model, PassReport]:
    result = apply(model, Equalize(**options))  # type: ignore[arg-type]
    return result.model, report_of(result, "equalize")


def assert_same(before: ir.Model, after: ir.Model) -> None:
    assert relative_error(run(before, FEEDS)["y"], run(after, FEEDS)["y"]) < 1e-5


def channel_ranges(model: ir.Model) -> list[tuple[np.ndarray, np.ndarray]]:
    """(range a writer has, range the reader has) of each channel of both pairs."""
    c1, c2, c3 = analyze(model).linears
    flat = [np.abs(c.w).reshape(c.w.shape[0], -1).max(axis=1) for c in (c1, c2)]
    return [(flat[0], flat[1]), (flat[1], np.abs(c3.w).max(axis=(0, 2, 3)))]


@pytest.mark.parametrize("between", ["", "Pad ({}, pads)", "MaxPool <kernel_shape = [3, 3]> ({})"])
def test_ranges_agree_and_the_function_stays(between: str) -> None:
    model = mobile(between=between)
    even, report = equalize(model)
    assert [c.site for c in report.changed] == ["c1 -> c2", "c2 -> y"]
    assert_same(model, even)
    for writer, reader in channel_ranges(even):
        np.testing.assert_allclose(writer, reader, rtol=5e-3)
    writer, reader = channel_ranges(model)[0]
    assert (writer / reader).max() > 5 * (writer / reader).min()


def test_relu6_is_left_alone_or_bounded_by_channel() -> None:
    model = mobile("Relu6")
    kept, report = equalize(model)
    assert not report.changed
    assert "Relu6 does not scale" in reasons(report)
    assert ops(kept) == ops(model)
    even, report = equalize(model, clip="min")
    assert len(report.changed) == 2
    assert ops(even)["Min"] == 2
    assert "Clip" not in ops(even)
    assert (run(model, FEEDS)["y"] != 0).any()
    assert_same(model, even)


def test_per_tensor_weights_lose_less() -> None:
    model = mobile()
    even, _ = equalize(model)

    def error(each: ir.Model) -> float:
        """Of the output with every weight rounded to 8 bits with one scale."""
        rounded = each.clone()
        for name in ("w1", "w2", "w3"):
            value = rounded.graph.initializers[name]
            assert value.const_value is not None
            w = value.const_value.numpy()
            scale = np.abs(w).max() / 127
            value.const_value = ir.tensor(np.rint(w / scale).astype(np.float32) * scale, name=name)
        return relative_error(run(model, FEEDS)["y"], run(rounded, FEEDS)["y"])

    assert error(even) < 0.6 * error(model)


def test_what_does_not_scale_is_said() -> None:
    _, report = equalize(mobile("Sigmoid"))
    assert not report.changed
    assert "sigmoid does not scale" in reasons(report)


def test_a_branch_is_no_pair() -> None:
    body = """g (float[2, 4] x) => (float[2, 4] y) {
        a = MatMul (x, v)
        b = MatMul (a, w)
        y = Add (a, b)
    }"""
    model = model_of(body, {"v": normal(4, 4), "w": normal(4, 4, seed=1)})
    _, report = equalize(model)
    assert not report.changed


def test_grouped_and_shared_weights_are_left_alone() -> None:
    body = """g (float[1, 4, 3, 3] x) => (float[1, 4, 3, 3] y) {
        a = Conv (x, v)
        y = Conv <group = 2> (a, w)
    }"""
    model = model_of(body, {"v": normal(4, 4, 1, 1), "w": normal(4, 2, 1, 1, seed=1)})
    _, report = equalize(model)
    assert "has 2 groups" in reasons(report)
    body = """g (float[2, 4] x) => (float[2, 4] y) {
        a = MatMul (x, w)
        y = MatMul (a, w)
    }"""
    _, report = equalize(model_of(body, {"w": normal(4, 4)}))
    assert "shared" in reasons(report)


def test_dead_channels_keep_their_scale() -> None:
    np.testing.assert_allclose(equalizing_scale([4.0, 0.0, 1.0], [1.0, 2.0, 0.0]), [2.0, 1.0, 1.0])
