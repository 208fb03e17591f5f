"""Texts into feeds: padding, truncation, caches, and inputs that cannot be made."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from onnxq.data.text import InputSpec, encode_texts, find_tokenizer, load_tokenizer, tokenize
from onnxq.errors import DataError

WORDS = {"[PAD]": 7, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6}


@pytest.fixture
def tokenizer_path(tmp_path):
    """A word-level tokenizer whose file asks for padding and truncation, as many do."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=16, pad_id=7)
    tokenizer.enable_truncation(3)
    path = tmp_path / "model.tokenizer.json"
    tokenizer.save(str(path))
    return path


NAMES = ["input_ids", "attention_mask", "token_type_ids", "position_ids"]


def test_texts_are_padded_to_the_longest_with_the_padding_token(tokenizer_path):
    feeds = encode_texts(["a b c", "b"], tokenizer_path, NAMES, max_length=10)
    assert list(feeds) == NAMES
    np.testing.assert_array_equal(feeds["input_ids"], [[1, 4, 5, 6, 2], [1, 5, 2, 7, 7]])
    np.testing.assert_array_equal(feeds["attention_mask"], [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(feeds["position_ids"], [[0, 1, 2, 3, 4], [0, 1, 2, 2, 2]])
    assert not feeds["token_type_ids"].any()
    assert all(value.dtype == np.int64 for value in feeds.values())


def test_truncation_keeps_the_closing_token_and_pad_to_fixes_the_length(tokenizer_path):
    feeds = encode_texts(["a b c"], tokenizer_path, ["input_ids"], max_length=4, pad_to=6)
    np.testing.assert_array_equal(feeds["input_ids"], [[1, 4, 5, 2, 7, 7]])


def test_a_tokenizer_is_left_as_it_was(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenize(["a b c a b"], tokenizer, 4).ids.shape == (1, 4)
    assert len(tokenizer.encode("a b c a b").ids) == 7


def test_types_and_empty_caches_follow_the_model(tokenizer_path):
    specs = [
        InputSpec("input_ids", np.int32, ("n", "s")),
        InputSpec("past_key_values.0.key", np.float16, ("n", 2, "p", 8)),
    ]
    feeds = encode_texts(["a", "b"], tokenizer_path, specs, max_length=8)
    assert feeds["input_ids"].dtype == np.int32
    assert feeds["past_key_values.0.key"].shape == (2, 2, 0, 8)
    assert feeds["past_key_values.0.key"].dtype == np.float16


@pytest.mark.parametrize(
    ("texts", "inputs", "lengths", "code"),
    [
        ([], ["input_ids"], (8, None), "DATA-EMPTY"),
        (["a"], ["pixel_values"], (8, None), "DATA-INPUT-UNKNOWN"),
        (["a b c"], ["input_ids"], (8, 4), "DATA-TEXT-LENGTH"),
        (["a"], ["input_ids"], (2, None), "DATA-TEXT-LENGTH"),
        (["a"], [InputSpec("input_ids", np.int64, (1, 64))], (8, None), "DATA-INPUT-SHAPE"),
    ],
)
def test_what_does_not_fit_is_an_error_with_a_code(texts, inputs, lengths, code, tokenizer_path):
    with pytest.raises(DataError) as caught:
        encode_texts(texts, tokenizer_path, inputs, *lengths)
    assert caught.value.code == code
    assert caught.value.hint


def test_a_tokenizer_that_is_missing_or_broken_is_an_error(tmp_path):
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    for path in (broken, tmp_path / "none.json"):
        with pytest.raises(DataError) as caught:
            load_tokenizer(path)
        assert caught.value.code == "DATA-TOKENIZER"


def test_the_tokenizer_beside_a_model_is_found(tokenizer_path, tmp_path):
    assert find_tokenizer(tmp_path / "model.onnx") == tokenizer_path
    assert find_tokenizer(tmp_path / "other.onnx") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(tmp_path / "other.onnx") == tmp_path / "tokenizer.json"
