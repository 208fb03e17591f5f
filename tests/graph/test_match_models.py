"""Real models: the same counts in every exporter's spelling, and each match computed again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxq import models
from onnxq.errors import DataError
from onnxq.graph.match import Structure, ValueToOutput, analyze, analyze_all

from . import match_helpers as mh

RNG = np.random.default_rng(0)


def build(name: str, folder: Path, **options: Any) -> ir.Model:
    """A model from its checkpoint; skips where it can neither be found nor fetched."""
    out = folder / "model.onnx"
    try:
        models.build(name, out, **options)
    except DataError as error:
        pytest.skip(f"the checkpoint of {name} cannot be had: {error.code}")
    return ir.load(out)


def counts(structure: Structure) -> dict[str, int]:
    return {
        key: len(getattr(structure, key))
        for key in ("linears", "norms", "attentions", "embeddings", "residual_adds", "gated_mlps")
    }


@pytest.mark.parametrize("spelling", ["plain", "torchscript", "dynamo"])
def test_minilm_is_the_same_in_three_spellings(spelling: str, tmp_path: Path) -> None:
    model = build("minilm", tmp_path, spelling=spelling)
    structure = analyze(model)
    assert counts(structure) == {
        "linears": 36,
        "norms": 13,
        "attentions": 6,
        "embeddings": 3,
        "residual_adds": 12,
        "gated_mlps": 0,
    }
    assert not structure.rejected
    assert Counter(a.kind for a in structure.activations) == {"gelu": 6}
    assert {n.kind for n in structure.norms} == {"layernorm"}
    assert {n.features for n in structure.norms} == {384}
    assert {a.num_heads for a in structure.attentions} == {12}
    for attention in structure.attentions:
        assert attention.mask is not None
        assert attention.mask_style == "add"
        assert attention.scale == pytest.approx(32**-0.5)
        way = structure.v_to_o(attention)
        assert isinstance(way, ValueToOutput)
        assert way.channel_map == tuple(range(384))
    readers = [len(structure.readers_of(n.output)) for n in structure.norms[:-1]]
    assert readers == [3, 1] * 6, "q, k, v read one norm, the MLP the next"
    for norm in structure.norms[:-1]:
        (add,) = structure.other_readers_of(norm.output)
        assert add in {r.node for r in structure.residual_adds}


def _ids(shape: tuple[int, ...], high: int) -> np.ndarray:
    return RNG.integers(1, high, shape).astype(np.int64)


def _bert_feeds(high: int) -> dict[str, np.ndarray]:
    mask = np.ones((2, 5), np.int64)
    mask[1, 3:] = 0
    return {
        "input_ids": _ids((2, 5), high),
        "attention_mask": mask,
        "token_type_ids": np.zeros((2, 5), np.int64),
    }


def test_minilm_matches_compute_what_the_graph_computes(tmp_path: Path) -> None:
    model = build("minilm", tmp_path, spelling="torchscript")
    mh.check_against_runtime(model, analyze(model), _bert_feeds(30000))


def test_bert_tiny_of_a_real_export() -> None:
    model = ir.load(mh.shared("models", "sst2-bert-tiny", "model.onnx"))
    structure = analyze(model)
    assert counts(structure) == {
        "linears": 14,
        "norms": 5,
        "attentions": 2,
        "embeddings": 3,
        "residual_adds": 4,
        "gated_mlps": 0,
    }
    assert Counter(a.kind for a in structure.activations) == {"gelu": 2, "tanh": 1}
    mh.check_against_runtime(model, structure, _bert_feeds(30000))
    way = structure.v_to_o(structure.attentions[0])
    assert isinstance(way, ValueToOutput)
    assert (way.num_heads, way.head_dim) == (2, 64)
    mh.assert_scaling_changes_nothing(model, way, _bert_feeds(30000))


def test_stories260k_has_grouped_queries(tmp_path: Path) -> None:
    model = build("stories260k", tmp_path, checkpoint=mh.shared("data", "stories260k"))
    structure = analyze(model)
    assert counts(structure) == {
        "linears": 36,
        "norms": 11,
        "attentions": 5,
        "embeddings": 1,
        "residual_adds": 10,
        "gated_mlps": 5,
    }
    assert not structure.rejected
    assert {n.kind for n in structure.norms} == {"rmsnorm"}
    assert {a.kind for a in structure.activations} == {"silu"}
    ids = _ids((2, 7), 512)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    mh.check_against_runtime(model, structure, feeds)
    way = structure.v_to_o(structure.attentions[0])
    assert isinstance(way, ValueToOutput)
    assert (way.num_heads, way.kv_heads, way.head_dim, way.repeats) == (8, 4, 8, 2)
    mh.assert_scaling_changes_nothing(model, way, feeds)


def test_a_cache_bars_the_way_from_v_to_o(tmp_path: Path) -> None:
    folder = mh.shared("data", "stories260k")
    structure = analyze(build("stories260k", tmp_path, checkpoint=folder, kv_cache=True))
    assert len(structure.attentions) == 5
    for attention in structure.attentions:
        way = structure.v_to_o(attention)
        assert isinstance(way, str)
        assert "output" in way or "Concat" in way


@pytest.mark.slow
def test_smollm2_has_thirty_layers(tmp_path: Path) -> None:
    structure = analyze(build("smollm2-135m", tmp_path))
    assert counts(structure) == {
        "linears": 211,
        "norms": 61,
        "attentions": 30,
        "embeddings": 1,
        "residual_adds": 60,
        "gated_mlps": 30,
    }
    way = structure.v_to_o(structure.attentions[-1])
    assert isinstance(way, ValueToOutput)
    assert (way.num_heads, way.kv_heads, way.head_dim) == (9, 3, 64)


@pytest.mark.parametrize("name", ["model.onnx", "model_unfused_bn.onnx"])
def test_efficientnet_has_depthwise_convs_relu6_and_residuals(name: str) -> None:
    structure = analyze(ir.load(mh.shared("models", "efficientnet-lite0", name)))
    assert Counter(linear.kind for linear in structure.linears) == {"conv": 49, "gemm": 1}
    assert sum(linear.is_depthwise for linear in structure.linears) == 16
    assert Counter(a.kind for a in structure.activations) == {"relu6": 33}
    assert len(structure.residual_adds) == 9
    assert not structure.rejected


def test_odd_graphs_are_analyzed_down_to_their_subgraphs() -> None:
    nested = list(analyze_all(ir.load(mh.shared("models", "odd", "silero_vad", "silero_vad.onnx"))))
    by_graph = {s.graph.name: len(s.linears) for s in nested if s.linears}
    assert by_graph == {"If_0_then_branch": 6, "If_0_else_branch": 6}
    old = analyze(ir.load(mh.shared("models", "odd", "ortex", "mnist.onnx")))
    assert [linear.kind for linear in old.linears] == ["conv", "conv"]
