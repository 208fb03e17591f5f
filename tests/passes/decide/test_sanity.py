"""sanity: broken results raise with a code, good ones are reported with their cosine."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration.data import open_data
from onnxq.errors import QualityError, SpecError
from onnxq.passes.contract import Artifacts, Context, DeclaredArtifacts, PassReport
from onnxq.passes.decide.sanity import Sanity
from onnxq.passes.targets import parse_target

from .. import helpers as h


def check(
    before: ir.Model,
    after: ir.Model,
    feeds: list[h.Feeds] | None,
    how: Sanity = Sanity(),  # noqa: B008
) -> PassReport:
    data = None if feeds is None else open_data(feeds, before)
    artifacts = DeclaredArtifacts(Artifacts(), how)
    return how.run(after, Context(artifacts, parse_target("cpu"), None, data, before))


def model(factor: float = 1.0, extra: str = "") -> ir.Model:
    return h.model_of(
        f"""g (float[4] x) => (float[4] y) {{
            f = Constant <value_float = {factor:e}> ()
            z = Mul(x, f)
            y = Identity(z)
            {extra}
        }}"""
    )


FEEDS = [{"x": h.normal(4, seed=s)} for s in range(3)]


def code_of(before: ir.Model, after: ir.Model, **options: float) -> str:
    with pytest.raises(QualityError) as caught:
        check(before, after, FEEDS, Sanity(**options))  # type: ignore[arg-type]
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value.code


def test_a_good_result_is_reported_with_its_cosine() -> None:
    report = check(model(), model(3.0), FEEDS)
    assert [c.detail for c in report.changed] == ["cosine 1.00000"]


def test_an_output_that_became_all_zero_is_found() -> None:
    assert code_of(model(), model(0.0), min_cosine=-1.0) == "QUALITY-ALL-ZERO"


def test_an_output_that_is_zero_in_the_original_too_is_fine() -> None:
    assert check(model(0.0), model(0.0), FEEDS).changed


def test_numbers_that_became_infinite_are_found() -> None:
    assert code_of(model(), model(3e38)) == "QUALITY-NOT-FINITE"


def infinite_first(factor: float) -> ir.Model:
    """The first element is -inf by design, as in a row of masked scores."""
    return h.model_of(
        f"""g (float[4] x) => (float[4] y) {{
            f = Constant <value_float = {factor:e}> ()
            z = Mul(x, f)
            y = Add(z, mask)
        }}""",
        {"mask": np.array([-np.inf, 0, 0, 0], np.float32)},
    )


def test_infinities_of_the_original_do_not_count() -> None:
    assert check(infinite_first(1.0), infinite_first(2.0), FEEDS).changed
    assert code_of(infinite_first(1.0), infinite_first(-1.0)) == "QUALITY-SANITY"


def test_a_cosine_below_the_threshold_is_an_error() -> None:
    assert code_of(model(), model(-1.0)) == "QUALITY-SANITY"


def test_another_shape_is_an_error() -> None:
    after = h.model_of("g (float[4] x) => (float[N] y) { y = Concat <axis = 0> (x, x) }")
    assert code_of(model(), after) == "QUALITY-SHAPE"


def scaled(scale: float) -> ir.Model:
    return h.model_of(
        """g (float[4] x) => (float[4] y) {
            q = QuantizeLinear(x, s)
            y = DequantizeLinear(q, s)
        }""",
        {"s": np.array(scale, np.float32)},
    )


@pytest.mark.parametrize("scale", [0.0, -0.1, np.inf, np.nan])
def test_scales_must_be_finite_and_positive(scale: float) -> None:
    assert code_of(model(), scaled(scale)) == "QUALITY-SCALE"


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_packed_products_may_have_signed_scales_and_blocks_of_zeros(scale: float) -> None:
    after = packed(scale)
    assert "1 scale tensors" in check(after, after, None).notes[0]


def test_packed_products_must_have_finite_scales() -> None:
    with pytest.raises(QualityError) as caught:
        check(packed(1.0), packed(np.nan), None)
    assert caught.value.code == "QUALITY-SCALE"


def packed(scale: float) -> ir.Model:
    made = h.model_of(
        """g (float[1, 32] x) => (float[1, 1] y) {
            y = com.microsoft.MatMulNBits <K = 32, N = 1, bits = 4, block_size = 32> (x, w, s)
        }""",
        {"w": np.full((1, 1, 16), 0x88, np.uint8), "s": np.array([[scale]], np.float32)},
    )
    made.graph.opset_imports["com.microsoft"] = 1
    return made


def test_scales_inside_of_branches_are_seen() -> None:
    after = h.model_of(
        """g (float[4] x, bool c) => (float[4] y) {
            y = If (c) <
                then_branch = t () => (float[4] a) { q = QuantizeLinear(x, s)
                                                     a = DequantizeLinear(q, s) },
                else_branch = e () => (float[4] b) { b = Neg(x) }
            >
        }""",
        {"s": np.array(0, np.float32)},
    )
    feeds = [{"x": h.normal(4), "c": np.array(False)}]
    with pytest.raises(QualityError) as caught:
        check(after, after, feeds)
    assert caught.value.code == "QUALITY-SCALE"


def test_without_samples_only_scales_are_checked() -> None:
    report = check(model(), scaled(0.1), None)
    assert "no held-back samples" in h.reasons(report)
    assert "2 scale tensors" in report.notes[0]


@pytest.mark.parametrize("options", [{"min_cosine": 2.0}, {"samples": 0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecError):
        Sanity(**options)  # type: ignore[arg-type]
