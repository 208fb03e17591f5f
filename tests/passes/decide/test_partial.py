"""partial: what matches a glob or a type stays float, and what lived on its codes too."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.errors import SpecError
from onnxq.passes.contract import PassReport
from onnxq.passes.decide.assign import Assign
from onnxq.passes.decide.calibrate import Calibrate
from onnxq.passes.decide.partial import Partial
from onnxq.passes.keys import PLAN
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.plan import QuantPlan
from onnxq.passes.prepare.canonicalize import Canonicalize

from .. import helpers as h
from .test_assign import CNN_FEEDS, cnn


def planned(partial: Partial) -> tuple[QuantPlan, PassReport]:
    passes = (Canonicalize(), Calibrate(), Assign(), partial)
    result = h.apply(cnn(), *passes, samples=CNN_FEEDS)
    return result.artifacts.get(PLAN), h.report_of(result, "partial")


def test_a_glob_leaves_its_layers_and_starves_what_read_their_codes() -> None:
    plan, report = planned(Partial(layers=("c",)))
    assert list(plan.sites) == ["a", "y"]
    assert plan.floats["c"] == "layers=c"
    for starved in ("s", "p", "f"):
        assert plan.floats[starved] == "a neighbour stays float"
    assert {change.site for change in report.changed} == {"c", "s", "p", "f"}


def test_a_type_leaves_all_of_its_kind() -> None:
    plan, _ = planned(Partial(op_types=("Conv",)))
    assert list(plan.sites) == ["y"]


def test_globs_match_names_as_a_shell_would() -> None:
    plan, _ = planned(Partial(layers=("[ac]",)))
    assert list(plan.sites) == ["y"]
    plan, _ = planned(Partial(layers=("A",)))
    assert "a" in plan.sites, "case counts"


def test_a_glob_or_type_that_matches_nothing_is_reported() -> None:
    _, report = planned(Partial(layers=("nothing*", "y"), op_types=("Einsum",)))
    assert "nothing*: matches no planned layer" in h.reasons(report)
    assert "Einsum: matches no planned layer" in h.reasons(report)
    assert "y: matches" not in h.reasons(report)


def test_a_glob_for_what_is_float_anyway_is_reported() -> None:
    passes = (Canonicalize(), Assign(mode="weight-only"), Partial(layers=("a",)))
    result = h.apply(cnn(), *passes, samples=CNN_FEEDS)
    report = h.report_of(result, "partial")
    assert not report.changed
    assert "a: matches no planned layer" in h.reasons(report)


def test_the_lowered_model_keeps_the_layer_as_it_was() -> None:
    passes = (Canonicalize(), Calibrate(), Assign(), Partial(layers=("c",)), Qdq())
    result = h.apply(cnn(), *passes, samples=CNN_FEEDS)
    conv = next(n for n in result.model.graph if n.name == "c")
    weight = conv.inputs[1]
    assert weight is not None
    assert weight.name == "w2"
    exact = h.run(cnn(), CNN_FEEDS[0])["y"]
    assert h.cosine(exact, h.run(result.model, CNN_FEEDS[0])["y"]) > 0.99


def test_without_layers_there_is_nothing_to_ask_for() -> None:
    with pytest.raises(SpecError) as caught:
        Partial()
    assert caught.value.code == "SPEC-EMPTY"


def test_ranges_of_layers_left_alone_are_not_needed() -> None:
    plan, _ = planned(Partial(op_types=("Conv", "Gemm")))
    assert not plan.sites
    assert plan.used_values() == set()
    assert np.all([v.hi >= v.lo for v in plan.values.values()])
