"""The tokenizers written for checkpoints, against llama2.c's algorithm and published token ids."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from onnxq import models
from onnxq.errors import UnsupportedError
from onnxq.models import checkpoints
from onnxq.models.tokenizers import tokenizer_json


def llama2c_encode(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """``encode`` of llama2.c's run.c: characters or bytes, then the best-scored pair again."""
    ids = {token: i for i, token in reversed(list(enumerate(tokens)))}
    out = []
    for character in " " + text:
        known = ids.get(character)
        out += [b + 3 for b in character.encode()] if known is None else [known]
    while True:
        best = None
        for i in range(len(out) - 1):
            merged = ids.get(tokens[out[i]] + tokens[out[i + 1]])
            if merged is not None and (best is None or scores[merged] > best[0]):
                best = (scores[merged], i, merged)
        if best is None:
            return out
        out[best[1] : best[1] + 2] = [best[2]]


def test_sentencepiece_scores_become_equal_merges(llama2c_files):
    loaded = checkpoints.read_llama2c(*llama2c_files).tokenizer
    tokenizer = Tokenizer.from_str(tokenizer_json(loaded))
    for text in ("ab", "abab ab b", "bababa  ab", "ab\nzé", "a b a ba b"):
        got = tokenizer.encode(text, add_special_tokens=False).ids
        assert got == llama2c_encode(text, loaded["tokens"], loaded["scores"]), text
        assert tokenizer.decode(got) == text
    assert tokenizer.encode("ab").ids[0] == tokenizer.token_to_id("<s>") == 1


def test_tok512_encodes_a_story_as_llama2c_does(shared):
    folder = shared / "data" / "stories260k"
    loaded = checkpoints.read_llama2c(folder / "stories260K.bin", folder / "tok512.bin").tokenizer
    tokenizer = Tokenizer.from_str(tokenizer_json(loaded))
    text = (folder / "TinyStories-valid-30KB.txt").read_text()[5000:6000]
    want = llama2c_encode(text, loaded["tokens"], loaded["scores"])
    assert tokenizer.encode(text, add_special_tokens=False).ids == want


def test_an_unknown_pre_tokenizer_is_refused():
    with pytest.raises(UnsupportedError, match="llama-bpe"):
        tokenizer_json({"kind": "byte-level-bpe", "pre": "llama-bpe"})


@pytest.mark.slow
def test_smollm2_splits_digits_and_keeps_its_special_tokens(tmp_path):
    built = models.build("smollm2-135m", tmp_path / "m.onnx", dtype="float16")
    tokenizer = Tokenizer.from_file(str(built.tokenizer_path))
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    assert tokenizer.encode("<|im_start|>").ids == [1]
    text = "Ünïcode \n\n  and spaces 42."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert json.loads(built.tokenizer_path.read_text())["model"]["type"] == "BPE"
