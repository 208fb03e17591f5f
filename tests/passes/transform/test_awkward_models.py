"""Every transform on graphs that it was not made for: the function stays, or the reason is said."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration.data import open_data
from onnxq.errors import OnnxqError
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.assign import Assign
from onnxq.passes.lower.qdq import Qdq
from onnxq.pipeline.registry import default_registry
from onnxq.pipeline.runner import Pipeline
from tests.passes.helpers import (
    Array,
    Feeds,
    apply,
    model_of,
    normal,
    ops,
    reasons,
    relative_error,
    run,
)
from tests.passes.transform.wide import llama

TRANSFORMS = {
    "smooth-quant": "calibrate, smooth-quant",
    "awq-scale": "calibrate, awq-scale",
    "shift-scale": "calibrate, shift-scale",
    "fold-norm": "fold-norm",
    "rotate": "fold-norm, rotate",
    "learn-rotation": "fold-norm, calibrate, learn-rotation{steps=3}",
    "online-hadamard": "online-hadamard{sites=[down,qk]}",
    "smooth-rot": "calibrate, smooth-rot",
    "clip-activation": "calibrate, clip-activation{limit=1e6}",
    "prefix-tokens": "prefix-tokens{tokens=[1]}",
    "reassemble-channels": "calibrate, reassemble-channels",
    "low-rank-split": "low-rank-split{rank=2}",
}
SAME = 2e-5
X = normal(6, 16, seed=9)
WEIGHTS = {"w": normal(16, 16, scale=0.3), "v": normal(16, 16, seed=1, scale=0.3),
           "g": np.random.default_rng(2).uniform(0.5, 2, 16).astype(np.float32)}  # fmt: skip

TEXTS = {
    "no layer": "y = Relu (x)",
    "one layer": "y = MatMul (x, w)",
    "a residual that something else reads": """
        a = MatMul (x, w)
        n = LayerNormalization <axis = -1> (a, g)
        b = MatMul (n, v)
        c = Add (a, b)
        m = LayerNormalization <axis = -1> (c, g)
        t = Tanh (a)
        p = MatMul (m, w)
        y = Mul (p, t)""",
    "a residual that is an output": """
        a = MatMul (x, w)
        n = LayerNormalization <axis = -1> (a, g)
        b = MatMul (n, v)
        y = Add (a, b)""",
    "two layers with one weight": """
        a = MatMul (x, w)
        n = LayerNormalization <axis = -1> (a, g)
        b = MatMul (n, w)
        r = Relu (b)
        c = MatMul (r, w)
        d = Add (a, c)
        m = LayerNormalization <axis = -1> (d, g)
        y = MatMul (m, v)""",
    "a norm that is read twice": """
        n = LayerNormalization <axis = -1> (x, g)
        a = MatMul (n, w)
        b = MatMul (n, v)
        c = Sigmoid (n)
        d = Add (a, b)
        y = Mul (d, c)""",
}


def text_model(name: str) -> tuple[ir.Model, Feeds]:
    used = {k: v for k, v in WEIGHTS.items() if f", {k})" in TEXTS[name]}
    body = f"graph (float[6, 16] x) => (float[6, 16] y) {{ {TEXTS[name]} }}"
    return model_of(body, used, opset=21, ir_version=10), {"x": X}


@functools.cache
def quantized_decoder() -> tuple[ir.Model, Feeds]:
    model = llama(hidden=32, heads=4, kv_heads=2, double=False)
    done = apply(model, Assign(mode="per-token", weights="int8"), Qdq()).model
    return done, {"input_ids": np.arange(12)[None]}


@functools.cache
def integer_decoder() -> tuple[ir.Model, Feeds]:
    model = llama(hidden=32, heads=4, kv_heads=2, double=False)
    done = apply(model, Assign(mode="dynamic"), Qdq()).model
    return done, {"input_ids": np.arange(12)[None]}


MODELS: dict[str, Callable[[], tuple[ir.Model, Feeds]]] = {
    **{name: (lambda name=name: text_model(name)) for name in TEXTS},  # type: ignore[misc]
    "weights behind decoders": quantized_decoder,
    "integer products": integer_decoder,
}


def transform(model: ir.Model, feeds: Feeds, name: str) -> tuple[ir.Model, PassReport]:
    data = open_data([feeds] * 3, model)
    result = Pipeline(TRANSFORMS[name]).run(model, data=data, holdout=data, verify=False)
    report = next(step.report for step in reversed(result.reports) if step.name == name)
    return result.model, report


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", MODELS)
def test_the_function_stays_and_the_report_is_not_empty(which: str, name: str) -> None:
    model, feeds = MODELS[which]()
    done, report = transform(model, feeds, name)
    before, after = run(model, feeds), run(done, feeds)
    for key, array in before.items():
        # Dynamic ranges of an integer product follow what is scaled in front of it.
        limit = 0.05 if which == "integer products" and report.changed else SAME
        assert relative_error(array, after[key]) <= limit
    assert report.changed or report.skipped
    if not report.changed and name not in ("rotate", "learn-rotation"):
        assert ops(done) == ops(model)


@pytest.mark.parametrize(
    "which", ["a residual that something else reads", "a residual that is an output"]
)
@pytest.mark.parametrize("name", ["rotate", "learn-rotation"])
def test_streams_that_branch_are_named_with_the_node(which: str, name: str) -> None:
    model, feeds = text_model(which)
    _, report = transform(model, feeds, name)
    assert not report.changed
    text = reasons(report)
    assert ("reads it" in text) or ("is a graph output" in text)


def test_every_transform_is_tried() -> None:
    transforms = {e.name for e in default_registry() if e.group == "transform"}
    assert transforms - set(TRANSFORMS) <= {"simplify-attention", "equalize"}


def test_values_that_are_not_finite_are_refused_or_left_alone() -> None:
    """A NaN in a weight never becomes a silent result."""
    weights: dict[str, Array] = {k: v.copy() for k, v in WEIGHTS.items()}
    weights["w"][3, 3] = np.nan
    body = f"graph (float[6, 16] x) => (float[6, 16] y) {{ {TEXTS['a norm that is read twice']} }}"
    model = model_of(body, weights, opset=21, ir_version=10)
    for name in ("fold-norm", "online-hadamard", "rotate"):
        done, _ = transform(model, {"x": X}, name)
        assert np.isnan(run(done, {"x": X})["y"]).any()
    with pytest.raises(OnnxqError):
        transform(model, {"x": X}, "low-rank-split")
