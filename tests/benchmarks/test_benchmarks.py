"""The benchmarks run, their rows are complete, and their instruments measure what they say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "benchmarks"
KEYS = {"case", "ours", "peer", "peer_name", "ratio", "unit"}
LINES = ("--json", "--quick")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("_common", monkeypatch)


@pytest.fixture
def shared() -> Path:
    folder = Path(os.environ.get("ONNXQ_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("the shared data folder is absent (set ONNXQ_SHARED)")
    return folder


def rows_of(*command: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, str(FOLDER / command[0]), *LINES, *command[1:]],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        assert set(row) >= KEYS, row
        assert isinstance(row["ours"], float)
        assert math.isfinite(row["ours"])
        assert "ours_error" not in row, row
    return rows


def figure(rows: list[dict[str, object]], case: str, peer: str) -> dict[str, object]:
    (found,) = (r for r in rows if r["case"] == case and r["peer_name"] == peer)
    return found


@pytest.mark.slow
def test_minilm_beats_the_hand_tuned_peer_in_accuracy(shared: Path) -> None:
    rows = rows_of("minilm_w8a8.py", "--threads", "1")
    cosine = figure(rows, "minilm-plain w8a8 cosine", "ort-static-expert")
    assert cosine["ours"] > 0.99
    assert cosine["ratio"] > 1
    size = figure(rows, "minilm-plain w8a8 size", "fp32")
    assert size["ratio"] > 3.8


@pytest.mark.slow
def test_packed_formats_run_on_a_model(shared: Path) -> None:
    rows = rows_of("packed_formats.py")
    assert figure(rows, "packed int8 cosine", "fp32")["ours"] > 0.99
    assert figure(rows, "packed int8 size", "fp32")["ratio"] > 3.8
    assert figure(rows, "packed w4a4-mxfp4 cosine", "fp32")["ours"] > 0.9


@pytest.mark.slow
def test_efficientnet_shrinks(shared: Path) -> None:
    rows = rows_of("efficientnet_w8a8.py", "--threads", "1")
    shrink = figure(rows, "efficientnet-model.onnx w8a8 shrink", "fp32")
    assert 3.7 < shrink["ours"] < 4.0


@pytest.mark.slow
def test_small_models_keep_their_scores(shared: Path) -> None:
    rows = rows_of("small_models.py")
    perplexity = figure(rows, "stories260k w8a8 perplexity", "fp32")
    assert 0.9 < perplexity["ratio"] < 1.1
    accuracy = figure(rows, "sst2-bert-tiny w8a8 dev", "fp32")
    assert abs(accuracy["ours"] - accuracy["peer"]) <= 3


@pytest.mark.slow
def test_calibration_memory_stays_flat(shared: Path) -> None:
    rows = rows_of("calibration_memory.py")
    peaks = [r["ours"] for r in rows if str(r["case"]).endswith(" peak")]
    assert len(peaks) == 2
    assert max(peaks) < 1.1 * min(peaks)


def test_every_benchmark_explains_itself() -> None:
    for path in sorted(FOLDER.glob("[!_]*.py")):
        done = subprocess.run(
            [sys.executable, str(path), "--help"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        assert done.returncode == 0, done.stderr
        assert "--json" in done.stdout
        assert "Claim:" in path.read_text("utf-8").splitlines()[0]


def test_a_job_reports_its_own_memory_and_time(common: ModuleType, tmp_path, monkeypatch) -> None:
    jobs = tmp_path / "jobs.py"
    # 200 MB of pages that are written to, then half a second of work, by the real reporting code.
    jobs.write_text(
        f"import sys, time; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import _jobs\n"
        "def work(options):\n"
        "    block = bytearray(b'x' * 200_000_000)\n"
        "    end = time.process_time() + 0.5\n"
        "    while time.process_time() < end: pass\n"
        "    return {'bytes': len(block)}\n"
        "_jobs.JOBS['work'] = work\n"
        "_jobs.main()\n"
    )
    monkeypatch.setattr(common, "JOBS", jobs)
    ballast = bytearray(b"y" * 600_000_000)  # the parent's memory must not count
    cost = common.run_job("work")
    assert len(ballast) == 600_000_000
    assert cost.error is None
    assert cost.result == {"bytes": 200_000_000}
    assert 200 < cost.peak_mb < 500
    # The job has one thread, so its work and its imports cannot take more than the wall clock saw.
    assert 0.5 <= cost.cpu_s <= 1.05 * cost.wall_s + 0.1


def test_memory_of_children_counts(common: ModuleType, tmp_path, monkeypatch) -> None:
    jobs = tmp_path / "jobs.py"
    jobs.write_text(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c',"
        "\"import time; b = bytearray(b'x' * 150_000_000); time.sleep(0.3)\"])\n"
        "sys.exit('boom')\n"
    )
    monkeypatch.setattr(common, "JOBS", jobs)
    cost = common.run_job("work")
    assert cost.error == "exit code 1: boom"
    assert cost.peak_mb > 150


def test_a_failing_job_is_its_first_line(common: ModuleType) -> None:
    cost = common.run_job("ort_dynamic", model="no-such-file.onnx", out="x.onnx")
    assert cost.error
    assert "no-such-file.onnx" in cost.error
    assert "\n" not in cost.error


def test_a_job_that_hangs_is_stopped(common: ModuleType, tmp_path, monkeypatch) -> None:
    jobs = tmp_path / "jobs.py"
    jobs.write_text("import time; time.sleep(60)\n")
    monkeypatch.setattr(common, "JOBS", jobs)
    monkeypatch.setattr(common, "JOB_SECONDS", 0.5)
    began = time.perf_counter()
    assert common.run_job("work").error == "not done in 0.5 s"
    assert time.perf_counter() - began < 10


def test_interleaving_takes_turns_and_pairs_rounds(common: ModuleType) -> None:
    order = []
    runs = {
        "slow": lambda: (order.append("slow"), time.sleep(0.02)),
        "fast": lambda: (order.append("fast"), time.sleep(0.005)),
    }
    timings = common.interleave(runs, rounds=6, baseline="slow", warm_up=1)
    assert order[:2] == ["slow", "fast"]
    assert order[2:] == ["slow", "fast", "fast", "slow"] * 3
    assert timings["slow"].speedup == 1
    assert 2 < timings["fast"].speedup < 4.5
    assert timings["fast"].cpu_ms < timings["fast"].ms


def test_ratios_above_one_mean_better(common: ModuleType) -> None:
    columns = [
        common.Column("score", "score", "points", "higher"),
        common.Column("ms", "ms", "ms", "lower"),
    ]
    ours = common.Row("a", "a", True, {"score": 80.0, "ms": 5.0})
    peer = common.Row("b", "b", False, {"score": 40.0, "ms": 10.0})
    broken = common.Row("c", "c", False, error="ValueError: no")
    score, ms, *failed = common.compare_rows("x", ours, [peer, broken], columns)
    assert score == {
        "case": "x score", "ours": 80.0, "peer": 40.0, "peer_name": "b", "ratio": 2.0,
        "unit": "points", "better": "higher",
    }  # fmt: skip
    assert ms["ratio"] == 2.0
    assert [(f["peer"], f["ratio"], f["peer_error"]) for f in failed] == [
        (None, None, "ValueError: no")
    ] * 2


def test_markdown_says_what_failed(common: ModuleType) -> None:
    columns = [common.Column("a", "A", "u", "lower"), common.Column("b", "B", "u", "lower")]
    text = common.markdown_table(
        [common.Row("x", "mine", True, {"a": 1.5}), common.Row("y", "theirs", error="Boom: no")],
        columns,
    )
    assert text.splitlines()[2:] == [
        "| **mine** | **1.50** | **-** |",
        "| theirs | failed: `Boom: no` |  |",
    ]


def test_spread_is_even_and_holds_both_ends(common: ModuleType) -> None:
    assert common.spread(range(11), 3) == [0, 5, 10]
    assert common.spread([1, 2], 5) == [1, 2]
    chosen = common.spread(range(500), 64)
    assert len(set(chosen)) == 64
    assert {b - a for a, b in itertools.pairwise(chosen)} == {7, 8}


def test_the_readme_has_the_place_for_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    load("_common", monkeypatch)
    minilm = load("minilm_w8a8", monkeypatch)
    text = (REPOSITORY / "README.md").read_text("utf-8")
    head, _, rest = text.partition(minilm.BEGIN)
    table, _, tail = rest.partition(minilm.END)
    assert head
    assert tail
    configurations = [c.label for c in minilm.CONFIGURATIONS]
    assert all(label in table for label in configurations)
    assert re.search(r"\d{4}-\d\d-\d\d, .*onnxruntime", table)


def test_no_calibration_image_is_evaluated(
    shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load("_common", monkeypatch)
    efficientnet = load("efficientnet_w8a8", monkeypatch)
    efficientnet.split(shared / "data" / "imagenet500", tmp_path, False)
    calibration = {p.name for p in (tmp_path / "calibration").glob("*.jpg")}
    lines = (tmp_path / "evaluation" / "labels.txt").read_text().splitlines()
    evaluation = {line.split("\t")[0] for line in lines}
    assert len(calibration) == 64
    assert len(evaluation) == 436
    assert not calibration & evaluation
    assert {p.name for p in (tmp_path / "evaluation").glob("*.jpg")} == evaluation


def test_the_pipelines_in_the_readme_are_understood() -> None:
    from onnxq import parse

    text = (REPOSITORY / "README.md").read_text("utf-8")
    pipelines = re.findall(r'--passes "([^"]+)"|Pipeline\("([^"]+)"\)', text)
    assert len(pipelines) == 2
    for shell, python in pipelines:
        assert len(parse(shell or python)) > 2


def test_kernels_are_timed_beside_onnxruntime_on_the_same_computation() -> None:
    rows = rows_of("kernels.py")
    cases = {str(row["case"]) for row in rows}
    assert {"w4a8_g32", "hadamard"} <= cases
    for row in rows:
        assert row["ratio"] == pytest.approx(float(row["peer"]) / float(row["ours"]))  # type: ignore[arg-type]


@pytest.mark.slow
def test_whole_models_lose_no_more_than_onnxruntimes_int4(shared: Path) -> None:
    """Both models, each with accuracy, size and speed; our W4A8 rounds as MatMulNBits does."""
    rows = rows_of("end_to_end.py")
    sts = figure(rows, "minilm w4a8 sts_dev", "ort-w4")
    assert abs(float(str(sts["ours"])) - float(str(sts["peer"]))) < 1.0
    text = figure(rows, "stories260k w4a8 perplexity", "ort-w4")
    assert abs(float(str(text["ratio"])) - 1) < 0.05
    cases = {str(row["case"]) for row in rows}
    for name, figures in {
        "minilm": ("sts_dev", "size", "sentence_speedup"),
        "stories260k": ("perplexity", "size", "prefill_speedup", "decode_speedup"),
    }.items():
        for kind in ("w4a8", "w4a8-gptq", "w8a8"):
            assert {f"{name} {kind} {column}" for column in figures} <= cases
