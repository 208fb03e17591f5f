"""The recipes for decoders: they validate, and what they make resembles the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration.data import open_data
from onnxq.models.checkpoints import LlamaCheckpoint, LlamaConfig
from onnxq.models.llama import build_llama
from onnxq.pipeline import recipes
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.runner import Pipeline
from onnxq.pipeline.validate import validate
from tests.passes.helpers import run

LLM = ("w8a8-llm", "w4a16", "w4a8", "w4a4", "mxfp4", "nvfp4")
LEAST = {"w8a8-llm": 0.99, "w4a16": 0.96, "w4a8": 0.96, "w4a4": 0.9, "mxfp4": 0.85, "nvfp4": 0.9}
"""Cosine of logits on a random model, where an error of 4 bits is not averaged out."""


def decoder() -> ir.Model:
    """Two layers of random weights, widths 64 and 128."""
    rng = np.random.default_rng(0)
    config = LlamaConfig(80, 64, 128, 2, 4, 2, 64, 1e4, 1e-5)
    shapes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    weights = {
        f"model.layers.{layer}.{name}.weight": (rng.standard_normal(shape) / 8).astype(np.float32)
        for layer in range(2)
        for name, shape in shapes.items()
    }
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gamma = rng.uniform(0.3, 2, 64).astype(np.float32)
            weights[f"model.layers.{layer}.{norm}.weight"] = gamma
    weights["model.norm.weight"] = np.ones(64, np.float32)
    table = rng.standard_normal((80, 64)).astype(np.float32)
    table[:, 5] *= 20
    weights["model.embed_tokens.weight"] = table
    checkpoint = LlamaCheckpoint(config, weights, {})
    return ir.from_proto(build_llama(checkpoint, kv_cache=False, dtype="float32", metadata={}))


@pytest.mark.parametrize("name", LLM)
def test_recipes_are_in_an_order_that_works(name: str) -> None:
    validate(parse(recipes.find(name).passes), has_data=True)


@pytest.mark.parametrize("name", LLM)
def test_recipes_make_a_model_that_resembles_the_original(name: str) -> None:
    model = decoder()
    rng = np.random.default_rng(1)
    samples = [{"input_ids": rng.integers(0, 80, (1, 48))} for _ in range(6)]
    data = open_data(samples[:4], model)
    passes = recipes.find(name).passes.replace("learn-rotation", "learn-rotation{steps=20}")
    result = Pipeline(passes).run(model, data=data, holdout=open_data(samples[4:], model))
    before, after = (run(m, samples[5])["logits"] for m in (model, result.model))
    cosine = float((before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after))
    assert cosine > LEAST[name]
    assert cosine < 1 - 1e-7


def test_every_recipe_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in recipes.names():
        assert f"`{name}`" in page
