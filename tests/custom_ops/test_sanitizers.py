"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random inputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onnxq.runtime import Library
from tests.custom_ops import fuzz_kernels

REPOSITORY = Path(__file__).parents[2]


def test_random_inputs(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXQ_ISA", "")  # restored afterwards; the rounds set it
    assert fuzz_kernels.main(str(library.path), 60) == 0


@pytest.mark.slow
def test_random_inputs_under_sanitizers(tmp_path: Path) -> None:
    compiler, cmake = shutil.which("g++"), shutil.which("cmake")
    if compiler is None or cmake is None:
        pytest.skip("needs g++ and cmake")
    build = tmp_path / "build"
    settings = (
        "-DONNXQ_SANITIZE=address,undefined",
        "-DONNXQ_REQUIRE_KERNELS=ON",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )
    subprocess.run([cmake, "-S", REPOSITORY, "-B", build, *settings], check=True)
    subprocess.run([cmake, "--build", build, "-j2"], check=True)
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    library = build / "custom_ops" / "libonnxq_ops_cpu.so"
    child = subprocess.run(
        [sys.executable, "-m", "tests.custom_ops.fuzz_kernels", library, "5000"],
        cwd=REPOSITORY,
        # Python and ONNX Runtime keep memory until the end; leaks are not what is looked for.
        env={**os.environ, "LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert "5000 rounds" in child.stdout
