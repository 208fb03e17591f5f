from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq.errors import DataError, UnsupportedError
from onnxq.runtime import available_providers, inspect_library, session, usable_library
from onnxq.runtime import library as library_module

ADD = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N] x) => (float[N] y) { y = Add (x, x) }
"""
UNKNOWN = """
    <ir_version: 10, opset_import: ["" : 21, "nowhere" : 1]>
    g (float[N] x) => (float[N] y) { y = nowhere.Thing (x) }
"""


def source(text: str) -> bytes:
    return onnx.parser.parse_model(text).SerializeToString()


def code_of(
    caught: pytest.ExceptionInfo[DataError] | pytest.ExceptionInfo[UnsupportedError],
) -> str:
    return caught.value.code


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    usable_library.cache_clear()
    monkeypatch.setattr(library_module, "shipped_path", lambda **_: None)
    yield
    usable_library.cache_clear()


def test_path_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(source(ADD))
    x = np.arange(3, dtype=np.float32)
    for model in (path, str(path), source(ADD)):
        (y,) = session(model, threads=1).run(None, {"x": x})
        assert y.tolist() == [0.0, 2.0, 4.0]


def test_options_reach_onnxruntime() -> None:
    options = session(source(ADD), threads=2, optimize=False).get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.graph_optimization_level.name == "ORT_DISABLE_ALL"
    assert session(source(ADD), ["cpu"]).get_providers() == ["CPUExecutionProvider"]


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"no file /nowhere/m\.onnx") as caught:
        session("/nowhere/m.onnx")
    assert code_of(caught) == "DATA-FILE-MISSING"


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    for name, data in (("cut", source(ADD)[:-9]), ("text", b"not a model"), ("empty", b"")):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        with pytest.raises(DataError, match=name) as caught:
            session(path, threads=1)
        assert code_of(caught) == "DATA-ORT-REFUSED"


def test_unknown_operator() -> None:
    with pytest.raises(UnsupportedError, match="Thing") as caught:
        session(source(UNKNOWN), threads=1)
    assert code_of(caught) == "UNSUPPORTED-CUSTOM-OP"


@pytest.mark.parametrize("names", [["cuda"], ["NoSuchProvider"], ["NoSuchProvider", "cpu"]])
def test_missing_provider_is_no_silent_fallback(names: list[str]) -> None:
    if names == ["cuda"] and "CUDAExecutionProvider" in available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UnsupportedError, match="CPUExecutionProvider") as caught:
        session(source(ADD), names)
    assert code_of(caught) == "UNSUPPORTED-PROVIDER"


def test_provider_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime goes on without a provider that fails; we do not."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: [])
    with pytest.raises(UnsupportedError, match="did not start"):
        session(source(ADD), ["cpu"])


@pytest.mark.usefixtures("no_library")
def test_absent_library_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="onnxq.runtime"):
        session(source(ADD), threads=1)
        session(source(ADD), threads=1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "was not built" in caplog.text


@pytest.mark.usefixtures("no_library")
def test_absent_library_can_be_insisted_on() -> None:
    with pytest.raises(UnsupportedError) as caught:
        session(source(ADD), library=True)
    assert code_of(caught) == "UNSUPPORTED-LIBRARY"


def test_named_library_must_exist_and_be_one(tmp_path: Path) -> None:
    with pytest.raises(DataError) as missing:
        session(source(ADD), library=tmp_path / "none.so")
    assert code_of(missing) == "DATA-LIBRARY-MISSING"
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(UnsupportedError, match="does not load") as broken:
        session(source(ADD), library=text)
    assert code_of(broken) == "UNSUPPORTED-LIBRARY"


_ENTRY_POINTS = """
const char* onnxq_abi_tag() {{ return "{tag}"; }}
const char* onnxq_version() {{ return "{version}"; }}
const char* onnxq_kernels() {{ return "{kernels}"; }}
const char* onnxq_isa_levels() {{ return "scalar"; }}
"""


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tag": "onnxq-ops-abi-0"}, "ABI tag is 'onnxq-ops-abi-0'"),
        ({"version": "0.0.9"}, r"it is of onnxq 0\.0\.9"),
        ({"kernels": "Other 1 CPU float32\\n"}, "not those of this package's ops.def"),
        (None, "no onnxq operator library"),
    ],
)
def test_library_of_another_build_is_refused(
    fields: dict[str, str] | None, reason: str, tmp_path: Path
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    import onnxq

    fitting = {"tag": library_module.ABI_TAG, "version": onnxq.__version__, "kernels": ""}
    code = "int nothing;" if fields is None else _ENTRY_POINTS.format(**{**fitting, **fields})
    made = tmp_path / "fake.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", made],
        input=code,
        text=True,
        check=True,
    )
    with pytest.raises(UnsupportedError, match=reason):
        inspect_library(made)


def test_importing_the_package_does_not_import_onnxruntime() -> None:
    import sys

    heavy = "{'onnxruntime', 'onnx_ir', 'numpy'}"
    code = f"import sys, onnxq.runtime; print(sorted({heavy} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
