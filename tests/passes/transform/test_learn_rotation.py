"""learn-rotation: same function in float64, no node added, flatter than the random rotation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError, SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.transform.fold_norm import FoldNorm
from onnxq.passes.transform.learn_rotation import LearnRotation
from onnxq.passes.transform.rotate import Rotate
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.validate import validate
from tests.passes.helpers import apply, model_of, normal, ops, reasons, relative_error, report_of
from tests.passes.transform.wide import EXACT, TOKENS, llama, outputs, pre_layernorm


def learn(model: ir.Model, centre: bool = True, **options: object) -> tuple[ir.Model, PassReport]:
    passes = (FoldNorm(centre=centre), Calibrate(), LearnRotation(**options))  # type: ignore[arg-type]
    result = apply(model, *passes, samples=[TOKENS] * 2)
    return result.model, report_of(result, "learn-rotation")


def kurtosis(model: ir.Model) -> float:
    """Mean distance from 1.8 over what the norms hand on."""
    names = [str(norm.output.name) for norm in analyze(model).norms]
    found = []
    for array in outputs(model, TOKENS, *names):
        rows = array.reshape(-1, array.shape[-1])
        fourth = np.mean(rows**4, axis=1) / np.mean(rows**2, axis=1) ** 2
        found.append(np.abs(fourth - 1.8).mean())
    return float(np.mean(found))


@pytest.mark.parametrize(
    "size",
    [
        {"hidden": 32, "heads": 4, "kv_heads": 2},
        {"hidden": 24, "heads": 6, "kv_heads": 2},
        {"hidden": 18, "heads": 3, "kv_heads": 1},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_function_stays_and_no_node_is_added(size: dict[str, int], tied: bool) -> None:
    model = llama(**size, tied=tied)
    learned, report = learn(model, steps=20)
    for old, new in zip(outputs(model, TOKENS), outputs(learned, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT
    assert ops(learned) == ops(model)
    assert len(report.changed) == 3


@pytest.mark.parametrize("centre", [True, False])
def test_layernorm_streams(centre: bool) -> None:
    model = pre_layernorm(opset=18)
    learned, report = learn(model, centre, steps=20)
    assert any("learned" in change.what for change in report.changed)
    for old, new in zip(outputs(model, TOKENS), outputs(learned, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT


def test_it_is_flatter_than_the_rotation_that_it_starts_from() -> None:
    model = llama(hidden=32, heads=4, kv_heads=2, outlier=20.0)
    learned, _ = learn(model, steps=60)
    random = apply(model, FoldNorm(), Rotate()).model
    assert kurtosis(learned) < 0.8 * kurtosis(random)


def test_with_the_range_as_objective_blocks_need_smaller_steps() -> None:
    """A narrower range of what layers read, in blocks, than behind random rotations."""
    model = llama(hidden=32, heads=4, kv_heads=2, outlier=20.0)
    learned, report = learn(model, steps=60, block=8, objective="range")
    random = apply(model, FoldNorm(), Rotate(block=8)).model
    assert "mean squared range" in report.changed[0].detail

    def step(each: ir.Model) -> float:
        names = [str(norm.output.name) for norm in analyze(each).norms]
        return sum(
            float(np.square(np.ptp(a.reshape(-1, 8), axis=-1)).mean())
            for a in outputs(each, TOKENS, *names)
        )

    assert step(learned) < 0.95 * step(random)
    assert relative_error(outputs(model, TOKENS)[0], outputs(learned, TOKENS)[0]) <= EXACT


def test_r1_and_r2_apart() -> None:
    model = llama(hidden=32, heads=4, kv_heads=2)
    _, first = learn(model, r2=False, steps=5)
    _, second = learn(model, r1=False, steps=5)
    assert [c.what[:2] for c in (*first.changed, *second.changed)] == ["R1", "R2", "R2"]


@pytest.mark.parametrize("block", [4, 8])
def test_blocks_are_learned_each_from_its_own_channels(block: int) -> None:
    model = llama(hidden=32, heads=4, kv_heads=2)
    learned, report = learn(model, steps=10, block=block)
    x = str(analyze(model).norms[0].x.name)
    (old,), (new,) = outputs(model, TOKENS, x), outputs(learned, TOKENS, x)
    assert relative_error(old, new) > 0.5
    for before, after in zip(
        np.split(old, 32 // block, axis=-1), np.split(new, 32 // block, axis=-1), strict=True
    ):  # a rotation of a block keeps its length
        np.testing.assert_allclose(
            np.linalg.norm(after, axis=-1), np.linalg.norm(before, axis=-1), rtol=1e-6
        )
    assert relative_error(outputs(model, TOKENS)[0], outputs(learned, TOKENS)[0]) <= EXACT
    assert all(f"order {block}" in change.what for change in report.changed)


def test_blocks_keep_the_ones_of_a_layernorm() -> None:
    model = pre_layernorm(opset=18)
    learned, report = learn(model, centre=False, steps=5, block=4)
    assert report.changed
    assert relative_error(outputs(model, TOKENS)[0], outputs(learned, TOKENS)[0]) <= EXACT


def test_widths_that_are_no_whole_blocks_are_skipped_with_the_reason() -> None:
    _, report = learn(llama(hidden=32, heads=4, kv_heads=2), block=16)
    text = reasons(report)
    assert "its 8 channels are not divided by block=16" in text
    assert [c.what[:2] for c in report.changed] == ["R1"]
    with pytest.raises(SpecError, match="block=1"):
        LearnRotation(block=1)


def test_streams_that_cannot_be_turned_are_named() -> None:
    body = "g (float[2, 4] x) => (float[2, 4] y) { y = MatMul (x, w) }"
    model = model_of(body, {"w": normal(4, 4)})
    result = apply(model, FoldNorm(), Calibrate(), LearnRotation(), samples=[{"x": normal(2, 4)}])
    text = reasons(report_of(result, "learn-rotation"))
    assert "the graph has no norms" in text
    assert "the graph has no attention" in text


@pytest.mark.parametrize(
    ("order", "fix"),
    [
        ("learn-rotation", "fold-norm"),
        ("fold-norm, learn-rotation", "calibrate"),
        ("calibrate, fold-norm, learn-rotation", "calibrate"),
        ("fold-norm, calibrate, assign, learn-rotation", "assign"),
    ],
)
def test_wrong_orders_are_refused_with_the_fix(order: str, fix: str) -> None:
    with pytest.raises(PipelineError) as caught:
        validate(parse(order))
    assert f"`{fix}`" in f"{caught.value.hint} {caught.value.cause}"


def test_no_steps_are_refused() -> None:
    with pytest.raises(SpecError, match="steps=0"):
        LearnRotation(steps=0)
