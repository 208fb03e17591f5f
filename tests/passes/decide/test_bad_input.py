"""Deciding passes on models that give them nothing to do, or little: said, never hidden."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.passes.contract import Pass
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.decide.mixed_precision import MixedPrecision
from onnxq.passes.decide.outlier_split import OutlierSplit
from onnxq.passes.decide.partial import Partial
from onnxq.passes.decide.peg import Peg
from onnxq.passes.decide.sensitivity import Sensitivity
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.lower.quantize_kv import QuantizeKv
from onnxq.passes.weights.correct_bias import CorrectBias
from tests.passes.helpers import Feeds, apply, model_of, normal, relative_error, report_of, run

SAMPLES: list[Feeds] = [{"x": normal(8, 16, seed=s)} for s in range(3)]


def text(body: str, weights: dict[str, np.ndarray]) -> ir.Model:
    head = "g (float[8, 16] x) => (float[8, 16] y)"
    return model_of(f"{head} {{ {body} }}", weights, opset=21)


def without_layers() -> ir.Model:
    return text("y = Relu (x)", {})


def shared() -> ir.Model:
    """One weight and one bias, read by two layers, on a stream that branches."""
    body = """m = MatMul (x, w) a = Add (m, b) r = Relu (a) n = MatMul (r, w) c = Add (n, b)
              s = Add (x, c) y = Add (s, r)"""
    return text(body, {"w": normal(16, 16), "b": normal(16, seed=1)})


def quantized() -> ir.Model:
    return apply(shared(), Calibrate(), Assign(), Qdq(), samples=SAMPLES).model


def narrow() -> ir.Model:
    body = "h = Cast <to = 10> (x) m = MatMul (h, w) y = Cast <to = 1> (m)"
    return text(body, {"w": normal(16, 16).astype(np.float16)})


MODELS = {f.__name__: f for f in (without_layers, shared, quantized, narrow)}
PASSES: dict[str, list[Pass]] = {
    "sensitivity": [Sensitivity()],
    "partial": [Sensitivity(), Partial(min_sqnr=10.0)],
    "mixed-precision": [MixedPrecision(max_size=1.0)],
    "peg": [Peg(spread=1.0)],
    "outlier-split": [OutlierSplit(threshold=2.0)],
    "correct-bias": [CorrectBias()],
    "quantize-kv": [Qdq(), QuantizeKv()],
}


@pytest.mark.parametrize("name", list(PASSES))
@pytest.mark.parametrize("model", list(MODELS))
def test_every_pass_says_what_it_did_or_why_not(model, name):
    made = apply(MODELS[model](), Calibrate(), Assign(), *PASSES[name], samples=SAMPLES)
    report = report_of(made, name)
    assert report.changed or report.skipped
    assert all(skip.reason for skip in report.skipped)
    if model == "without_layers":
        assert not report.changed


@pytest.mark.parametrize("name", ["mixed-precision", "peg", "outlier-split", "correct-bias"])
def test_shared_weights_are_quantized_for_each_layer(name):
    """The result is near the float model, so no layer reads what another one changed."""
    passes = [Calibrate(), Assign(), *PASSES[name], Qdq()]
    made = apply(shared(), *passes, samples=SAMPLES).model
    for feeds in SAMPLES:
        assert relative_error(run(shared(), feeds)["y"], run(made, feeds)["y"]) < 0.03
