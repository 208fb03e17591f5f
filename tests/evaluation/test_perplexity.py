"""Perplexity against sums written out by hand, and the published-checkpoint figures."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from onnxq import models
from onnxq.errors import DataError, SpecError
from onnxq.evaluation import cpu_session, evaluate
from onnxq.evaluation.perplexity import negative_log_likelihood

TEXT = "a b c d d c b a a c b"
IDS = [2, 3, 4, 5, 5, 4, 3, 2, 2, 4, 3]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def expected(table: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    logs = log_softmax(table.astype(np.float64), axis=1)
    return float(np.exp(-np.mean([logs[a, b] for a, b in pairs])))


def pairs(ids: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(ids))


def test_windows_without_bos_do_not_predict_their_first_token(bigram, text, tokenizer):
    path, table = bigram
    got = evaluate(path, "perplexity", text, tokenizer=tokenizer, window=4, bos=False)
    want = pairs(IDS[0:4]) + pairs(IDS[4:8])  # the last three tokens fill no window
    assert got.n == 6
    assert got.value == pytest.approx(expected(table, want), rel=1e-6)
    assert got.details["windows"] == 2


@pytest.mark.parametrize("bos", ["auto", True, "true"])
def test_bos_counts_in_the_window_and_predicts_its_first_word(bigram, text, tokenizer, bos):
    path, table = bigram
    got = evaluate(path, "perplexity", text, tokenizer=tokenizer, window=5, bos=bos)
    want = pairs([1, *IDS[0:4]]) + pairs([1, *IDS[4:8]])
    assert got.n == 8
    assert got.value == pytest.approx(expected(table, want), rel=1e-6)


def test_overlapping_windows_predict_every_token_once(bigram, text, tokenizer):
    path, table = bigram
    got = evaluate(path, "perplexity", text, tokenizer=tokenizer, window=5, stride=2, bos=False)
    assert got.n == 10
    assert got.value == pytest.approx(expected(table, pairs(IDS)), rel=1e-6)


def test_limit_counts_windows_batches_change_nothing_and_progress_is_told(bigram, text, tokenizer):
    path, table = bigram
    calls = []
    options = {"tokenizer": tokenizer, "window": 3, "bos": False}
    got = evaluate(path, "perplexity", text, limit=1, **options)
    assert got.value == pytest.approx(expected(table, pairs(IDS[:3])), rel=1e-6)
    one = evaluate(path, "perplexity", text, **options)
    two = evaluate(
        path, "perplexity", text, batch=2, progress=lambda *a: calls.append(a), **options
    )
    assert one.value == pytest.approx(two.value, rel=1e-9)
    assert calls == [(2, 3), (3, 3)]


def test_large_logits_do_not_overflow():
    logits = np.array([[1000.0, 0.0], [0.0, -1000.0]], np.float32)
    assert negative_log_likelihood(logits, [1, 0]) == pytest.approx(1000.0)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"window": 12, "bos": False}, "DATA-TOO-FEW"),
        ({"window": 1}, "SPEC-EVAL-OPTION"),
        ({"stride": 9, "window": 8}, "SPEC-EVAL-OPTION"),
        ({"bos": "yes"}, "SPEC-EVAL-OPTION"),
        ({"window": "many"}, "SPEC-EVAL-OPTION"),
        ({"windows": 3}, "SPEC-EVAL-OPTION"),
    ],
)
def test_options_that_do_not_fit_are_errors(bigram, text, tokenizer, options, code):
    with pytest.raises((DataError, SpecError)) as caught:
        evaluate(bigram[0], "perplexity", text, tokenizer=tokenizer, **options)
    assert caught.value.code == code


def test_a_tokenizer_of_another_model_is_noticed(save_model, text, tokenizer):
    path = save_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (int64[n, s] input_ids) => (float[n, s, 3] logits) {
            logits = Gather(table, input_ids)
        }""",
        table=np.zeros((6, 3), np.float32),
    )
    with pytest.raises(DataError, match="knows 6 tokens"):
        evaluate(path, "perplexity", text, tokenizer=tokenizer, window=4)


@pytest.mark.parametrize("kv_cache", [False, True])
def test_stories260k_has_the_recorded_perplexity(shared, tmp_path, kv_cache):
    folder = shared / "data" / "stories260k"
    built = models.build("stories260k", tmp_path / "s.onnx", checkpoint=folder, kv_cache=kv_cache)
    text = folder / "TinyStories-valid-30KB.txt"
    got = evaluate(built.path, built.eval_task, text, window=512, limit=1)
    assert got.details["bos"]
    assert got.value == pytest.approx(4.48, abs=0.01)


@pytest.mark.slow
def test_smollm2_has_the_recorded_perplexity(shared, tmp_path):
    built = models.build("smollm2-135m", tmp_path / "s.onnx")
    text = shared / "data" / "wikitext2" / "wiki.test.first-half.raw"
    session = cpu_session(built.path)
    tokenizer = built.tokenizer_path
    short = evaluate(session, "perplexity", text, tokenizer=tokenizer, window=256, limit=4)
    assert short.value == pytest.approx(37.10, abs=0.01)
    assert short.n == 4 * 255
    long = evaluate(session, "perplexity", text, tokenizer=tokenizer, window=512, limit=16)
    assert long.value == pytest.approx(36.64, abs=0.01)


def test_steps_through_the_cache_give_the_perplexity_of_whole_windows(tmp_path):
    """stories260k with a cache: one token a step, three tokens a step, all at once."""
    root = Path(os.environ.get("ONNXQ_SHARED", Path(__file__).parents[2].parent / "shared"))
    folder = root / "data" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the shared data folder is absent (set ONNXQ_SHARED)")
    path = tmp_path / "m.onnx"
    models.build("stories260k", path, checkpoint=folder, kv_cache=True)
    text = next(folder.glob("*.txt"))
    found = {
        steps: evaluate(
            path, "perplexity", text, tokenizer=tmp_path / "m.tokenizer.json", limit=1, window=40,
            decode=steps,
        ).value
        for steps in (0, 1, 3)
    }  # fmt: skip
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[3] == pytest.approx(found[0], rel=1e-5)
