from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata

import pytest

import onnxq
from onnxq.runtime import diagnosis, doctor
from onnxq.runtime.library import library_problem


def test_report_names_what_is_here() -> None:
    report = doctor()
    assert report.onnxq == onnxq.__version__
    assert report.python == platform.python_version()
    assert report.onnxruntime == {name: metadata.version(name) for name in report.onnxruntime}
    assert "CPUExecutionProvider" in report.providers
    assert set(report.extras) == {"images", "models", "report"}


def test_report_is_json_and_lines() -> None:
    report = doctor()
    parsed = json.loads(json.dumps(report.to_json()))
    assert parsed["healthy"] is report.healthy
    assert parsed["kernels"] == list(report.kernels)
    text = "\n".join(report.lines())
    for expected in (report.onnxq, report.machine, *report.providers, *report.kernels):
        assert expected in text


def test_kernels_are_listed_with_their_level(monkeypatch: pytest.MonkeyPatch) -> None:
    if library_problem() is not None:
        pytest.skip("no kernels here")
    monkeypatch.setenv("ONNXQ_ISA", "scalar")
    report = doctor()
    assert report.isa == "scalar"
    assert report.isa_levels[0] == "scalar"
    assert "DynamicQuantizePerToken 1 CPU float32" in report.kernels
    assert report.kernels_line() == "onnxq: kernels built, running at level scalar"
    monkeypatch.delenv("ONNXQ_ISA")
    assert doctor().isa == report.isa_levels[-1]


def test_levels_agree_with_the_kernel() -> None:
    """The library's cpuid against what Linux reports."""
    report = doctor()
    if not report.isa_levels or report.machine != "x86_64":
        pytest.skip("no x86 kernels here")
    assert ("avx2" in report.isa_levels) == ({"avx2", "fma", "f16c"} <= set(report.cpu_features))
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(report.cpu_features)
    assert ("avx512bw" in report.isa_levels) == wide


def test_impossible_level_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    if library_problem() is not None:
        pytest.skip("no kernels here")
    monkeypatch.setenv("ONNXQ_ISA", "mmx")
    report = doctor()
    assert report.isa is None
    assert any("ONNXQ_ISA=mmx" in problem for problem in report.problems)
    assert report.kernels_line().startswith("onnxq: WITHOUT KERNELS: ONNXQ_ISA=mmx")


def test_missing_library_is_one_loud_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (diagnosis, sys.modules["onnxq.runtime.library"]):
        monkeypatch.setattr(module, "shipped_path", lambda **_: None)
    report = doctor()
    assert report.library is None
    assert any("was not built" in line for line in report.lines() if line.startswith("PROBLEM"))
    assert report.kernels_line().startswith("onnxq: WITHOUT KERNELS: the operator library was not")
    assert "\n" not in report.kernels_line()


def test_module_prints_the_line() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "onnxq.runtime"], capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == doctor().kernels_line()
