"""The BERT builder against an implementation in plain numpy, and MiniLM against its figures."""

from __future__ import annotations

import fnmatch
import math

import numpy as np
import onnx
import pytest

from onnxq import models
from onnxq.errors import DataError
from onnxq.models.bert import MASK_MIN, SPELLINGS, BertConfig, build_bert

SPELLING_TOLERANCE = 1e-4
"""Largest difference between spellings; hidden states are of the order of 1."""

NUMPY_TOLERANCE = 2e-5
"""Two f32 layers against float64."""

VOCAB, POSITIONS, INNER = 50, 20, 48
CONFIG = BertConfig(hidden_size=32, intermediate_size=INNER, num_heads=4, num_layers=2)


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    d = CONFIG.hidden_size

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    def norm(prefix: str) -> dict[str, np.ndarray]:
        return {f"{prefix}.weight": 1 + normal(d), f"{prefix}.bias": normal(d)}

    def linear(prefix: str, outputs: int, inputs: int) -> dict[str, np.ndarray]:
        return {f"{prefix}.weight": normal(outputs, inputs), f"{prefix}.bias": normal(outputs)}

    weights = {
        "embeddings.word_embeddings.weight": normal(VOCAB, d),
        "embeddings.token_type_embeddings.weight": normal(2, d),
        "embeddings.position_embeddings.weight": normal(POSITIONS, d),
        **norm("embeddings.LayerNorm"),
    }
    for i in range(CONFIG.num_layers):
        p = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            weights |= linear(f"{p}.attention.self.{part}", d, d)
        weights |= linear(f"{p}.attention.output.dense", d, d)
        weights |= norm(f"{p}.attention.output.LayerNorm")
        weights |= linear(f"{p}.intermediate.dense", INNER, d)
        weights |= linear(f"{p}.output.dense", d, INNER)
        weights |= norm(f"{p}.output.LayerNorm")
    return weights


def numpy_bert(w: dict[str, np.ndarray], ids, mask, types) -> np.ndarray:
    """BERT in float64, one sentence and one head at a time, masked keys left out of the softmax."""

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
        return scaled * w[f"{p}.weight"] + w[f"{p}.bias"]

    def linear(x, p):
        return x @ w[f"{p}.weight"].astype(np.float64).T + w[f"{p}.bias"]

    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    size = CONFIG.head_dim
    sentences = []
    for row in range(ids.shape[0]):
        x = w["embeddings.word_embeddings.weight"][ids[row]].astype(np.float64)
        x = x + w["embeddings.token_type_embeddings.weight"][types[row]]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = norm(x, "embeddings.LayerNorm")
        seen = np.flatnonzero(mask[row])
        for i in range(CONFIG.num_layers):
            p = f"encoder.layer.{i}"
            q, k, v = (linear(x, f"{p}.attention.self.{t}") for t in ("query", "key", "value"))
            heads = []
            for h in range(CONFIG.num_heads):
                part = slice(h * size, (h + 1) * size)
                scores = q[:, part] @ k[seen][:, part].T / math.sqrt(size)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                heads.append(weights / weights.sum(-1, keepdims=True) @ v[seen][:, part])
            attended = linear(np.concatenate(heads, -1), f"{p}.attention.output.dense")
            y = norm(x + attended, f"{p}.attention.output.LayerNorm")
            inner = gelu(linear(y, f"{p}.intermediate.dense"))
            x = norm(y + linear(inner, f"{p}.output.dense"), f"{p}.output.LayerNorm")
        sentences.append(x)
    return np.stack(sentences)


def feeds(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.ones((3, 7), dtype=np.int64)
    mask[1, 4:] = 0
    mask[2, 1:] = 0
    return {
        "input_ids": rng.integers(0, VOCAB, mask.shape),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, mask.shape),
    }


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_computes_bert(spelling, optimised, run_model):
    weights, inputs = random_weights(), feeds()
    model = build_bert(weights, CONFIG, spelling, {})
    (got,) = run_model(model, inputs, optimised=optimised)
    want = numpy_bert(
        weights, inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"]
    )
    np.testing.assert_allclose(got, want, atol=NUMPY_TOLERANCE, rtol=0)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_padding_does_not_reach_real_tokens(spelling, run_model):
    model = build_bert(random_weights(), CONFIG, spelling, {})
    inputs = feeds()
    (padded,) = run_model(model, inputs)
    alone = {name: value[1:2, :4] for name, value in inputs.items()}
    (short,) = run_model(model, alone)
    np.testing.assert_allclose(padded[1, :4], short[0], atol=NUMPY_TOLERANCE, rtol=0)


def op_types(spelling: str) -> set[str]:
    return {n.op_type for n in build_bert(random_weights(), CONFIG, spelling, {}).graph.node}


def test_spellings_use_their_exporters_operators():
    plain, torchscript, dynamo = (op_types(spelling) for spelling in SPELLINGS)
    assert {"LayerNormalization", "Gelu"} <= plain
    assert {"Constant", "Erf", "Pow", "ReduceMean", "Sqrt", "Div"} <= torchscript
    assert not {"LayerNormalization", "Gelu"} & torchscript
    assert {"And", "Where", "IsNaN", "Gelu", "LayerNormalization", "Expand"} <= dynamo
    assert "Constant" not in plain | dynamo


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_nodes_are_named_by_their_place_and_the_mask_is_finfo_min(spelling):
    model = build_bert(random_weights(), CONFIG, spelling, {})
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    for layer in range(CONFIG.num_layers):
        prefix = f"/encoder/layer.{layer}"
        for place in ("attention/query", "attention/output/dense", "intermediate/dense"):
            assert f"{prefix}/{place}/MatMul" in names
    # 4 in attention, its two products, 2 in the feed-forward part
    assert len(fnmatch.filter(names, "/encoder/layer.0/*MatMul*")) == 8
    tensors = list(model.graph.initializer)
    tensors += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute]
    scalars = [onnx.numpy_helper.to_array(t) for t in tensors if not t.dims]
    assert any(value == np.float32(MASK_MIN) for value in scalars)


@pytest.mark.parametrize("wrong", [None, np.zeros(3, np.float32)])
def test_a_missing_or_misshapen_tensor_is_an_error_that_names_it(wrong):
    weights = random_weights()
    del weights["encoder.layer.1.output.dense.bias"]
    if wrong is not None:
        weights["encoder.layer.1.output.dense.bias"] = wrong
    with pytest.raises(DataError, match=r"encoder\.layer\.1\.output\.dense\.bias") as caught:
        build_bert(weights, CONFIG, "plain", {})
    assert caught.value.code == "DATA-CHECKPOINT-INCOMPLETE"


@pytest.mark.slow
def test_minilm_spellings_agree_and_builds_are_deterministic(tmp_path, run_model):
    paths = [models.build("minilm", tmp_path / f"{s}.onnx", spelling=s).path for s in SPELLINGS]
    again = models.build("minilm", tmp_path / "again.onnx", spelling="plain")
    assert again.path.read_bytes() == paths[0].read_bytes()
    rng = np.random.default_rng(0)
    mask = np.ones((2, 24), dtype=np.int64)
    mask[1, 9:] = 0
    inputs = {
        "input_ids": rng.integers(1000, 30000, mask.shape),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
    }
    plain, *others = (run_model(onnx.load(path), inputs)[0] for path in paths)
    for other in others:
        np.testing.assert_allclose(other, plain, atol=SPELLING_TOLERANCE, rtol=0)
