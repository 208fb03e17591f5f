"""reassemble-channels: same function in float64, no node added, the largest channel smaller."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError, SpecError
from onnxq.graph.match import analyze
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.transform.reassemble_channels import ReassembleChannels
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.validate import validate
from onnxq.solvers.disassemble import choose_parts
from tests.passes.helpers import apply, model_of, normal, ops, reasons, relative_error, report_of
from tests.passes.transform.wide import EXACT, TOKENS, llama, outputs


def widen(model: ir.Model, **options: object) -> tuple[ir.Model, PassReport]:
    passes = (Calibrate(), ReassembleChannels(**options))  # type: ignore[arg-type]
    result = apply(model, *passes, samples=[TOKENS] * 2)
    return result.model, report_of(result, "reassemble-channels")


@pytest.mark.parametrize(("inner", "multiple", "width"), [(40, 4, 48), (40, 16, 48), (64, 32, 64)])
def test_the_function_stays_and_no_node_is_added(inner: int, multiple: int, width: int) -> None:
    model = llama(inner=inner)
    done, report = widen(model, ratio=0.25, multiple=multiple)
    for old, new in zip(outputs(model, TOKENS), outputs(done, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT
    assert ops(done) == ops(model)
    widths = {mlp.down.in_features for mlp in analyze(done).gated_mlps}
    assert widths == {width}
    assert len(report.changed) == (2 if width > inner else 0)


def test_the_largest_inner_magnitude_falls() -> None:
    model = llama(inner=40)
    for value in model.graph.initializers.values():
        if "layers.0.mlp.up" in str(value.name):
            assert value.const_value is not None
            array = value.const_value.numpy().copy()
            array[:, 7] *= 60
            value.const_value = ir.tensor(array, name=value.name)
    done, _ = widen(model, ratio=0.25, multiple=4)

    def peak(each: ir.Model) -> float:
        name = str(analyze(each).gated_mlps[0].down.x.name)
        (array,) = outputs(each, TOKENS, name)
        return float(np.abs(array).max())

    assert peak(done) < 0.2 * peak(model)


def test_parts_are_chosen_so_that_the_largest_is_as_small_as_can_be() -> None:
    amax = np.array([8.0, 1.0, 3.0, 0.0])
    parts = choose_parts(amax, 4)
    np.testing.assert_array_equal(parts, [4, 1, 2, 1])
    best = min(
        max(8 / a, 1 / b, 3 / c)
        for a in range(1, 6) for b in range(1, 6) for c in range(1, 6) if a + b + c == 7
    )  # fmt: skip
    assert (amax / parts).max() == best
    np.testing.assert_array_equal(choose_parts(np.zeros(3), 5), [1, 1, 1])


def test_models_without_gated_mlps_are_said() -> None:
    body = "g (float[2, 4] x) => (float[2, 4] y) { y = MatMul (x, w) }"
    model = model_of(body, {"w": normal(4, 4)}, opset=18)
    result = apply(model, Calibrate(), ReassembleChannels(), samples=[{"x": normal(2, 4)}])
    assert "no gated MLP" in reasons(report_of(result, "reassemble-channels"))


def test_order_and_options() -> None:
    for order in ("reassemble-channels", "calibrate, assign, reassemble-channels"):
        with pytest.raises(PipelineError):
            validate(parse(order))
    for options in ({"ratio": 0.0}, {"ratio": 1.5}, {"multiple": 0}):
        with pytest.raises(SpecError):
            ReassembleChannels(**options)  # type: ignore[arg-type]
