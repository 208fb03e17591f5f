"""``onnxq run`` from end to end on a small model, with every switch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxq.cli.console import alike, grouped


@pytest.fixture
def done(cli: Any, mlp: Path, samples: Path, tmp_path: Path) -> tuple[Any, Path]:
    out, page = tmp_path / "out.onnx", tmp_path / "r.html"
    result = cli(
        *("run", mlp, "--passes", "w8a8", "-o", out, "--calib", samples),
        *("--threads", "1", "--allow-noop", "--report", page),
    )
    assert result.exit_code == 0, result.output
    return result, out


def test_run_writes_a_quantized_model_and_its_recipe(done: tuple[Any, Path], mlp: Path) -> None:
    result, out = done
    ops = [node.op_type for node in onnx.load(out).graph.node]
    assert "QuantizeLinear" in ops
    x = np.random.default_rng(5).standard_normal((4, 16)).astype(np.float32)
    before, after = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for p in (mlp, out)
    )
    cosine = float(np.vdot(before, after) / np.linalg.norm(before) / np.linalg.norm(after))
    assert cosine > 0.995
    assert (out.parent / "out.onnx.recipe.toml").exists()
    last = result.stdout.splitlines()[-1]
    assert last.startswith("PASSED | cosine 0.99")
    assert f"Command: onnxq run {mlp} --passes w8a8" in last
    assert "SQNR" in result.stdout
    assert "smaller" in result.stdout


def test_report_of_a_run_shows_layers_ranges_and_borders(done: tuple[Any, Path]) -> None:
    page = (done[1].parent / "r.html").read_text()
    for part in ("Passes", "Where precision changes", "Layers", "Ranges", "Weights", "Provenance"):
        assert f"<h2>{part}</h2>" in page
    assert 'class="edge"' in page
    assert 'class="static"' in page


def test_cells_agree_with_the_written_graph(done: tuple[Any, Path]) -> None:
    from onnxq.cli.report.precision import bits_per_weight, bytes_by_format, cells
    from onnxq.graph.io import load

    model = load(done[1])
    found = [c for c in cells(model, {}) if c.op == "MatMul"]
    assert [(c.activation, c.weight, c.mode) for c in found] == [("uint8", "int8", "static")] * 2
    proto = onnx.load(done[1])
    sizes = {t.name: len(onnx.numpy_helper.to_array(t).tobytes()) for t in proto.graph.initializer}
    assert sum(bytes_by_format(model).values()) == sum(sizes.values())
    assert bits_per_weight({"float32": 400}, {"int8": 100}) == 8.0
    assert bits_per_weight({"float32": 400}, {"int4": 50, "float32": 16, "int64": 8}) == 5.28


def test_json_is_one_object_on_stdout(cli: Any, mlp: Path, samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    args = ("run", mlp, "--passes", "w8a8", "-o", out, "--calib", samples, "--allow-noop", "--json")
    result = cli(*args)
    record = json.loads(result.stdout)
    assert record["status"] == "passed"
    assert record["bytes_before"] == mlp.stat().st_size
    assert record["bytes_after"] == out.stat().st_size
    assert record["outputs"][0]["name"] == "y"
    assert [p["pass"] for p in record["passes"]][-1] == "sanity"


def test_verbose_lists_each_site(cli: Any, mlp: Path, samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    args = ("run", mlp, "--passes", "w8a8", "-o", out, "--calib", samples, "--allow-noop", "-v")
    text = cli(*args).stdout
    assert "layer.0: " in text
    assert "layer.2: " in text
    assert "Layers farthest" in text


def test_dry_run_writes_nothing(cli: Any, mlp: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = cli("run", mlp, "--passes", "w8a8", "--dry-run", "--json")
    record = json.loads(result.stdout)
    named = {p["pass"]: p["candidates"] for p in record["passes"]}
    assert named["assign"] == ["layer.0", "layer.2"]
    assert "assign" in cli("run", mlp, "--passes", "w8a8", "--dry-run").stdout
    assert sorted(tmp_path.iterdir()) == before


def test_dry_run_and_bisect_exclude_each_other(cli: Any, mlp: Path, samples: Path) -> None:
    result = cli("run", mlp, "--passes", "w8a8", "--calib", samples, "--bisect", "--dry-run")
    assert result.exit_code == 2
    assert "SPEC-COMBINATION" in result.stderr


def test_a_poor_result_says_so_in_text_json_and_report(
    cli: Any, mlp: Path, samples: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    passes = "canonicalize,assign{mode=weight-only weights=binary},qdq"
    args = ("run", mlp, "--passes", passes, "-o", tmp_path / "out.onnx", "--calib", samples)
    result = cli(*args, "--report", page)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("POOR RESULT | cosine 0.")
    assert "POOR RESULT: output `y`" in result.stderr
    assert "POOR RESULT: output `y`" in page.read_text().replace("&#x27;", "'")
    record = json.loads(cli(*args, "--json").stdout)
    assert record["status"] == "poor"
    assert any(w.startswith("POOR RESULT") for w in record["warnings"])
    assert cli(*args, "--min-cosine", "0.98").exit_code == 3


def test_bisect_says_that_nothing_broke(cli: Any, mlp: Path, samples: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    args = ("run", mlp, "--passes", "w8a8", "--calib", samples, "--bisect")
    record = json.loads(cli(*args, "--json").stdout)
    assert record["culprit"] is None
    assert "no pass broke the model" in cli(*args).stdout
    assert sorted(tmp_path.iterdir()) == before


def test_random_data_is_loud(cli: Any, mlp: Path, tmp_path: Path) -> None:
    args = ("--calib", "random", "-o", tmp_path / "o.onnx", "--allow-noop")
    result = cli("run", mlp, "--passes", "w8a8", *args)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: calibrating on RANDOM numbers")


def test_threshold_leaves_the_old_output(
    cli: Any, mlp: Path, samples: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.onnx"
    out.write_bytes(b"old")
    args = ("run", mlp, "--passes", "w8a8", "-o", out, "--calib", samples, "--allow-noop")
    result = cli(*args, "--min-cosine", "1.0")
    assert result.exit_code == 3
    assert "error[QUALITY-COSINE]" in result.stderr
    assert out.read_bytes() == b"old"
    forced = cli(*args, "--min-cosine", "1.0", "--force")
    assert forced.exit_code == 3
    assert out.read_bytes() != b"old"


def test_noop_has_its_own_exit_code(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "relu.onnx"
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[4] x) => (float[4] y) {y = Relu(x)}'
    onnx.save(onnx.parser.parse_model(text), path)
    data = tmp_path / "d.npz"
    np.savez(data, x=np.ones((8, 4), np.float32))
    out = tmp_path / "o.onnx"
    args = ("run", path, "--passes", "w8a8", "-o", out, "--calib", data)
    result = cli(*args)
    assert result.exit_code == 4, result.output
    assert "error[NOOP]" in result.stderr
    assert not out.exists()


def test_compare_two_files(cli: Any, done: tuple[Any, Path], mlp: Path, samples: Path) -> None:
    args = ("compare", mlp, done[1], "--calib", samples)
    record = json.loads(cli(*args, "--json").stdout)
    assert record["outputs"][0]["cosine_mean"] > 0.995
    assert record["reference_bytes"] == mlp.stat().st_size
    assert record["layers"]
    text = cli(*args).stdout
    assert "Layers farthest from mlp.onnx" in text
    assert "smaller" in text
    same = json.loads(cli("compare", mlp, mlp, "--calib", samples, "--json").stdout)
    assert same["outputs"][0]["max_abs"] == 0.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_the_old_output(
    number: signal.Signals, mlp: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import numpy as np, sys, time\n"
        "def rows():\n"
        "    for i in range(10000):\n"
        "        if i == 4: print('ready', file=sys.stderr, flush=True)\n"
        "        time.sleep(0.02)\n"
        "        yield {'x': np.full((1, 16), i, np.float32)}\n"
    )
    out = tmp_path / "o.onnx"
    out.write_bytes(b"old")
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    args = ["run", str(mlp), "--passes", "w8a8", "-o", str(out), "--calib", "slow:rows"]
    child = subprocess.Popen(
        [sys.executable, "-m", "onnxq", *args], stderr=subprocess.PIPE, text=True, env=env
    )
    assert child.stderr is not None
    assert "ready" in child.stderr.readline()
    time.sleep(0.2)
    child.send_signal(number)
    _, rest = child.communicate(timeout=30)
    assert child.returncode == 128 + number
    assert rest.splitlines()[-1] == "interrupted: nothing was written"
    assert "Traceback" not in rest
    assert out.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {
        "mlp.onnx",
        "o.onnx",
        "slow.py",
    }


def test_like_reasons_are_one_group() -> None:
    texts = [f"value bias folded into /encoder/layer.{i}/MatMul" for i in range(6)]
    assert grouped(texts) == [(6, "value bias folded into ...")]
    assert grouped(["gains 0.5 dB, less than 2", "gains 1.25 dB, less than 2"]) == [
        (2, "gains ... dB, less than ...")
    ]
    assert grouped(["a table of 3,072 bytes"]) == [(1, "a table of 3,072 bytes")]
    assert alike("36 x Q/DQ, int8 per channel").endswith("int8 per channel")
