"""check_loads: onnxruntime's verdict, from a process that may crash."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import onnx
import pytest

from onnxq.errors import DataError, OnnxqError, UnsupportedError
from onnxq.graph import io, probe
from tests.graph.io_helpers import small_model, write

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("isolated", [True, False])
def test_verdicts(tmp_path: Path, isolated: bool) -> None:
    path = write(small_model(), tmp_path / "m.onnx")
    io.check_loads(path, isolated=isolated)
    wrong = small_model()
    wrong.graph.node[0].input[1] = "x"  # [N, 4] x [N, 4]: the shapes do not fit
    wrong.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    with pytest.raises(DataError) as caught:
        io.check_loads(write(wrong, tmp_path / "wrong.onnx"), isolated=isolated)
    assert caught.value.code == "DATA-ORT-REFUSED"
    assert "MatMul" in caught.value.cause
    foreign = small_model()
    foreign.functions.pop()
    with pytest.raises(UnsupportedError) as unknown:
        io.check_loads(write(foreign, tmp_path / "foreign.onnx"), isolated=isolated)
    assert unknown.value.code == "UNSUPPORTED-CUSTOM-OP"
    assert "local:twice" in unknown.value.cause
    with pytest.raises(OnnxqError):
        io.check_loads(path, isolated=isolated, libraries=[tmp_path / "no-such-library.so"])


def test_a_crash_of_onnxruntime_is_an_error_with_a_code(tmp_path: Path) -> None:
    """A chain of 3,000 functions, which load refuses, makes onnxruntime itself fault."""
    model = small_model()
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("local", 1)]
    for i in range(3000):
        callee = f"f{i + 1}" if i < 2999 else "twice"
        node = onnx.helper.make_node(callee, ["a"], ["b"], domain="local")
        model.functions.append(
            onnx.helper.make_function("local", f"f{i}", ["a"], ["b"], [node], imports)
        )
    model.graph.node[1].op_type = "f0"
    with pytest.raises(DataError) as caught:
        io.check_loads(write(model, tmp_path / "m.onnx"))
    assert caught.value.code in ("DATA-ORT-CRASHED", "DATA-ORT-REFUSED")


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "DATA-ORT-CRASHED", "SIGSEGV"),
        ("import sys; sys.exit('strange end')", "DATA-ORT-CRASHED", "strange end"),
        ("import time; time.sleep(60)", "DATA-ORT-TIMEOUT", "0.5 s"),
        (
            "raise ModuleNotFoundError(\"No module named 'onnxruntime'\")",
            "UNSUPPORTED-NO-ORT",
            "not installed",
        ),
    ],
)
def test_ends_of_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, code: str, words: str
) -> None:
    monkeypatch.setattr(probe, "_CHILD", program)
    with pytest.raises(OnnxqError) as caught:
        io.check_loads(tmp_path / "m.onnx", timeout_s=0.5 if "sleep" in program else 60)
    assert caught.value.code == code
    assert words in caught.value.cause
    assert caught.value.hint


def test_without_onnxruntime_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match="UNSUPPORTED-NO-ORT"):
        io.check_loads(tmp_path / "m.onnx", isolated=False)


def test_importing_io_does_not_import_onnxruntime() -> None:
    import subprocess

    root = Path(__file__).parents[2]
    program = "import sys, onnxq.graph.io; sys.exit('onnxruntime' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env=environment)
