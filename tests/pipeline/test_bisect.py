"""Bisection names the first bad pass and, where the pass asks its budget, the first bad rewrite."""

from __future__ import annotations

import pytest

from onnxq.calibration.data import open_data
from onnxq.errors import DataError
from onnxq.pipeline.bisect import bisect
from onnxq.pipeline.runner import Pipeline
from tests.pipeline.tiny import REGISTRY, samples, tiny_model


def find(text: str, **options):
    model = tiny_model()
    return bisect(model, Pipeline(text, registry=REGISTRY), open_data(samples(), model), **options)


def test_a_good_pipeline_has_no_culprit():
    found = find("observe,rescale,observe,round")
    assert found.culprit is None
    assert [s.spec for s in found.steps] == ["observe", "rescale", "observe", "round"]
    assert found.steps[1].added_error < 1e-6
    assert 1e-4 < found.steps[3].error < 0.05  # 8 bits


@pytest.mark.parametrize(("site", "number"), [("w1", 1), ("b1", 2), ("w2", 3)])
def test_the_first_bad_rewrite_is_named(site, number):
    found = find(f"observe,rescale,observe,round{{ruin={site}}}")
    assert found.culprit is found.steps[3]
    assert (found.rewrite, found.site, found.rewrites) == (number, site, 3)
    assert "above 0.2" in found.why


def test_the_search_halves_the_range():
    found = find("observe,round{sites=[w1,w2,w1,w2,w1,b1,w1,w2] ruin=b1}")
    assert (found.rewrite, found.site, found.rewrites) == (6, "b1", 8)


def test_a_pass_that_breaks_its_promise_is_the_culprit_although_the_limit_is_kept():
    found = find("observe,rescale{factor=1.01 forget=true},observe,round")
    assert found.culprit.number == 2
    assert found.culprit.error == pytest.approx(0.01, rel=1e-3)
    assert found.why == "it promises 1e-05 and adds 0.01"
    assert found.rewrite is None  # it does not ask for a budget
    assert len(found.steps) == 2


def test_a_pass_that_leaves_an_invalid_graph_is_the_culprit():
    found = find("observe,corrupt")
    assert found.culprit.number == 2
    assert "INTERNAL-INVALID-IR" in found.why


def test_the_limit_can_be_set():
    found = find("observe,round{bits=4}", max_error=1e-3)
    assert found.culprit.number == 2
    assert found.rewrite == 1
    assert find("observe,round{bits=4}", max_error=0.5).culprit is None


def test_there_must_be_samples():
    with pytest.raises(DataError, match="no samples to bisect on"):
        find("observe", samples=0)


def test_the_result_is_json():
    import json

    found = json.loads(json.dumps(find("observe,round{ruin=b1}").to_json()))
    assert found["site"] == "b1"
    assert found["culprit"]["number"] == 2
