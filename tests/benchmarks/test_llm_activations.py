"""The decoder benchmark: its perplexity is that of `onnxq eval`, and its rows are complete."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onnxq import models
from onnxq.evaluation import evaluate

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "benchmarks"


@pytest.fixture
def stories() -> Path:
    folder = Path(os.environ.get("ONNXQ_SHARED", REPOSITORY.parent / "shared"))
    path = folder / "data" / "stories260k"
    if not path.is_dir():
        pytest.skip("the shared data folder is absent (set ONNXQ_SHARED)")
    return path


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import importlib

    return importlib.import_module("llm_activations")


def test_perplexity_is_that_of_the_evaluation(
    benchmark: Any, stories: Path, tmp_path: Path
) -> None:
    source = tmp_path / "stories.onnx"
    models.build("stories260k", source, checkpoint=stories)
    text = next(stories.glob("*.txt"))
    setup = benchmark.Setup(
        source, tmp_path / "stories.tokenizer.json", text, text, tmp_path, 64, 3, 2, 1
    )
    ours = benchmark.evaluate(setup, source, is_reference=True)
    task = evaluate(source, "perplexity", text, window=64, limit=3, bos="false")
    assert ours["perplexity"] == pytest.approx(task.value, rel=1e-5)
    again = benchmark.evaluate(setup, source, is_reference=False)
    assert again["kl"] == pytest.approx(0, abs=1e-5)
    assert benchmark.share_of_integers(setup, source) == 0
    case = dataclasses.replace(benchmark.CASES[2], passes="canonicalize, assign{mode=dynamic}, qdq")
    path = benchmark.make(setup, case)
    assert benchmark.share_of_integers(setup, path) == 100
    assert benchmark.evaluate(setup, path, is_reference=False)["kl"] > 1e-4


def test_an_unknown_case_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "llm_activations.py"), "--cases", "nonesuch"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 1
    assert "no case nonesuch; there are: fp32" in done.stderr


@pytest.mark.slow
def test_quick_prints_complete_rows(stories: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "llm_activations.py"), "--quick", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["case"] for row in rows} >= {"naive perplexity", "best perplexity", "best share"}
    for row in rows:
        assert {"case", "ours", "peer", "peer_name", "ratio", "unit"} <= set(row)
