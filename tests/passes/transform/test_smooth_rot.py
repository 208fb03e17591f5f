"""smooth-rot: same function in float64; flat behind massive channels; the closed optimum of s."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError, SpecError
from onnxq.formats import Granularity, IntFormat
from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.transform.online_hadamard import OnlineHadamard
from onnxq.passes.transform.smooth_rot import SmoothRot
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.validate import validate
from onnxq.solvers.hadamard import transform
from onnxq.solvers.smooth import search_rotated_smoothing
from tests.passes.helpers import apply, model_of, normal, ops, reasons, relative_error, report_of
from tests.passes.transform.wide import EXACT, TOKENS, llama, outputs

INT4 = IntFormat(4)


def smooth(model: ir.Model, **options: object) -> tuple[ir.Model, PassReport]:
    result = apply(model, Calibrate(), SmoothRot(**options), samples=[TOKENS] * 2)  # type: ignore[arg-type]
    return result.model, report_of(result, "smooth-rot")


@pytest.mark.parametrize(("inner", "block"), [(40, 0), (48, 16), (64, 0)])
def test_the_function_stays_and_one_rotation_a_layer_is_added(inner: int, block: int) -> None:
    model = llama(inner=inner)
    done, report = smooth(model, block=block)
    for old, new in zip(outputs(model, TOKENS), outputs(done, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT
    rotated = apply(model, OnlineHadamard(block=block)).model
    assert ops(done) == ops(rotated)
    assert len(report.changed) == 2


def massive(rows: int = 200, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    x[:, 7] *= 60
    x[:, 9] *= 20
    return x, rng.standard_normal((width, 32)).astype(np.float32)


def error_behind(x: np.ndarray, w: np.ndarray, scale: np.ndarray) -> float:
    channel = Granularity.per_channel(0)
    left = INT4.fake_quant(transform(x / scale), channel)
    right = INT4.fake_quant(transform((w * scale[:, None]).T), channel)
    exact = x @ w
    errors = np.square(left @ right.T - exact).sum(axis=1) / np.square(exact).sum(axis=1)
    return float(errors.mean())


def test_the_search_beats_rotation_alone_and_finds_the_closed_optimum() -> None:
    x, w = massive()
    found = search_rotated_smoothing(x, w, transform, INT4, INT4)
    alone = error_behind(x, w, np.ones(64, np.float32))
    assert error_behind(x, w, found.scale) < 0.5 * alone
    assert found.gain_db == pytest.approx(
        10 * np.log10(alone / error_behind(x, w, found.scale)), abs=1.0
    )
    best = np.sqrt(np.sqrt(np.mean(x**2, axis=0)) / np.linalg.norm(w, axis=1))
    best /= np.exp(np.log(best).mean())
    assert error_behind(x, w, found.scale) < 1.1 * error_behind(x, w, best.astype(np.float32))


def test_flat_channels_gain_nothing() -> None:
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((200, 64)), rng.standard_normal((64, 32))
    found = search_rotated_smoothing(
        x.astype(np.float32), w.astype(np.float32), transform, INT4, INT4
    )
    assert found.gain_db < 0.5


def test_models_without_gated_mlps_are_said() -> None:
    body = "g (float[2, 4] x) => (float[2, 4] y) { r = Relu (x)\n y = MatMul (r, w) }"
    model = model_of(body, {"w": normal(4, 4)}, opset=18)
    result = apply(model, Calibrate(), SmoothRot(), samples=[{"x": normal(2, 4)}])
    assert "no gated MLP" in reasons(report_of(result, "smooth-rot"))


def test_widths_without_a_matrix_are_left_alone_whole() -> None:
    model = llama(inner=42)
    done, report = smooth(model)
    assert "order 42" in reasons(report)
    for old, new in zip(
        analyze(model).linears, analyze(done).linears, strict=True
    ):  # no scale without the rotation either
        np.testing.assert_array_equal(old.w, new.w)


@pytest.mark.parametrize(
    ("order", "fix"),
    [("smooth-rot", "calibrate"), ("calibrate, rotate, smooth-rot", "fold-norm"),
     ("calibrate, fold-norm, smooth-rot", "calibrate"),
     ("calibrate, assign, smooth-rot", "assign")],
)  # fmt: skip
def test_wrong_orders_are_refused_with_the_fix(order: str, fix: str) -> None:
    with pytest.raises(PipelineError) as caught:
        validate(parse(order))
    assert f"`{fix}`" in f"{caught.value.hint} {caught.value.cause}"


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"rows": 3}, {"block": 6}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(SpecError):
        SmoothRot(**options)
