"""What can be built, and how requests that make no sense are answered."""

from __future__ import annotations

import json

import onnx
import pytest

from onnxq import models
from onnxq.errors import DataError, SpecError


def test_models_are_listed_with_licence_task_and_options():
    infos = {info.name: info for info in models.available()}
    assert sorted(infos) == ["minilm", "smollm2-135m", "stories260k"]
    assert infos["minilm"].eval_task == "sts"
    assert infos["minilm"].options[0].values == ("plain", "torchscript", "dynamo")
    assert infos["stories260k"].licence == "MIT"
    assert [o.name for o in infos["smollm2-135m"].options] == ["kv_cache", "dtype"]


@pytest.fixture
def pinned(llama2c_files, monkeypatch):
    """The random checkpoint's folder; a path that the user gives is not hashed."""
    return llama2c_files[0].parent


def test_a_build_is_deterministic_self_contained_and_says_what_it_is(pinned, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = models.build("stories260k", out / "a.onnx", checkpoint=pinned, kv_cache=True)
    second = models.build("stories260k", out / "b.onnx", checkpoint=pinned, **{"kv-cache": "true"})
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.tokenizer_path == out / "a.tokenizer.json"
    assert first.tokenizer_path.read_bytes() == second.tokenizer_path.read_bytes()
    assert sorted(p.name for p in out.iterdir()) == [
        "a.onnx", "a.tokenizer.json", "b.onnx", "b.tokenizer.json",
    ]  # fmt: skip
    model = onnx.load(first.path)
    onnx.checker.check_model(model, full_check=True)
    props = {p.key: p.value for p in model.metadata_props}
    assert props["onnxq.model"] == "stories260k"
    assert props["onnxq.eval_task"] == first.eval_task == "perplexity"
    assert json.loads(props["onnxq.model.options"]) == {"dtype": "float32", "kv_cache": "true"}
    assert [o.version for o in model.opset_import] == [21]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bert-large", {}, "minilm"),
        ("minilm", {"spelling": "tf"}, "torchscript"),
        ("minilm", {"kv_cache": True}, "spelling"),
        ("stories260k", {"dtype": "bfloat16"}, "float16"),
    ],
)
def test_unknown_names_and_options_are_spec_errors_with_the_choices(name, options, words, tmp_path):
    with pytest.raises(SpecError) as caught:
        models.build(name, tmp_path / "m.onnx", **options)
    assert words in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_fails_before_the_work(pinned, tmp_path):
    for target in (tmp_path / "no" / "folder.onnx", tmp_path / "m.bin"):
        with pytest.raises(DataError) as caught:
            models.build("stories260k", target, checkpoint=pinned)
        assert caught.value.code.startswith("DATA-OUTPUT")
