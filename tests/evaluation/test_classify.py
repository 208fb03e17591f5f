"""Accuracy on images and sentences: counted by hand, and the recorded figures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxq.errors import DataError, SpecError
from onnxq.evaluation import evaluate

MEAN_COLOUR = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 3, h, w] x) => (float[n, 3] logits) {
    pooled = GlobalAveragePool(x)
    logits = Flatten(pooled)
}"""


@pytest.fixture
def folder(tmp_path):
    """Red, green and blue; the classes 0, 1, 2 belong to them, the fourth line is wrong."""
    root = tmp_path / "images"
    root.mkdir()
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (0, 0, 200)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (20, 16), colour).save(root / f"{i}.png")
    names = ["red", "green", "blue", "red"]
    lines = [
        f"{i}.png\t{c}\tn_{n}" for i, (c, n) in enumerate(zip([0, 1, 2, 0], names, strict=True))
    ]
    (root / "labels.txt").write_text("\n".join(lines) + "\n")
    return root


SPEC = "resize=8,crop=8,mean=127,std=128"


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_top1_counts_hits(save_model, folder, batch):
    got = evaluate(save_model(MEAN_COLOUR), "imagenet", folder, spec=SPEC, batch=batch)
    assert (got.value, got.n) == (75.0, 4)
    assert got.details["top5-percent"] == 100.0
    limited = evaluate(save_model(MEAN_COLOUR), "imagenet", folder, spec=SPEC, limit=3)
    assert (limited.value, limited.n) == (100.0, 3)


def test_labels_that_the_model_does_not_have_are_an_error(save_model, folder):
    with pytest.raises(DataError, match="classes 0 to 2") as caught:
        evaluate(save_model(MEAN_COLOUR), "imagenet", folder, spec=SPEC, offset=1)
    assert caught.value.code == "DATA-LABELS"


def test_folders_that_do_not_fit_are_errors(save_model, folder):
    model = save_model(MEAN_COLOUR)
    labels = folder / "labels.txt"
    for content, code in (
        ("", "DATA-EMPTY"),
        ("0.png red\n", "DATA-COLUMNS"),
        ("9.png\t1\n", "DATA-IMAGE"),
        (None, "DATA-FILE"),
    ):
        if content is None:
            labels.unlink()
        else:
            labels.write_text(content)
        with pytest.raises(DataError) as caught:
            evaluate(model, "imagenet", folder, spec=SPEC)
        assert caught.value.code == code


def test_images_of_the_wrong_size_for_the_model_are_an_error(save_model, folder):
    model = save_model(MEAN_COLOUR.replace("h, w", "4, 4"))
    with pytest.raises(DataError, match=r"x \[4, 3, 8, 8\]") as caught:
        evaluate(model, "imagenet", folder, spec=SPEC)
    assert caught.value.code == "DATA-MODEL-RUN"


SENTENCES = """<ir_version: 10, opset_import: ["" : 21]>
g (int64[n, s] input_ids, int64[n, s] attention_mask) => (float[n, 2] logits) {
    rows = Gather(table, input_ids)
    mask = Cast <to = 1> (attention_mask)
    last = Constant <value_ints = [-1]> ()
    column = Unsqueeze(mask, last)
    kept = Mul(rows, column)
    one = Constant <value_ints = [1]> ()
    logits = ReduceSum <keepdims = 0> (kept, one)
}"""
VOTES = np.array([[9, 0], [0, 0], [1, 0], [0, 1], [0, 0], [0, 0]], np.float32)
"""'a' votes for class 0, 'b' for 1, and padding would shout 0 if it were heard."""


@pytest.mark.parametrize("header", ["", "sentence\tlabel\n"])
def test_accuracy_counts_sentences_and_skips_a_header(save_model, tokenizer, tmp_path, header):
    path = tmp_path / "s.tsv"
    path.write_text(header + "a a b\t0\nb\t1\nb b a c d\t0\n b c\t1\n")
    model = save_model(SENTENCES, table=VOTES)
    got = evaluate(model, "sst2", path, tokenizer=tokenizer)
    assert (got.value, got.n) == (75.0, 4)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("a\t0\nb\n", "DATA-COLUMNS"),
        ("a\t0\nb\tgood\n", "DATA-COLUMNS"),
        ("a\t2\n", "DATA-LABELS"),
        ("\n", "DATA-EMPTY"),
    ],
)
def test_tables_that_do_not_fit_are_errors(save_model, tokenizer, tmp_path, content, code):
    path = tmp_path / "s.tsv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        evaluate(save_model(SENTENCES, table=VOTES), "sst2", path, tokenizer=tokenizer)
    assert caught.value.code == code


def test_a_task_that_the_model_cannot_do_is_an_error(save_model, folder, tokenizer, tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text("a\t0\n")
    with pytest.raises(DataError) as caught:
        evaluate(save_model(MEAN_COLOUR), "sst2", path, tokenizer=tokenizer)
    assert caught.value.code == "DATA-INPUT-UNKNOWN"
    sentences = save_model(SENTENCES, table=VOTES)
    with pytest.raises(DataError) as caught:
        evaluate(sentences, "imagenet", folder)
    assert caught.value.code == "DATA-INPUT-UNKNOWN"
    with pytest.raises(DataError) as caught:
        evaluate(sentences, "perplexity", path, tokenizer=tokenizer, window=2)
    assert caught.value.code == "DATA-OUTPUT-UNKNOWN"
    with pytest.raises(DataError) as caught:
        evaluate(sentences, "sst2", path)
    assert caught.value.code == "DATA-TOKENIZER"


def test_unknown_tasks_and_silly_numbers_are_spec_errors(save_model, folder):
    model = save_model(MEAN_COLOUR)
    with pytest.raises(SpecError, match="glue") as caught:
        evaluate(model, "glue", folder)
    assert "imagenet, perplexity, sst2, sts" in caught.value.hint
    for options in ({"batch": 0}, {"limit": -1}, {"threads": 0}, {"offset": "x"}, {"size": 3}):
        with pytest.raises(SpecError) as caught:
            evaluate(model, "imagenet", folder, **options)
        assert caught.value.code == "SPEC-EVAL-OPTION"


def test_a_missing_or_broken_model_is_an_error(folder, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    for path, code in ((broken, "DATA-MODEL-LOAD"), (tmp_path / "no", "DATA-MODEL-MISSING")):
        with pytest.raises(DataError) as caught:
            evaluate(path, "imagenet", folder)
        assert caught.value.code == code


def test_a_session_factory_opens_the_model(save_model, folder):
    from onnxq.evaluation import cpu_session

    opened = []

    def factory(path):
        opened.append(path)
        return cpu_session(path)

    model = save_model(MEAN_COLOUR)
    got = evaluate(model, "imagenet", folder, spec=SPEC, session_factory=factory)
    assert got.value == 75.0
    assert opened == [model]


def test_bert_tiny_has_the_recorded_accuracy(shared):
    model = shared / "models" / "sst2-bert-tiny" / "model.onnx"
    got = evaluate(model, "sst2", shared / "data" / "sst2" / "dev.tsv")
    assert got.n == 872
    assert got.value == pytest.approx(77.87, abs=0.005)


@pytest.mark.slow
def test_efficientnet_has_the_recorded_accuracy(shared):
    folder = shared / "data" / "imagenet500"
    values = [
        evaluate(shared / "models" / "efficientnet-lite0" / name, "imagenet", folder).value
        for name in ("model.onnx", "model_unfused_bn.onnx")
    ]
    assert 87.0 <= values[0] <= 88.0
    assert values[1] == pytest.approx(values[0], abs=0.2)
