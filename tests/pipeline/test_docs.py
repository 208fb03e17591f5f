"""The examples in the pages about pipelines and passes work."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest

from onnxq.pipeline.grammar import parse
from onnxq.pipeline.recipes import _from_table
from onnxq.pipeline.registry import Registry
from onnxq.pipeline.runner import Pipeline
from onnxq.pipeline.validate import validate
from tests.pipeline.tiny import tiny_model, weight

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def example(monkeypatch):
    """The pass of docs/writing_a_pass.md."""
    module = types.ModuleType("docs_example")
    monkeypatch.setitem(sys.modules, "docs_example", module)
    exec(blocks("writing_a_pass.md", "python")[0], module.__dict__)
    return module.ClipWeights


def test_the_example_pass_does_what_its_page_says(example):
    model = tiny_model()
    table = Registry.of(example)
    result = Pipeline("clip-weights{percentile=75}", registry=table).run(model)
    assert [c.site for c in result.reports[0].report.changed] == ["m", "y"]
    before = weight(model, "w1")
    limit = np.percentile(np.abs(before), 75)
    clipped = [
        v.const_value.numpy()
        for v in result.model.graph.initializers.values()
        if tuple(v.const_value.shape) == (4, 8)
    ]
    np.testing.assert_allclose(clipped[0], np.clip(before, -limit, limit), rtol=1e-6)


def test_the_example_pass_points_at_its_option(example):
    from onnxq.errors import SpecError

    with pytest.raises(SpecError) as caught:
        parse("clip-weights{percentile=12}", Registry.of(example))
    span = caught.value.span
    assert span.text[span.start : span.stop] == "percentile=12"


def test_the_example_pipeline_parses():
    page = (DOCS / "pipeline.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^canonicalize, .*$", page, re.MULTILINE)
    assert len(parse(text)) == 5


def test_the_example_recipes_are_recipes():
    for block in blocks("pipeline.md", "toml"):
        recipe = _from_table(tomllib.loads(block), Path("example.toml"))
        passes = parse(recipe.passes)
        if len(passes) > 1:
            validate(passes)
