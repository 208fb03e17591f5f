"""Each bad input: one error with a code, a cause and a way out; nothing written; no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest


def _tree(folder: Path) -> dict[str, bytes | None]:
    """All files below ``folder`` with their contents."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


class Bench:
    """A folder with a good model and good samples, of which a case spoils one thing."""

    def __init__(self, folder: Path, model: Path, samples: Path) -> None:
        self.folder = folder
        self.model = model
        self.calib: Path | str = samples
        self.passes = "w8a8"
        self.out = folder / "out.onnx"
        self.extra: tuple[str, ...] = ("--allow-noop",)

    def arguments(self) -> tuple[Any, ...]:
        calib = ("--calib", self.calib) if self.calib else ()
        return ("run", self.model, "--passes", self.passes, "-o", self.out, *calib, *self.extra)


def _not_onnx(b: Bench) -> None:
    b.model.write_bytes(b"\x00\x01 this is no model" * 100)


def _truncated(b: Bench) -> None:
    b.model.write_bytes(b.model.read_bytes()[:-200])


def _opset(b: Bench) -> None:
    proto = onnx.load(b.model)
    proto.opset_import[0].version = 999
    onnx.save(proto, b.model)


def _external(b: Bench) -> None:
    proto = onnx.load(b.model)
    secret = b.folder / "secret.bin"
    secret.write_bytes(b"\0" * 4096)
    inner = b.folder / "inner"
    inner.mkdir()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    b.model = inner / "m.onnx"
    b.model.write_bytes(proto.SerializeToString())


def _unloadable(b: Bench) -> None:
    proto = onnx.load(b.model)
    proto.graph.node[1].domain = "com.nobody"
    proto.graph.node[1].op_type = "Frobnicate"
    proto.opset_import.add(domain="com.nobody", version=1)
    b.model.write_bytes(proto.SerializeToString())


def _samples(**arrays: np.ndarray) -> Callable[[Bench], None]:
    def spoil(b: Bench) -> None:
        np.savez(str(b.calib), **arrays)

    return spoil


def _set(**values: Any) -> Callable[[Bench], None]:
    def spoil(b: Bench) -> None:
        for name, value in values.items():
            setattr(b, name, value)

    return spoil


def _same(b: Bench) -> None:
    b.out = b.model


def _empty_folder(b: Bench) -> None:
    b.calib = b.folder / "empty"
    b.calib.mkdir()


def _missing_folder(b: Bench) -> None:
    b.out = b.folder / "none" / "o.onnx"


def _unwritable(b: Bench) -> None:
    # The parent is a file: not writable for anybody, the administrator included.
    (b.folder / "file").write_bytes(b"")
    b.out = b.folder / "file" / "o.onnx"


def _no_report_folder(b: Bench) -> None:
    b.extra = ("--report", str(b.folder / "none" / "r.html"))


def _report_over(path: Callable[[Bench], Path | str]) -> Callable[[Bench], None]:
    def spoil(b: Bench) -> None:
        b.extra = ("--report", str(path(b)))

    return spoil


def _missing_model(b: Bench) -> None:
    b.model = b.folder / "nope.onnx"


FLOAT = np.ones((8, 16), np.float32)

CASES: dict[str, tuple[Callable[[Bench], None], int, str]] = {
    "missing file": (_missing_model, 5, "DATA-FILE-MISSING"),
    "not ONNX": (_not_onnx, 5, "DATA-NOT-ONNX"),
    "truncated": (_truncated, 5, "DATA-TRUNCATED"),
    "wrong opset": (_opset, 6, "UNSUPPORTED-"),
    "external data outside": (_external, 5, "DATA-EXTERNAL-"),
    "unknown pass": (_set(passes="canonicalise"), 2, "SPEC-PASS-UNKNOWN"),
    "unknown option": (_set(passes="qdq{colour=red}"), 2, "SPEC-OPTION-UNKNOWN"),
    "bad option value": (_set(passes="calibrate{percentile=lots}"), 2, "SPEC-"),
    "bad syntax": (_set(passes="canonicalize,,qdq{"), 2, "SPEC-"),
    "wrong order": (_set(passes="qdq"), 2, "PIPELINE-"),
    "missing recipe": (_set(passes="@nope.toml"), 5, "DATA-RECIPE-FILE"),
    "unknown target": (_set(extra=("--target", "toaster")), 2, "SPEC-TARGET"),
    "wrong names": (_samples(z=FLOAT), 5, "CALIB-"),
    "wrong shapes": (_samples(x=np.ones((8, 3), np.float32)), 5, "CALIB-"),
    "wrong dtypes": (_samples(x=np.full((8, 16), "a")), 5, "CALIB-"),
    "no samples in file": (_samples(x=FLOAT[:0]), 5, "CALIB-"),
    "empty folder": (_empty_folder, 5, "CALIB-"),
    "missing data": (_set(calib="nope.npz"), 5, "CALIB-NOT-FOUND"),
    "data needed": (_set(calib=""), 5, "DATA-"),
    "output is input": (_same, 5, "DATA-OUTPUT-IS-INPUT"),
    "runtime cannot load": (_unloadable, 6, "UNSUPPORTED-"),
    "folder missing": (_missing_folder, 5, "DATA-OUTPUT-FOLDER-MISSING"),
    "folder unwritable": (_unwritable, 5, "DATA-OUTPUT-"),
    "report folder missing": (_no_report_folder, 5, "DATA-REPORT-UNWRITABLE"),
    "report is the model": (_report_over(lambda b: b.model), 5, "DATA-OUTPUT-IS-INPUT"),
    "report is the data": (_report_over(lambda b: b.calib), 5, "DATA-OUTPUT-IS-INPUT"),
    "report is the output": (_report_over(lambda b: b.out), 5, "DATA-REPORT-IS-OUTPUT"),
    "report is the recipe": (
        _report_over(lambda b: f"{b.out}.recipe.toml"),
        5,
        "DATA-REPORT-IS-OUTPUT",
    ),
    "unknown target of a dry run": (
        _set(extra=("--target", "toaster", "--dry-run")),
        2,
        "SPEC-TARGET",
    ),
    "opset of the future": (_set(passes="canonicalize{opset=999}"), 2, "SPEC-RANGE"),
    "resume from nothing": (_set(extra=("--resume",)), 2, "SPEC-RESUME"),
    "bisect without data": (_set(calib="", extra=("--bisect",)), 2, "SPEC-BISECT-DATA"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_of_run(
    name: str, cli: Any, mlp: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, exit_code, code = CASES[name]
    bench = Bench(tmp_path, mlp, samples)
    spoil(bench)
    before = _tree(tmp_path)
    result = cli(*bench.arguments())
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"error[{code}"), result.stderr
    assert sum(line.startswith("error[") for line in lines) == 1
    assert lines[-1].startswith("  hint: ")
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("command", ["inspect", "bench", "eval", "compare"])
def test_bad_model_of_the_other_commands(
    command: str, cli: Any, samples: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"garbage" * 50)
    extra: dict[str, tuple[Any, ...]] = {
        "compare": (path, "--calib", samples),
        "eval": ("--task", "sts", "--data", samples),
    }
    for model, code in ((tmp_path / "nope.onnx", "DATA-FILE-MISSING"), (path, "DATA-")):
        result = cli(command, model, *extra.get(command, ()))
        assert result.exit_code == 5, result.output
        assert result.stdout == ""
        assert result.stderr.startswith(f"error[{code}")


def test_unknown_task(cli: Any, mlp: Path, samples: Path) -> None:
    result = cli("eval", mlp, "--task", "poetry", "--data", samples)
    assert result.exit_code == 2
    assert "error[SPEC-EVAL-TASK]" in result.stderr


def test_pipeline_errors_point_at_the_place(cli: Any, mlp: Path) -> None:
    result = cli("run", mlp, "--passes", "canonicalize,calibrat{method=mse}", "--dry-run")
    assert "  | canonicalize,calibrat{method=mse}\n  |              ^^^^^^^^\n" in result.stderr
    assert "calibrate" in result.stderr.splitlines()[-1]
