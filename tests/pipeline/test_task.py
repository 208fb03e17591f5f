"""A limit on what a task's metric may lose: measured on both files, exit code 3 beyond it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from onnxq.errors import QualityError, SpecError
from onnxq.evaluation import EvalResult, evaluate
from onnxq.pipeline.run import run
from onnxq.pipeline.task import TaskSpec, measure_task


def result(metric: str, value: float) -> EvalResult:
    return EvalResult("t", metric, value, 10)


def test_a_drop_is_in_points_or_in_percent_of_perplexity() -> None:
    assert result("accuracy-percent", 80.0).drop_to(result("accuracy-percent", 79.5)) == 0.5
    assert result("spearman-x100", 80.0).drop_to(result("spearman-x100", 81.0)) == -1.0
    drop = result("perplexity", 10.0).drop_to(result("perplexity", 10.5))
    assert drop == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("sts", None, None, None), "SPEC-TASK"),
        ((None, "dev.csv", None, None), "SPEC-TASK"),
        ((None, None, None, 0.5), "SPEC-TASK"),
        ((None, None, 5, None), "SPEC-TASK"),
        (("sts", "dev.csv", None, -1.0), "SPEC-RANGE"),
        (("sts", "dev.csv", None, float("nan")), "SPEC-RANGE"),
    ],
)
def test_half_a_task_is_refused(arguments: Any, code: str) -> None:
    with pytest.raises(SpecError) as caught:
        TaskSpec.of(*arguments)
    assert caught.value.code == code
    assert TaskSpec.of(None, None, None, None) is None


def test_what_is_missing_of_a_task_is_named() -> None:
    with pytest.raises(SpecError, match=r"--task without --data\n"):
        TaskSpec.of("sts", None, None, None)


@pytest.fixture
def shared() -> Path:
    folder = Path(os.environ.get("ONNXQ_SHARED", Path(__file__).parents[3] / "shared"))
    if not (folder / "models" / "sst2-bert-tiny").is_dir():
        pytest.skip("the shared data folder is absent (set ONNXQ_SHARED)")
    return folder


@pytest.fixture
def sst2(shared: Path) -> dict[str, Any]:
    data = next((shared / "data" / "sst2").glob("dev*"))
    return {"task": "sst2", "task_data": data, "task_limit": 60}


def go(shared: Path, out: Path, passes: str, **options: Any) -> Any:
    model = shared / "models" / "sst2-bert-tiny" / "model.onnx"
    return run(model, passes, out=out, speed_seconds=0, threads=1, **options)


FINE = "canonicalize,assign{mode=weight-only weights=int8},qdq"
RUINED = "canonicalize,assign{mode=weight-only weights=binary embeddings=float},qdq"


def test_a_result_within_the_limit_is_written_with_its_figures(
    shared: Path, sst2: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "q.onnx"
    summary = go(shared, out, FINE, max_drop=5.0, **sst2)
    measured = summary.task
    tokenizer = shared / "models" / "sst2-bert-tiny" / "tokenizer.json"
    again = evaluate(out, "sst2", sst2["task_data"], tokenizer=tokenizer, limit=60)
    assert measured.after == again.value
    assert measured.n == 60
    assert measured.drop == measured.before - measured.after
    assert summary.to_json()["task"]["drop"] == measured.drop


def test_a_result_beyond_the_limit_is_not_written(
    shared: Path, sst2: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "q.onnx"
    with pytest.raises(QualityError) as caught:
        go(shared, out, RUINED, max_drop=5.0, **sst2)
    assert caught.value.code == "QUALITY-DROP"
    assert caught.value.exit_code == 3
    assert caught.value.details["drop"] > 5.0
    assert not out.exists()
    with pytest.raises(QualityError):
        go(shared, out, RUINED, max_drop=5.0, keep_bad=True, **sst2)
    source = shared / "models" / "sst2-bert-tiny" / "model.onnx"
    spec = TaskSpec("sst2", sst2["task_data"], 60, 5.0)
    tokenizer = source.with_name("tokenizer.json")
    assert measure_task(spec, source, out, tokenizer, 1).drop == caught.value.details["drop"]
