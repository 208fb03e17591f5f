from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration.data import CalibrationData, open_data
from onnxq.errors import DataError, SpecError, UnsupportedError

TWO = """
<ir_version: 8, opset_import: ["" : 18]>
two (int64[N, S] ids, float[N, S, 4] x) => (float[N, S, 4] y) { y = Neg (x) }
"""
ONE = """
<ir_version: 8, opset_import: ["" : 18]>
one (float[N, 3] x) => (float[N, 3] y) { y = Neg (x) }
"""
TEXT = """
<ir_version: 8, opset_import: ["" : 18]>
text (int64[N, S] input_ids, int64[N, S] attention_mask) => (int64[N, S] y)
{ y = Mul (input_ids, attention_mask) }
"""
PICTURE = """
<ir_version: 8, opset_import: ["" : 18]>
picture (float[N, 3, 8, 8] image) => (float[N, 3, 8, 8] y) { y = Neg (image) }
"""


def model(text: str) -> ir.Model:
    return ir.from_onnx_text(text)


def feeds(k: int, length: int = 3) -> dict[str, np.ndarray]:
    ids = np.arange(length, dtype=np.int64)[None] + k
    return {"ids": ids, "x": np.full((1, length, 4), k, np.float32)}


def numbers(data: CalibrationData) -> list[int]:
    return [int(sample["ids"][0, 0]) for sample in data]


def refused(code: str, spec: Any, text: str = TWO, **options: Any) -> DataError:
    """Open and read everything; the error must carry ``code``, a cause and a hint."""
    with pytest.raises(DataError) as caught:
        list(open_data(spec, model(text), **options))
    assert caught.value.code == code, caught.value
    assert caught.value.cause
    assert caught.value.hint
    return caught.value


# Sources


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_a_leading_sample_axis(tmp_path: Path, save: Callable[..., None]) -> None:
    stacked = {n: np.stack([feeds(k)[n] for k in range(5)]) for n in ("ids", "x")}
    save(tmp_path / "d.npz", **stacked)
    data = open_data(tmp_path / "d.npz", model(TWO))
    assert len(data) == 5
    for _ in range(2):  # re-iterable
        for k, sample in enumerate(data):
            assert list(sample) == ["ids", "x"]
            for name in sample:
                np.testing.assert_array_equal(sample[name], feeds(k)[name])


def test_npz_with_samples_along_the_batch_axis(tmp_path: Path) -> None:
    joined = {n: np.concatenate([feeds(k)[n] for k in range(4)]) for n in ("ids", "x")}
    np.savez(tmp_path / "d.npz", **joined)
    assert numbers(open_data(str(tmp_path / "d.npz"), model(TWO))) == [0, 1, 2, 3]


def test_npz_of_one_sample_and_of_fortran_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", **feeds(7))
    assert numbers(open_data(tmp_path / "one.npz", model(TWO))) == [7]
    x = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))
    np.savez(tmp_path / "f.npz", x=x)
    found = np.concatenate([s["x"] for s in open_data(tmp_path / "f.npz", model(ONE))])
    np.testing.assert_array_equal(found, x)


def test_a_scalar_is_shared_by_all_samples(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N, 2] x, int64 rate) => (float[N, 2] y) { y = Neg (x) }"""
    np.savez(tmp_path / "d.npz", x=np.ones((3, 1, 2), np.float32), rate=np.int64(16000))
    samples = list(open_data(tmp_path / "d.npz", model(text)))
    assert [int(s["rate"]) for s in samples] == [16000] * 3


def test_folder_of_npz(tmp_path: Path) -> None:
    for k in range(3):
        np.savez(tmp_path / f"s{k}.npz", **feeds(k, length=2 + k))
    assert numbers(open_data(tmp_path, model(TWO))) == [0, 1, 2]


def test_folder_of_npy_by_input_name(tmp_path: Path) -> None:
    for name in ("ids", "x"):
        np.save(tmp_path / f"{name}.npy", np.stack([feeds(k)[name] for k in range(3)]))
    assert numbers(open_data(tmp_path, model(TWO))) == [0, 1, 2]


def test_folder_of_npy_samples_for_one_input(tmp_path: Path) -> None:
    for k in range(3):
        np.save(tmp_path / f"s{k}.npy", np.full((1, 3), k, np.float32))
    data = open_data(tmp_path, model(ONE))
    assert [float(s["x"][0, 0]) for s in data] == [0, 1, 2]
    single = open_data(tmp_path / "s1.npy", model(ONE))
    assert [float(s["x"][0, 0]) for s in single] == [1]


def test_jsonl(tmp_path: Path) -> None:
    lines = [{n: v.tolist() for n, v in feeds(k).items()} for k in range(3)]
    lines[1] = {"ids": lines[1]["ids"][0], "x": [[1] * 4] * 3}  # no batch axis, integers for x
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    data = open_data(path, model(TWO))
    assert numbers(data) == [0, 1, 2]
    second = list(data)[1]
    assert second["x"].dtype == np.float32
    assert second["x"].shape == (1, 3, 4)
    assert any("leading axis" in note for note in data.notes)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Words to their place in a list."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "a", "plane", "is", "taking", "off"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def ids(data: CalibrationData) -> list[list[int]]:
    return [sample["input_ids"][0].tolist() for sample in data]


def test_text_file(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("a plane\n\n  \nis taking off\n")
    data = open_data(tmp_path / "t.txt", model(TEXT), tokenizer=tokenizer)
    assert ids(data) == [[2, 3], [4, 5, 6]]
    data = open_data(tmp_path / "t.txt", model(TEXT), tokenizer=tokenizer, max_length=2, pad=4)
    assert ids(data) == [[2, 3, 0, 0], [4, 5, 0, 0]]
    assert next(iter(data))["attention_mask"].tolist() == [[1, 1, 0, 0]]


def test_texts_are_padded_to_a_fixed_length_of_the_model(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("a plane\n")
    data = open_data(tmp_path / "t.txt", model(TEXT.replace("N, S", "1, 5")), tokenizer=tokenizer)
    assert ids(data) == [[2, 3, 0, 0, 0]]
    assert any("5 tokens" in note for note in data.notes)


def test_a_tokenizer_or_images_that_nothing_uses_are_refused(
    tmp_path: Path, tokenizer: Path
) -> None:
    ones = np.ones((1, 3), np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ones, attention_mask=ones)
    for spec in (tmp_path / "x.npz", "random", [{"input_ids": ones, "attention_mask": ones}]):
        refused("CALIB-IDLE-OPTION", spec, TEXT, tokenizer=tokenizer)
        refused("CALIB-IDLE-OPTION", spec, TEXT, images="resize=8")
        open_data(spec, model(TEXT))
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    refused("CALIB-IDLE-OPTION", tmp_path / "t.txt", TEXT, tokenizer=tokenizer, images="resize=8")


def test_columns_of_csv(tmp_path: Path, tokenizer: Path) -> None:
    plain, tabs = tmp_path / "c.csv", tmp_path / "t.csv"
    plain.write_text('label,sentence\n1,"a plane, is"\n0,off\n')
    tabs.write_text('x\t1\ta plane is "taking\tis taking off\nx\t2\toff a plane\ta plane is\n')
    assert ids(open_data(plain, model(TEXT), tokenizer=tokenizer)) == [[2, 3, 1, 4], [6]]
    assert ids(open_data(f"{plain}#sentence", model(TEXT), tokenizer=tokenizer))[1] == [6]
    assert ids(open_data(f"{tabs}#3", model(TEXT), tokenizer=tokenizer))[0] == [4, 5, 6]
    guessed = open_data(tabs, model(TEXT), tokenizer=tokenizer)
    assert ids(guessed)[1] == [6, 2, 3]
    assert any("column 2" in note for note in guessed.notes)
    for spec in (f"{plain}#other", f"{tabs}#9"):
        refused("CALIB-COLUMN", spec, TEXT, tokenizer=tokenizer)
    plain.write_text("1,2\n3,4\n")
    refused("CALIB-COLUMN", plain, TEXT, tokenizer=tokenizer)


def test_jsonl_of_texts(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a plane"}\n')
    assert ids(open_data(path, model(TEXT), tokenizer=tokenizer)) == [[2, 3]]
    refused("CALIB-TOKENIZER", path, TEXT)


def test_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for k in range(3):
        image.new("RGB", (10, 12), (k, 10, 20)).save(tmp_path / f"{k}.png")
    (tmp_path / "labels.txt").write_text("not an image")
    data = open_data(tmp_path, model(PICTURE), images="resize=8,crop=8,mean=0,std=2,layout=nchw")
    assert len(data) == 3
    assert [float(s["image"][0, 0, 0, 0]) for s in data] == [0, 0.5, 1]
    refused("CALIB-IMAGES", tmp_path, PICTURE)
    refused("CALIB-IMAGES", tmp_path, TWO, images="crop=8")
    with pytest.raises(SpecError):
        open_data(tmp_path, model(PICTURE), images="sharpen=1")


def test_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_samples.py").write_text(
        "import numpy as np\n"
        "def some():\n"
        "    for k in range(3):\n"
        "        yield {'x': np.full((1, 3), k, np.float32)}\n"
        "def broken():\n"
        "    raise RuntimeError('no such camera')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    data = open_data("my_samples:some", model(ONE))
    assert [float(s["x"][0, 0]) for s in data] == [0, 1, 2]
    assert str(tmp_path) not in sys.path
    assert "no such camera" in refused("CALIB-FUNCTION", "my_samples:broken", ONE).cause
    refused("CALIB-FUNCTION", "my_samples:number", ONE)
    refused("CALIB-FUNCTION", "my_samples:missing", ONE)
    refused("CALIB-FUNCTION", "no_module_of_this_name:f", ONE)


def test_python_sources() -> None:
    listed = [feeds(k) for k in range(3)]
    calls = []

    def function() -> Iterator[dict[str, np.ndarray]]:
        calls.append(1)
        yield from listed

    for spec in (listed, tuple(listed), iter(listed), function):
        data = open_data(spec, model(TWO))
        assert len(data) == 3
        assert numbers(data) == numbers(data) == [0, 1, 2]
    assert len(calls) > 2
    assert len(open_data(feeds(1), model(TWO))) == 1  # a single sample


def test_random_is_loud_valid_and_seeded() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
       int64[batch, sequence] position_ids, float[batch, 2, past, 4] past_key, bool[batch] flag)
        => (float[batch, sequence, 2] y)
        <float[5, 2] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}>
    { y = Gather (table, input_ids) }"""
    made = model(text)
    made.graph.inputs[1].shape = ir.Shape(["batch", "past + sequence"])
    data = open_data("random", made, samples=30)
    assert data.is_random
    assert any("RANDOM" in note for note in data.notes)
    assert len(data) == 30
    samples = list(data)
    assert {s["input_ids"].shape for s in samples} == {(1, 32)}
    assert max(s["input_ids"].max() for s in samples) == 4
    assert min(s["input_ids"].min() for s in samples) == 0
    assert all((s["attention_mask"] == 1).all() for s in samples)
    np.testing.assert_array_equal(samples[0]["position_ids"][0], np.arange(32))
    assert samples[0]["past_key"].shape == (1, 2, 0, 4)
    assert samples[0]["attention_mask"].shape == (1, 32)
    assert data.digest() == open_data("random", made, samples=30).digest()
    assert data.digest() != open_data("random", made, samples=30, seed=1).digest()
    assert not open_data([feeds(0)], model(TWO)).is_random


def test_no_random_strings() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (string[N] s) => (string[N] y) { y = Identity (s) }"""
    with pytest.raises(UnsupportedError) as caught:
        open_data("random", model(text))
    assert caught.value.code == "CALIB-RANDOM"
    given = list(open_data([{"s": ["a", "b"]}], model(text)))
    assert given[0]["s"].tolist() == ["a", "b"]


# Parts of the data


def test_samples_are_spread_over_the_source() -> None:
    data = open_data([feeds(k) for k in range(10)], model(TWO), samples=4)
    assert numbers(data) == [0, 2, 5, 7]
    assert numbers(data.take(2)) == [0, 2]
    assert len(open_data([feeds(0)], model(TWO), samples=9)) == 1


@pytest.mark.parametrize(("total", "holdout"), [(64, 8), (10, 3), (5, 4), (7, 1), (3, 0)])
def test_holdout_is_spread_and_apart(total: int, holdout: int) -> None:
    data = open_data([feeds(k) for k in range(total)], model(TWO))
    calib, held = (numbers(part) for part in data.split(holdout))
    assert len(held) == holdout
    assert sorted(calib + held) == list(range(total))
    if holdout > 1:
        gaps = np.diff(held)
        assert gaps.max() - gaps.min() <= 1
    assert numbers(data.split(holdout)[1]) == held


@pytest.mark.parametrize("holdout", [1, 2, -1])
def test_too_few_samples_to_hold_any_back(holdout: int) -> None:
    data = open_data([feeds(0)], model(TWO))
    with pytest.raises(DataError) as caught:
        data.split(holdout)
    assert caught.value.code == "CALIB-TOO-FEW"


def test_batches_join_samples() -> None:
    data = open_data([feeds(k) for k in range(5)], model(TWO), batch=2)
    shapes = [s["ids"].shape for s in data]
    assert len(data) == 3
    assert shapes == [(2, 3), (2, 3), (1, 3)]
    refused("CALIB-BATCH", [feeds(0, 2), feeds(1, 3)], batch=2)


def test_digest_is_of_the_content() -> None:
    one = open_data([feeds(k) for k in range(3)], model(TWO)).digest()
    assert one == open_data(iter([feeds(k) for k in range(3)]), model(TWO)).digest()
    assert len(one) == 64
    changed = [feeds(k) for k in range(3)]
    changed[1]["x"][0, 0, 0] += 1
    assert one != open_data(changed, model(TWO)).digest()
    assert one != open_data([feeds(k) for k in range(2)], model(TWO)).digest()


# What does not fit


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda f: f.pop("x"), "CALIB-INPUT-MISSING", ["sample 1", "x"]),
        (lambda f: f.update(idz=f["ids"]), "CALIB-INPUT-UNKNOWN", ["idz"]),
        (lambda f: f.update(x=f["x"][..., 0]), "CALIB-RANK", ["sample 1", "`x`"]),
        (lambda f: f.update(x=f["x"][..., :3]), "CALIB-SHAPE", ["sample 1", "`x`", "3", "4"]),
        (lambda f: f.update(x=f["x"][:, :2]), "CALIB-SYMBOL", ["`S`", "ids", "x"]),
        (lambda f: f.update(ids=f["ids"] + 0.5), "CALIB-DTYPE", ["`ids`", "float64", "int64"]),
        (lambda f: f.update(x=f["ids"][..., None].repeat(4, 2)), "CALIB-DTYPE", ["float32"]),
        (lambda f: f.update(x=f["x"] * np.nan), "CALIB-NAN", ["`x`", "12"]),
        (lambda f: f.update(ids=[[1, 2], [3]]), "CALIB-RAGGED", ["`ids`"]),
        (lambda f: f.update(ids=[["one", "two"]]), "CALIB-DTYPE", ["`ids`"]),
    ],
)
def test_bad_samples_are_named(
    change: Callable[[dict[str, Any]], Any], code: str, words: list[str]
) -> None:
    samples: list[dict[str, Any]] = [feeds(k) for k in range(3)]
    change(samples[1])
    error = refused(code, samples)
    for word in words:
        assert word in error.cause


def test_a_misspelt_input_gets_a_suggestion() -> None:
    assert "did you mean `ids`" in refused("CALIB-INPUT-UNKNOWN", [{"idz": 1}]).hint


def test_lossless_casts_are_made_and_stated() -> None:
    sample = {"ids": feeds(3)["ids"].astype(np.int32), "x": feeds(3)["x"].astype(np.float64)}
    data = open_data([sample], model(TWO))
    found = next(iter(data))
    assert (found["ids"].dtype, found["x"].dtype) == (np.int64, np.float32)
    assert any("int32 cast to int64" in note for note in data.notes)
    assert any("float64 cast to float32" in note for note in data.notes)


def test_integers_that_do_not_fit_are_refused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (int32[N] i, bool[N] b) => (int32[N] y) { y = Neg (i) }"""
    ok = {"i": np.array([5]), "b": np.array([1])}
    assert next(iter(open_data([ok], model(text))))["b"].tolist() == [True]
    refused("CALIB-DTYPE", [{**ok, "i": np.array([2**40])}], text)
    refused("CALIB-DTYPE", [{**ok, "b": np.array([2])}], text)


def test_infinity_in_an_additive_mask_is_fine() -> None:
    x = np.full((1, 3), -np.inf, np.float32)
    assert len(open_data([{"x": x}], model(ONE))) == 1


@pytest.mark.parametrize("spec", ["nowhere.npz", "no/folder", "nothing"])
def test_missing_sources(spec: str) -> None:
    assert spec in refused("CALIB-NOT-FOUND", spec).cause


@pytest.mark.parametrize(
    "spec",
    [[], iter([]), list],
    ids=["list", "iterator", "callable"],
)
def test_empty_python_sources(spec: Any) -> None:
    refused("CALIB-EMPTY", spec)


def test_empty_files_and_folders(tmp_path: Path, tokenizer: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("CALIB-EMPTY", empty)
    (tmp_path / "e.jsonl").write_text("\n")
    refused("CALIB-EMPTY", tmp_path / "e.jsonl")
    (tmp_path / "e.txt").write_text("\n")
    refused("CALIB-EMPTY", tmp_path / "e.txt", TEXT, tokenizer=tokenizer)
    (tmp_path / "e.csv").write_text("")
    refused("CALIB-EMPTY", tmp_path / "e.csv", TEXT, tokenizer=tokenizer)
    np.savez(tmp_path / "e.npz")
    refused("CALIB-EMPTY", tmp_path / "e.npz")
    np.savez(tmp_path / "zero.npz", x=np.zeros((0, 1, 3), np.float32))
    refused("CALIB-EMPTY", tmp_path / "zero.npz", ONE)
    refused("CALIB-EMPTY", [feeds(0)], samples=0)


def test_unreadable_files(tmp_path: Path, tokenizer: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (tmp_path / "text.npz").write_text("not a zip")
    refused("CALIB-READ", tmp_path / "text.npz")
    np.savez(tmp_path / "whole.npz", **feeds(0))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-30])
    refused("CALIB-READ", tmp_path / "cut.npz")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    refused("CALIB-READ", tmp_path / "cut.npy", ONE)
    np.save(bad / "x.npy", np.zeros((4, 3), np.float32))
    (bad / "x.npy").write_bytes((bad / "x.npy").read_bytes()[:-8])
    refused("CALIB-READ", bad, ONE)
    np.save(bad / "x.npy", np.array([{}]), allow_pickle=True)
    assert "unpickled" in refused("CALIB-READ", bad, ONE).cause
    for line in ("{", "[1]", '"text"'):
        (tmp_path / "d.jsonl").write_text(line + "\n")
        refused("CALIB-READ", tmp_path / "d.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused("CALIB-READ", tmp_path / "latin.txt", TEXT, tokenizer=tokenizer)


def test_sources_that_do_not_suit_the_model(tmp_path: Path, tokenizer: Path) -> None:
    np.savez(tmp_path / "d.npz", y=np.zeros(3))
    refused("CALIB-INPUT-UNKNOWN", tmp_path / "d.npz")
    np.savez(tmp_path / "n.npz", ids=feeds(0)["ids"])
    refused("CALIB-INPUT-MISSING", tmp_path / "n.npz")
    stacked = {n: np.stack([v, v]) for n, v in feeds(0).items()}
    np.savez(tmp_path / "u.npz", ids=stacked["ids"][:1], x=stacked["x"])
    refused("CALIB-SAMPLES", tmp_path / "u.npz")
    folder = tmp_path / "npy"
    folder.mkdir()
    np.save(folder / "sample0.npy", np.zeros(3))
    refused("CALIB-INPUT-UNKNOWN", folder)
    (tmp_path / "t.txt").write_text("a plane\n")
    refused("CALIB-TOKENIZER", tmp_path / "t.txt", TEXT)
    refused("DATA-INPUT-UNKNOWN", tmp_path / "t.txt", TWO, tokenizer=tokenizer)
    refused("DATA-TOKENIZER", tmp_path / "t.txt", TEXT, tokenizer=tmp_path / "no.json")
    refused("CALIB-COLUMN", f"{tmp_path / 't.txt'}#1", TEXT, tokenizer=tokenizer)
    (tmp_path / "d.parquet").write_text("x")
    refused("CALIB-KIND", tmp_path / "d.parquet")
    refused("CALIB-KIND", 3)
    refused("CALIB-SAMPLE", [[1, 2, 3]])


def test_a_function_that_gives_fewer_samples_later() -> None:
    left = [3, 3, 1]

    def function() -> list[dict[str, np.ndarray]]:
        return [feeds(k) for k in range(left.pop(0))]

    data = open_data(function, model(TWO))
    with pytest.raises(DataError) as caught:
        list(data)
    assert caught.value.code == "CALIB-FUNCTION"


def test_an_input_that_is_no_tensor() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (seq(float[N]) s, int64 i) => (float[N] y) { y = SequenceAt (s, i) }"""
    with pytest.raises(UnsupportedError) as caught:
        open_data([{}], model(text))
    assert caught.value.code == "CALIB-INPUT-TYPE"


def test_inputs_with_defaults_may_be_left_out() -> None:
    made = model(
        '<ir_version: 8, opset_import: ["" : 18]>'
        "g (float[N] x, float[1] bias) => (float[N] y) <float[1] bias = {2}> { y = Add (x, bias) }"
    )
    assert list(next(iter(open_data([{"x": np.ones(2, np.float32)}], made)))) == ["x"]


@pytest.mark.slow
def test_sentences_of_stsb_on_a_real_model(shared: Path) -> None:
    bert = ir.load(shared / "models" / "sst2-bert-tiny" / "model.onnx")
    data = open_data(
        shared / "data" / "stsb" / "sts-train.csv",
        bert,
        tokenizer=shared / "models" / "sst2-bert-tiny" / "tokenizer.json",
        samples=64,
    )
    assert len(data) == 64
    assert all(sample["input_ids"].shape[0] == 1 for sample in data)
    assert any("column 5" in note for note in data.notes)
