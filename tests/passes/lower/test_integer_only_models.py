"""Real encoders in integers alone: accuracy, the proof, and the same bits in another runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxq
from onnxq.custom_ops.integer_check import check_integer_only
from onnxq.evaluation.run import evaluate
from onnxq.graph.io import load
from tests.passes import helpers as h

NODE_SCRIPT = """
const ort = require("onnxruntime-node");
const fs = require("fs");
const [model, feeds] = process.argv.slice(2);
const fed = {};
for (const [name, t] of Object.entries(JSON.parse(fs.readFileSync(feeds, "utf8")))) {
  fed[name] = new ort.Tensor("int64", BigInt64Array.from(t.data.map(BigInt)), t.shape);
}
ort.InferenceSession.create(model).then((s) => s.run(fed)).then((out) => {
  const [first] = Object.values(out);
  process.stdout.write(JSON.stringify(Array.from(new Uint32Array(first.data.buffer,
    first.data.byteOffset, first.data.length))));
});
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT-tiny for SST-2, through the recipe."""
    folder = tmp_path_factory.mktemp("tiny")
    train = h.shared("data", "sst2", "train.tsv").read_text("utf-8").splitlines()
    texts = folder / "calib.txt"
    texts.write_text("\n".join(line.split("\t")[0] for line in train[1::50][:128]), "utf-8")
    source = h.shared("models", "sst2-bert-tiny")
    out = folder / "tiny.onnx"
    shutil.copy(source / "tokenizer.json", folder / "tokenizer.json")
    onnxq.run(
        source / "model.onnx", "ibert", out=out, calib=str(texts),
        tokenizer=source / "tokenizer.json", threads=1,
    )  # fmt: skip
    return out


def tokens(count: int = 2, length: int = 21) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    mask = np.ones((count, length), np.int64)
    mask[-1, length // 2 :] = 0
    ids = rng.integers(1000, 20_000, size=(count, length))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.mark.slow
def test_sst2_within_half_a_point(tiny: Path) -> None:
    source = h.shared("models", "sst2-bert-tiny")
    data = h.shared("data", "sst2", "dev.tsv")
    scores = [
        evaluate(model, "sst2", data, tokenizer=source / "tokenizer.json").value
        for model in (source / "model.onnx", tiny)
    ]
    assert abs(scores[0] - scores[1]) <= 0.5


@pytest.mark.slow
def test_the_real_model_is_proved(tiny: Path) -> None:
    report = check_integer_only(load(tiny), max_extent=512)
    assert report.dequantize == 1
    assert report.worst is not None
    assert (report.worst.accumulator or 0) < 2**31


@pytest.mark.slow
def test_the_real_model_gives_the_same_bits_everywhere(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = tokens()
    results = [onnxq.session(tiny, library=False).run(None, fed)[0]]
    for threads in (1, 2):
        results.append(onnxq.session(tiny, threads=threads, library=True).run(None, fed)[0])
    for level in ("scalar", "avx2"):
        monkeypatch.setenv("ONNXQ_ISA", level)
        results.append(onnxq.session(tiny, library=True).run(None, fed)[0])
    monkeypatch.delenv("ONNXQ_ISA")
    made = onnxq.session(tiny, library=True)
    rows = [made.run(None, {n: a[i : i + 1] for n, a in fed.items()})[0] for i in range(2)]
    results.append(np.concatenate(rows))
    assert all((result == results[0]).all() for result in results)


def _node_modules() -> Path:
    """Where onnxruntime-node is; ONNXQ_NODE_MODULES names the folder."""
    folder = os.environ.get("ONNXQ_NODE_MODULES", "")
    if (
        shutil.which("node") is None
        or not (Path(folder) / "onnxruntime-node").is_dir()
        or not folder
    ):
        pytest.skip("needs node, and ONNXQ_NODE_MODULES with onnxruntime-node in it")
    return Path(folder)


@pytest.mark.slow
def test_onnxruntime_node_gives_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    modules = _node_modules()
    fed = tokens()
    feeds: dict[str, Any] = {
        name: {"shape": list(a.shape), "data": [int(x) for x in a.reshape(-1)]}
        for name, a in fed.items()
    }
    (tmp_path / "feeds.json").write_text(json.dumps(feeds), "utf-8")
    (tmp_path / "run.js").write_text(NODE_SCRIPT, "utf-8")
    done = subprocess.run(
        ["node", str(tmp_path / "run.js"), str(tiny), str(tmp_path / "feeds.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NODE_PATH": str(modules)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bits = np.array(json.loads(done.stdout), np.uint32)
    (expected,) = onnxq.session(tiny, threads=1, library=True).run(None, fed)
    assert (bits == expected.reshape(-1).view(np.uint32)).all()


@pytest.mark.slow
def test_minilm_keeps_its_score(tmp_path: Path) -> None:
    """STS-B dev Spearman within 0.5 of fp32 after calibration alone, cosine at least 0.98."""
    built = os.environ.get("ONNXQ_MINILM", "")
    if not Path(built).is_file() or not built:
        pytest.skip("ONNXQ_MINILM names no file; make it with `onnxq models build minilm`")
    tokenizer = Path(built).with_suffix(".tokenizer.json")
    texts = tmp_path / "calib.txt"
    train = h.shared("data", "stsb", "sts-train.csv").read_text("utf-8").splitlines()
    texts.write_text("\n".join(line.split("\t")[5] for line in train[::89][:64]), "utf-8")
    out = tmp_path / "minilm.onnx"
    onnxq.run(
        built, "ibert", out=out, calib=str(texts), tokenizer=tokenizer, threads=1, min_cosine=0.98
    )
    data = h.shared("data", "stsb", "sts-dev.csv")
    ours, theirs = (
        evaluate(model, "sts", data, tokenizer=tokenizer).value for model in (out, Path(built))
    )
    assert ours >= theirs - 0.5
