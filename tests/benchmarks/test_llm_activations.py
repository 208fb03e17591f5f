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
        source, tmp_path / "stories.tokenizer.json", text, text, tmp_path, tmp_path, 64, 3, 2, 1
    )
    ours = benchmark.evaluate(setup, source, is_reference=True)
    task = evaluate(source, "perplexity", text, window=64, limit=3, bos="false")
    assert ours["perplexity"] == pytest.approx(task.value, rel=1e-5)
    again = benchmark.evaluate(setup, source, is_reference=False)
    assert again["kl"] == pytest.approx(0, abs=1e-5)
    assert benchmark.make(setup, benchmark.CASES[0])[1]["share"] == 0
    case = benchmark.Case("mine", "", "assign{mode=dynamic}, qdq")
    path, figures = benchmark.make(setup, case)
    assert figures["share"] == 100
    assert figures["seconds"] > 0
    assert benchmark.evaluate(setup, path, is_reference=False)["kl"] > 1e-4
    half = dataclasses.replace(case, passes='assign{mode=dynamic}, partial{layers=["*mlp*"]}, qdq')
    assert 0 < benchmark.make(setup, half)[1]["share"] < 100


def test_a_finished_row_is_read_back_and_transforms_are_made_once(
    benchmark: Any, stories: Path, tmp_path: Path
) -> None:
    source = tmp_path / "stories.onnx"
    models.build("stories260k", source, checkpoint=stories)
    text = next(stories.glob("*.txt"))
    setup = benchmark.Setup(
        source, tmp_path / "stories.tokenizer.json", text, text, tmp_path, tmp_path, 64, 2, 2, 1
    )
    cases = [benchmark.CASES[0], benchmark.Case("mine", "", "assign{mode=dynamic}, qdq", "quarot")]
    first = [row.figures for row in benchmark.measure(setup, cases)]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.onnx")}
    again = [row.figures for row in benchmark.measure(setup, cases)]
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.onnx")} == stamps


def test_every_row_is_a_pipeline_that_validates(benchmark: Any) -> None:
    from onnxq.pipeline.grammar import parse
    from onnxq.pipeline.validate import validate

    names = [case.name for case in benchmark.CASES]
    assert len(names) == len(set(names))
    for case in benchmark.CASES:
        if not case.peer:
            validate(parse(f"{case.before}, {case.passes}"))


def test_an_unknown_case_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "llm_activations.py"), "--cases", "nonesuch"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 1
    assert "no case nonesuch; there are: static, token" in done.stderr


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


@pytest.mark.slow
def test_seeds_and_speed_print_their_summaries(stories: Path) -> None:
    for options, wanted in (
        (["--seeds", "2"], "int4 activations, 2 random seeds: mean"),
        (["--speed"], "smooth-rotate: "),
    ):
        done = subprocess.run(
            [sys.executable, str(FOLDER / "llm_activations.py"), "--quick", *options],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert wanted in done.stdout
