"""The Llama builder against llama2.c's algorithm in plain numpy, and the cache against prefill."""

from __future__ import annotations

import struct

import numpy as np
import onnx
import pytest

from onnxq import models
from onnxq.errors import DataError
from onnxq.models import checkpoints
from onnxq.models.llama import build_llama

NUMPY_TOLERANCE = 2e-4
"""Two f32 layers against float64; logits are of the order of 10."""

CACHE_TOLERANCE = 1e-3
FLOAT16_TOLERANCE = 5e-2


def llama2c_forward(raw: bytes, ids: list[int]) -> np.ndarray:
    """Logits ``[S, V]`` the way llama2.c's run.c computes them: token by token, pairs rotated."""
    dim, hidden, layers, heads, kv_heads, vocab, _ = struct.unpack_from("<7i", raw)
    size = dim // heads
    flat = np.frombuffer(raw, "<f4", offset=28).astype(np.float64)
    cursor = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal cursor
        count = int(np.prod(shape))
        cursor += count
        return flat[cursor - count : cursor].reshape(shape)

    embed, att_norm = take(vocab, dim), take(layers, dim)
    wq, wk, wv = (take(layers, n * size, dim) for n in (heads, kv_heads, kv_heads))
    wo, ffn_norm = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    final_norm = take(dim)

    def rms(x, w):
        return w * x / np.sqrt((x * x).mean() + 1e-5)

    def rotate(x, position):
        x = x.copy()
        for i in range(0, len(x), 2):
            angle = position * 10000.0 ** (-(i % size) / size)
            a, b = x[i], x[i + 1]
            x[i] = a * np.cos(angle) - b * np.sin(angle)
            x[i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return x

    keys = [[] for _ in range(layers)]
    values = [[] for _ in range(layers)]
    rows = []
    for position, token in enumerate(ids):
        x = embed[token].copy()
        for layer in range(layers):
            h = rms(x, att_norm[layer])
            q = rotate(wq[layer] @ h, position)
            keys[layer].append(rotate(wk[layer] @ h, position))
            values[layer].append(wv[layer] @ h)
            out = np.zeros(dim)
            for head in range(heads):
                group = head // (heads // kv_heads)
                past = np.array(keys[layer])[:, group * size : (group + 1) * size]
                scores = past @ q[head * size : (head + 1) * size] / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                past = np.array(values[layer])[:, group * size : (group + 1) * size]
                out[head * size : (head + 1) * size] = weights @ past
            x = x + wo[layer] @ out
            h = rms(x, ffn_norm[layer])
            gate = w1[layer] @ h
            x = x + w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ h))
        rows.append(embed @ rms(x, final_norm))
    return np.array(rows)


@pytest.fixture
def checkpoint(llama2c_files):
    return checkpoints.read_llama2c(*llama2c_files)


def build(checkpoint, **options):
    return build_llama(
        checkpoint, **{"kv_cache": False, "dtype": "float32", "metadata": {}, **options}
    )


IDS = np.array([[1, 270, 44, 7, 299, 44, 44, 3, 120, 9]])


def empty_cache(model: onnx.ModelProto, batch: int = 1) -> dict[str, np.ndarray]:
    feeds = {}
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            heads, size = (value.type.tensor_type.shape.dim[i].dim_value for i in (1, 3))
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feeds[value.name] = np.zeros((batch, heads, 0, size), dtype)
    return feeds


def step(run_model, model, ids, cache, mask, positions):
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
    logits, *presents = run_model(model, feeds)
    names = [value.name for value in model.graph.output][1:]
    renamed = {
        name.replace("present", "past_key_values"): p
        for name, p in zip(names, presents, strict=True)
    }
    return logits, renamed


@pytest.mark.parametrize("optimised", [False, True])
def test_logits_are_those_of_llama2c(llama2c_files, checkpoint, optimised, run_model):
    want = llama2c_forward(llama2c_files[0].read_bytes(), IDS[0].tolist())
    (got,) = run_model(build(checkpoint), {"input_ids": IDS}, optimised=optimised)
    np.testing.assert_allclose(got[0], want, atol=NUMPY_TOLERANCE, rtol=0)


def test_decoding_with_the_cache_equals_prefill(checkpoint, run_model):
    (want,) = run_model(build(checkpoint), {"input_ids": IDS})
    model = build(checkpoint, kv_cache=True)
    cache = empty_cache(model)
    got = []
    done = 0
    for size in (4, 1, 1, 3, 1):
        ids = IDS[:, done : done + size]
        positions = np.arange(done, done + size)[None]
        mask = np.ones((1, done + size), dtype=np.int64)
        logits, cache = step(run_model, model, ids, cache, mask, positions)
        got.append(logits[0])
        done += size
    assert done == IDS.shape[1]
    assert cache["past_key_values.1.value"].shape == (1, 2, done, 4)
    np.testing.assert_allclose(np.concatenate(got), want[0], atol=CACHE_TOLERANCE, rtol=0)


def test_left_padding_changes_nothing(checkpoint, run_model):
    (want,) = run_model(build(checkpoint), {"input_ids": IDS})
    model = build(checkpoint, kv_cache=True)
    pad = 3
    ids = np.concatenate([np.full((1, pad), 5), IDS], axis=1)
    mask = np.ones_like(ids)
    mask[:, :pad] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    logits, _ = step(run_model, model, ids, empty_cache(model), mask, positions)
    np.testing.assert_allclose(logits[0, pad:], want[0], atol=CACHE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("kv_cache", [False, True])
def test_float16_holds_half_the_bytes_and_nearly_the_same_function(checkpoint, kv_cache, run_model):
    wide = build(checkpoint, kv_cache=kv_cache)
    narrow = build(checkpoint, kv_cache=kv_cache, dtype="float16")
    weight = next(t for t in narrow.graph.initializer if t.name.endswith("q_proj.weight"))
    assert weight.data_type == onnx.TensorProto.FLOAT16
    feeds = {"input_ids": IDS}
    if kv_cache:
        feeds |= {"attention_mask": np.ones_like(IDS), "position_ids": np.arange(IDS.size)[None]}
    want = run_model(wide, {**feeds, **empty_cache(wide)} if kv_cache else feeds)[0]
    got = run_model(narrow, {**feeds, **empty_cache(narrow)} if kv_cache else feeds)[0]
    assert got.dtype == np.float32
    error = np.abs(got - want).max()
    assert 0 < error < FLOAT16_TOLERANCE * np.abs(want).max()


def test_a_tied_output_layer_is_stored_once(checkpoint):
    model = build(checkpoint)
    names = [t.name for t in model.graph.initializer]
    assert "lm_head.weight" not in names
    transposes = [n for n in model.graph.node if n.name == "/lm_head/Transpose"]
    assert list(transposes[0].input) == ["model.embed_tokens.weight"]


def test_an_output_layer_of_its_own_is_used(checkpoint, run_model):
    c = checkpoint.config
    head = np.random.default_rng(3).normal(size=(c.vocab_size, c.hidden_size)).astype(np.float32)
    untied = checkpoints.LlamaCheckpoint(c, {**checkpoint.weights, "lm_head.weight": head}, {})
    (tied_logits,) = run_model(build(checkpoint), {"input_ids": IDS})
    (logits,) = run_model(build(untied), {"input_ids": IDS})
    embed = checkpoint.weights["model.embed_tokens.weight"].astype(np.float64)
    final = np.linalg.lstsq(embed, tied_logits[0].T, rcond=None)[0].T  # rms(x), from the tied model
    np.testing.assert_allclose(logits[0], final @ head.T, atol=NUMPY_TOLERANCE, rtol=0)


def test_a_missing_tensor_is_an_error_that_names_it(checkpoint):
    weights = dict(checkpoint.weights)
    del weights["model.layers.0.mlp.up_proj.weight"]
    broken = checkpoints.LlamaCheckpoint(checkpoint.config, weights, {})
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.up_proj"):
        build(broken)


def test_stories260k_writes_fluent_english_greedily(shared, tmp_path, run_model):
    from tokenizers import Tokenizer

    built = models.build(
        "stories260k", tmp_path / "s.onnx", checkpoint=shared / "data" / "stories260k"
    )
    tokenizer = Tokenizer.from_file(str(built.tokenizer_path))
    model = onnx.load(built.path)
    ids = tokenizer.encode("Once upon a time").ids
    for _ in range(44):
        (logits,) = run_model(model, {"input_ids": np.array([ids])}, optimised=True)
        ids.append(int(logits[0, -1].argmax()))
    # What llama2.c itself prints for this checkpoint at temperature 0 (its doc/stories260K.md).
    assert tokenizer.decode(ids).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball."
    )


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(tmp_path, run_model):
    from tokenizers import Tokenizer

    built = models.build("smollm2-135m", tmp_path / "smollm2.onnx")
    tokenizer = Tokenizer.from_file(str(built.tokenizer_path))
    ids = tokenizer.encode("The capital of France is").ids
    (logits,) = run_model(onnx.load(built.path), {"input_ids": np.array([ids])}, optimised=True)
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
