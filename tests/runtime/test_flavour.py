from __future__ import annotations

import builtins
import sys
from importlib import metadata
from importlib.metadata import PackagePath
from typing import Any

import pytest

from onnxq.errors import UnsupportedError
from onnxq.runtime import doctor, require_onnxruntime
from onnxq.runtime.flavour import installed_flavours


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(metadata, "version", version)


def fail_import(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr("onnxq.runtime.flavour.importlib.import_module", refuse)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)


def test_one_flavour_is_fine() -> None:
    assert len(installed_flavours()) == 1
    assert require_onnxruntime().__name__ == "onnxruntime"


def test_two_flavours_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu="1.30.0")
    with pytest.raises(
        UnsupportedError, match=r"onnxruntime 1\.31\.1 and onnxruntime-gpu 1\.30\.0"
    ) as caught:
        require_onnxruntime()
    assert caught.value.code == "UNSUPPORTED-TWO-ORT"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in caught.value.hint


def test_a_plug_in_beside_onnxruntime_is_no_second_flavour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onnxq.runtime.flavour.metadata.version", lambda _: "2.7.0")
    files = {"onnxruntime": "onnxruntime/__init__.py", "onnxruntime-qnn": "onnxruntime_qnn/x.so"}
    monkeypatch.setattr(
        "onnxq.runtime.flavour.metadata.files",
        lambda name: [PackagePath(files.get(name, "other/__init__.py"))],
    )
    assert installed_flavours() == {"onnxruntime": "2.7.0"}


def test_no_flavour_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch)
    fail_import(monkeypatch, ModuleNotFoundError("No module", name="onnxruntime"))
    with pytest.raises(UnsupportedError, match="not installed") as caught:
        require_onnxruntime()
    assert caught.value.code == "UNSUPPORTED-NO-ORT"
    assert "onnxq[cpu]" in caught.value.hint


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13"), ModuleNotFoundError("no numpy", name="numpy")]
)
def test_broken_flavour_is_one_clear_error(
    error: ImportError, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_import(monkeypatch, error)
    with pytest.raises(UnsupportedError, match=str(error)) as caught:
        require_onnxruntime()
    assert caught.value.code == "UNSUPPORTED-BROKEN-ORT"


def test_doctor_reports_two_flavours(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu="1.30.0")
    report = doctor()
    assert not report.healthy
    assert report.onnxruntime == {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    assert any("overwrite each other" in line for line in report.lines())
