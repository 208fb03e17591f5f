"""The benchmark of the CUDA kernels, as far as it runs without a device: plan, goals, operands."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from onnxq.custom_ops.defs import quant_mat_mul
from onnxq.runtime.cuda import device_problem

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "benchmarks"


@pytest.fixture
def goals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("_cuda_goals")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("cuda")


def row(case: str, m: int, peer: str, ratio: float, **more: Any) -> dict[str, Any]:
    return {"case": case, "M": m, "K": 4096, "N": 8192, "peer_name": peer, "ratio": ratio,
            "gbps": 4000.0, "stored": 17e6, **more}  # fmt: skip


def test_every_goal_of_the_page_is_judged(goals: ModuleType) -> None:
    """A row for each, and the worst of several counts."""
    rows = [
        row("int4_g128", 1, goals.CUBLAS, 3.0, gbps=3200.0),
        row("int4_g128", 8, goals.CUBLAS, 2.6, gbps=3100.0),
        row("int4_g128", 8, goals.CUBLAS, 2.7, gbps=10.0, stored=1e6),  # too small to count
        row("fp8", 4, goals.CUBLAS, 0.1, gbps=4000.0),
        row("fp8", 8, goals.ORT_FP8, 0.96),
        row("int4_g32", 64, goals.CUBLAS, 1.4),
        row("int4_g32", 16, goals.ORT_NBITS, 1.3),
        row("fp8 x fp8", 256, goals.FP8_ALONE, 0.97),
        row("fp8 rows x fp8", 256, goals.FP8_ALONE, 0.6),
        row("fp8 rows x fp8", 1024, goals.ORT_FP8, 1.5),
        row("fp8 128-block", 512, goals.FP8_ALONE, 0.1),  # the goal begins at 1024
        row("fp8 128-block", 1024, goals.FP8_ALONE, 0.85),
        row("fp8 128-block", 1024, goals.BF16, 1.1),
        row("fp8 rows x fp8 128-block", 1024, goals.BF16, 1.05),
        row("mxfp4_g32", 64, "our int4_g32", 0.95),
        row("hadamard+int8", 4096, goals.COPY, 0.8),
    ]
    worst = [goal.worst(rows) for goal in goals.GOALS]
    figures = [None if found is None else round(found[0], 3) for found in worst]
    assert figures == [0.646, 0.96, 2.6, 1.4, 1.3, 0.97, 0.6, 1.5, 0.85, 1.1, 1.05, 0.95, 0.8]
    text = goals.table(rows, "a device")
    assert text.count("(met)") == 10
    assert text.count("(missed)") == 3
    assert "not yet" not in text
    assert goals.table([], "none").count("not yet") == len(goals.GOALS)


def test_the_table_goes_between_its_markers(goals: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "cuda.md"
    page.write_text(f"before\n{goals.BEGIN}old\n{goals.END}after\n", encoding="utf-8")
    goals.write_table(page, "new \\1\n")
    assert page.read_text(encoding="utf-8") == (f"before\n{goals.BEGIN}new \\1\n{goals.END}after\n")
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="no place for the table"):
        goals.write_table(page, "new")


def test_the_page_holds_the_table_of_these_goals(goals: ModuleType) -> None:
    """And is the unmeasured one until a device was there."""
    page = (REPOSITORY / "docs" / "cuda.md").read_text(encoding="utf-8")
    inside = page.partition(goals.BEGIN)[2].partition(goals.END)[0]
    for goal in goals.GOALS:
        assert f"| {goal.text} | >= {goal.bound:.2f} |" in inside
    if "not yet" in inside:
        assert inside == goals.table([], "nothing yet")
        assert "Nothing here has run on a GPU yet" in page


def test_weights_rotate_over_three_caches(bench: ModuleType) -> None:
    peers = sys.modules["_cuda_peers"]
    for size in (1 << 10, 9 << 20, 64 << 20, 1 << 30):
        count = peers.copies_beyond(50 << 20, size)
        assert count == 256 or count * size > 3 * (50 << 20)
    assert bench.many_rows(quick=False)[0] == 256


def test_weights_of_the_benchmark_are_what_they_are_called(bench: ModuleType) -> None:
    rng = np.random.default_rng(1)
    for kind in (*bench.KINDS, "int8"):
        packed = bench.weight_of(kind, 256, 64, rng)
        name, _, group = kind.partition("_g")
        assert packed.attributes["group"] == int(group or 256)
        assert packed.attributes["bits"] == (4 if "4" in name else 8)
        level, scale = quant_mat_mul.weight_parts(
            *(packed.inputs[key] for key in ("codes", "scales", "zero_points", "levels")),
            256, 64, int(packed.attributes["group"]), packed.attributes["exponent_scales"],
        )  # fmt: skip
        assert np.isfinite(level).all()
        assert (scale > 0).all()


def test_plan_and_absence_are_said(tmp_path: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )

    planned = run("benchmarks/cuda.py", "--plan").stdout
    for word in ("goal: ", "K 4096 N 11008", "mxfp4_g32", "M 256, 1024, 4096", "Hadamard"):
        assert word in planned
    if device_problem() is None:
        pytest.skip("there is a GPU here")
    results = tmp_path / "results.json"
    for script in ("cuda.py", "cuda_decoder.py"):
        more = ("--results", str(results)) if script == "cuda.py" else ()
        done = run(f"benchmarks/{script}", "--quick", *more)
        assert "measures nothing here" in done.stderr
        assert not results.exists()


@pytest.mark.slow
def test_the_decoder_s_script_runs_on_the_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/cuda_decoder.py", "--quick", "--cpu", "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    cases = [line.split('"')[3] for line in done.stdout.splitlines()]
    assert cases == [f"{name} {what}" for name in ("w4a16", "w4a16-ort", "w8a8", "fp8")
                     for what in ("prefill", "decode")]  # fmt: skip
