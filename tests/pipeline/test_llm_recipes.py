"""The recipes for decoders: they validate, and what they make resembles the original."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration.data import open_data
from onnxq.pipeline import recipes
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.runner import Pipeline
from onnxq.pipeline.validate import validate
from tests.passes.helpers import run
from tests.passes.transform.wide import llama

LLM = ("w8a8-llm", "w4a16", "w4a8", "w4a4", "mxfp4", "nvfp4")
LEAST = {"w8a8-llm": 0.99, "w4a16": 0.96, "w4a8": 0.96, "w4a4": 0.9, "mxfp4": 0.85, "nvfp4": 0.9}
"""Cosine of logits on a random model, where an error of 4 bits is not averaged out."""


def decoder() -> ir.Model:
    """Two layers of random weights, widths 64 and 128, one channel of outliers."""
    return llama(hidden=64, heads=2, kv_heads=1, inner=128, outlier=20.0, double=False)


@pytest.mark.parametrize("name", LLM)
def test_recipes_are_in_an_order_that_works(name: str) -> None:
    validate(parse(recipes.find(name).passes), has_data=True)


@pytest.mark.parametrize("name", LLM)
def test_recipes_make_a_model_that_resembles_the_original(name: str) -> None:
    model = decoder()
    rng = np.random.default_rng(1)
    samples = [{"input_ids": rng.integers(0, 50, (1, 48))} for _ in range(6)]
    data = open_data(samples[:4], model)
    passes = re.sub(
        r"learn-rotation(\{(.*?)\})?", r"learn-rotation{steps=20 \2}", recipes.find(name).passes
    )
    result = Pipeline(passes).run(model, data=data, holdout=open_data(samples[4:], model))
    before, after = (run(m, samples[5])["logits"] for m in (model, result.model))
    cosine = float((before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after))
    assert cosine > LEAST[name]
    assert cosine < 1 - 1e-7


def test_every_recipe_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in recipes.names():
        assert f"`{name}`" in page
