"""Sentence similarity: pooling and ranks against scipy, and MiniLM's figures."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from onnxq import models
from onnxq.data.text import load_tokenizer
from onnxq.errors import DataError
from onnxq.evaluation import cpu_session, embed, evaluate

PAIRS = [(5.0, "a b", "a b c"), (1.5, "c d d", "a"), (3.0, "b", "c b"), (0.5, "d", "a a b c")]


@pytest.fixture
def table():
    return np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)


@pytest.fixture
def model(save_model, table):
    """Token vectors that padding must not enter: the pad row of the table is not zero."""
    return save_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (int64[n, s] input_ids, int64[n, s] attention_mask)
            => (float[n, s, 8] last_hidden_state) {
            last_hidden_state = Gather(table, input_ids)
        }""",
        table=table,
    )


def write(path, pairs):
    lines = [f"g\tf\ty\t{i}\t{s:.3f}\t{a}\t{b}" for i, (s, a, b) in enumerate(pairs)]
    lines[0] += "\tsource\tother"  # some lines of the benchmark have nine columns
    path.write_text("\n".join(lines) + "\n")
    return path


def pooled(table, text):
    ids = [1, *("_sabcd".index(w) for w in text.split())]
    vector = table[ids].astype(np.float64).mean(axis=0)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("options", [{}, {"batch": 1}, {"pad_to": 9}])
def test_the_score_is_spearmans_of_mean_pooled_cosines(model, table, tokenizer, tmp_path, options):
    got = evaluate(model, "sts", write(tmp_path / "p.csv", PAIRS), tokenizer=tokenizer, **options)
    cosines = [float(pooled(table, a) @ pooled(table, b)) for _, a, b in PAIRS]
    gold = [score for score, _, _ in PAIRS]
    assert got.value == pytest.approx(100 * stats.spearmanr(cosines, gold).statistic)
    assert got.details["pearson-x100"] == pytest.approx(
        100 * stats.pearsonr(cosines, gold).statistic, abs=1e-3
    )
    assert got.n == 4
    assert got.to_json()["metric"] == "spearman-x100"


def test_embeddings_come_in_the_order_of_the_texts(model, table, tokenizer):
    texts = ["a b c d", "d", "b c"]
    got = embed(cpu_session(model), texts, load_tokenizer(tokenizer), batch=2)
    np.testing.assert_allclose(got, [pooled(table, text) for text in texts], atol=1e-6)
    with pytest.raises(DataError, match="no texts"):
        embed(cpu_session(model), [], load_tokenizer(tokenizer))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "DATA-EMPTY"),
        ("a\tb\n", "DATA-COLUMNS"),
        ("g\tf\ty\t0\tmuch\ta\tb\n", "DATA-COLUMNS"),
        ("g\tf\ty\t0\t1.0\ta\tb\n", "DATA-TOO-FEW"),
        (None, "DATA-FILE"),
    ],
)
def test_data_that_does_not_fit_is_an_error_with_a_code(model, tokenizer, tmp_path, content, code):
    path = tmp_path / "p.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        evaluate(model, "sts", path, tokenizer=tokenizer)
    assert caught.value.code == code


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_model_that_says_the_same_of_everything_is_an_error(
    save_model, tokenizer, tmp_path, value
):
    path = save_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (int64[n, s] input_ids) => (float[n, s, 8] last_hidden_state) {
            last_hidden_state = Gather(table, input_ids)
        }""",
        table=np.full((6, 8), value, np.float32),
    )
    with pytest.raises(DataError) as caught:
        evaluate(path, "sts", write(tmp_path / "p.csv", PAIRS), tokenizer=tokenizer)
    assert caught.value.code == "DATA-NOT-FINITE"


@pytest.mark.slow
def test_minilm_has_the_recorded_spearman(shared, tmp_path):
    built = models.build("minilm", tmp_path / "m.onnx")
    got = evaluate(built.path, built.eval_task, shared / "data" / "stsb" / "sts-dev.csv")
    assert got.n == 1500
    assert got.value == pytest.approx(86.72, abs=0.005)
