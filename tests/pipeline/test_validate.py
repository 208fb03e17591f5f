"""Wrong orders are refused before anything runs, and the message says which order works."""

from __future__ import annotations

import pytest

from onnxq.errors import DataError, PipelineError
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.registry import Registry
from onnxq.pipeline.validate import validate
from tests.pipeline.tiny import REGISTRY, Early, Round


def check(text: str, **given) -> None:
    validate(parse(text, REGISTRY), registry=REGISTRY, **given)


@pytest.mark.parametrize("text", ["observe,round", "early,observe,rescale,observe,round", "early"])
def test_good_orders(text):
    check(text)


def test_a_key_that_nothing_provides():
    with pytest.raises(PipelineError) as caught:
        check("rescale,round")
    error = caught.value
    assert error.code == "PIPELINE-MISSING"
    assert error.cause == "pass 2 `round` needs `mean`, and no pass before it provides that"
    assert error.hint == "`observe` or `lazy` provides it; put it before pass 2"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("assign,qdq", "PIPELINE-MISSING"),
        ("assign,calibrate,qdq", "PIPELINE-MISSING"),
        ("calibrate,smooth-quant,assign,qdq", "PIPELINE-STALE"),
    ],
)
def test_static_ranges_need_statistics(text, code):
    with pytest.raises(PipelineError, match="`assign` needs `statistics`") as caught:
        validate(parse(text))
    assert caught.value.code == code
    assert "`calibrate`" in caught.value.hint


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_other_modes_need_no_statistics(mode):
    validate(parse(f"assign{{mode={mode}}},qdq"), has_data=False)


def test_a_pass_that_needs_a_key_itself_does_not_help_to_get_it():
    with pytest.raises(PipelineError) as caught:
        validate(parse("partial{layers=[a]}"))
    assert caught.value.hint == "`assign` provides it; put it before pass 1"


def test_a_key_that_no_installed_pass_provides():
    with pytest.raises(PipelineError, match="no installed pass provides it"):
        validate([Round()], registry=Registry.of(Round, Early))


def test_a_key_that_is_provided_too_late():
    with pytest.raises(PipelineError) as caught:
        check("round,observe")
    assert caught.value.hint == "pass 2 `observe` provides it; put it before pass 1"


def test_a_key_that_an_earlier_pass_made_stale():
    with pytest.raises(PipelineError) as caught:
        check("observe,rescale,round")
    error = caught.value
    assert error.code == "PIPELINE-STALE"
    assert error.cause == "pass 3 `round` needs `mean`, which pass 2 `rescale` invalidated"
    assert error.hint == "put another `observe` after pass 2 `rescale`"


def test_a_pass_that_must_come_earlier():
    with pytest.raises(PipelineError) as caught:
        check("observe,early")
    error = caught.value
    assert error.code == "PIPELINE-FORBIDDEN"
    assert error.cause == "pass 2 `early` cannot run when `mean` (from pass 1 `observe`) is there"
    assert error.hint == "put `early` before pass 1 `observe`"


def test_keys_that_are_there_from_the_start():
    check("round", available=["mean"])
    with pytest.raises(PipelineError, match="leave `early` out"):
        check("early", available=["mean"])


def test_a_pass_that_needs_data_without_data():
    with pytest.raises(DataError) as caught:
        check("observe,round", has_data=False)
    assert caught.value.code == "DATA-NEEDED"
    assert "pass 1 `observe`" in caught.value.cause


def test_the_shipped_recipes_are_valid():
    for name in ("w8a8", "w8a8-dynamic", "w4"):
        validate(parse(name))


def test_the_shipped_recipe_without_its_calibration_is_refused():
    with pytest.raises(PipelineError, match="`calibrate` provides it; put it before pass 2"):
        validate(parse("canonicalize,smooth-quant,assign,qdq"))
