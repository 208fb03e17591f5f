"""Each command on a small model: what it prints, and what it prints for machines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxq.cli.feeds import parse_shapes, random_feeds
from onnxq.cli.summary import print_run
from onnxq.cli.view import RunView
from onnxq.errors import SpecError


def _records(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_inspect_agrees_with_onnx(cli: Any, mlp: Path) -> None:
    (record,) = _records(cli("inspect", mlp, "--json"))
    proto = onnx.load(mlp)
    assert record["bytes"] == mlp.stat().st_size
    assert record["operators"] == dict(Counter(n.op_type for n in proto.graph.node))
    assert record["opsets"] == {"": 21}
    assert record["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 16]}]
    elements = sum(int(np.prod(t.dims)) for t in proto.graph.initializer)
    assert record["weights"] == {
        "float32": {"tensors": 2, "elements": elements, "bytes": 4 * elements}
    }
    assert record["structure"]["linear (matmul)"] == 2
    assert record["quantization"] == {}


def test_inspect_prints_the_same(cli: Any, mlp: Path) -> None:
    text = cli("inspect", mlp, "-v").stdout
    assert "linear (matmul)" in text
    assert "not quantized" in text
    assert "layer.0" in text


def test_inspect_counts_quantizers(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[4] x) => (float[4] y) <float s = {0.5}, uint8 z = {3}> {
            q = QuantizeLinear(x, s, z)
            y = DequantizeLinear(q, s, z)
        }"""
    )
    onnx.save(model, path)
    (record,) = _records(cli("inspect", path, "--json"))
    assert record["quantization"] == {"QuantizeLinear": 1, "DequantizeLinear": 1}


def test_bench_measures_each_model(cli: Any, mlp: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(mlp.read_bytes())
    args = ("bench", mlp, other, "--rounds", "4", "--shape", "x=3x16", "--json")
    first, second = _records(cli(*args))
    assert first["model"] == str(mlp)
    assert first["ratio"] == 1.0
    assert second["ratio"] == pytest.approx(first["median_ms"] / second["median_ms"])
    assert first["feeds"] == "3 x 16"
    assert first["median_ms"] > 0
    assert "1.00x" in cli("bench", mlp, "--rounds", "2").stdout


def test_bench_of_one_round_and_of_a_shape_that_does_not_fit(cli: Any, mlp: Path) -> None:
    (record,) = _records(cli("bench", mlp, "--json", "--rounds", 1))
    assert record["rounds"] == 1
    result = cli("bench", mlp, "--shape", "x=1x3")
    assert result.exit_code == 5
    assert result.stderr.startswith("error[DATA-ORT-RUN]")


def test_random_feeds_fit_the_model(mlp: Path) -> None:
    session = ort.InferenceSession(mlp, providers=["CPUExecutionProvider"])
    feeds = random_feeds(session, {}, batch=5, length=7, seed=0)
    assert feeds["x"].shape == (5, 16)
    again = random_feeds(session, {}, batch=5, length=7, seed=0)
    np.testing.assert_array_equal(feeds["x"], again["x"])
    assert session.run(None, feeds)[0].shape == (5, 8)
    with pytest.raises(SpecError, match="no input `z`"):
        random_feeds(session, {"z": (1,)}, batch=1, length=1, seed=0)


@pytest.mark.parametrize("text", ["x", "x=", "x=1xq", "=-1"])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_shapes([text])


def test_models_list(cli: Any) -> None:
    names = {r["name"] for r in _records(cli("models", "list", "--json"))}
    assert {"minilm", "stories260k"} <= names
    assert "minilm" in cli("models", "list").stdout


def test_models_build_refuses_unknown(cli: Any, tmp_path: Path) -> None:
    result = cli("models", "build", "nope", "-o", tmp_path / "x.onnx")
    assert result.exit_code == 2
    assert "error[SPEC-MODEL-UNKNOWN]" in result.stderr
    result = cli("models", "build", "minilm", "-o", tmp_path / "x.onnx", "--set", "spelling")
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_doctor(cli: Any) -> None:
    (record,) = _records(cli("doctor", "--json"))
    assert record["healthy"] is True
    assert ort.__version__ in cli("doctor").stdout


def test_doctor_of_a_model(cli: Any, mlp: Path) -> None:
    (record,) = _records(cli("doctor", mlp, "--json"))
    assert {node["by"] for node in record["nodes"]} == {"onnxruntime"}
    assert record["nodes"][0]["op"] in cli("doctor", mlp).stdout


def test_passes_lists_and_explains(cli: Any) -> None:
    records = _records(cli("passes", "--json"))
    names = [r["name"] for r in records]
    assert {"w8a8", "canonicalize", "qdq"} <= set(names)
    for record in records:
        (alone,) = _records(cli("passes", record["name"], "--json"))
        assert alone == record
        text = cli("passes", record["name"]).stdout
        for option in record.get("options", ()):
            assert option["name"] in text
            assert option["doc"], f"{record['name']}: option {option['name']} has no line of docs"


def test_passes_suggests(cli: Any) -> None:
    result = cli("passes", "canonicalise")
    assert result.exit_code == 2
    assert "error[SPEC-PASS-UNKNOWN]" in result.stderr
    assert "canonicalize" in result.stderr


@pytest.mark.parametrize("verbose", [False, True])
def test_summary_of_a_run(
    run_view: RunView, capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    print_run(run_view, verbose=verbose)
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert lines[-1].startswith(
        "PASSED | cosine 0.99731, SQNR 22.6 dB | 3.88x smaller | 1.82x fp32"
    )
    assert lines[-1].endswith("Command: " + run_view.command)
    assert ("12 x residual add" in text) is not verbose
    assert ("encoder.layer.3/Add: residual add" in text) is verbose
    assert "90.3 MB" in text
    assert "17.5 ms" in text


def test_json_of_a_run_is_strict(run_view: RunView) -> None:
    json.loads(json.dumps(run_view.to_json(), allow_nan=False))


def test_formats_lists_and_measures(cli: Any) -> None:
    bits = {r["format"]: r["bits_per_element"] for r in _records(cli("formats", "--json"))}
    assert bits["mxfp4"] == 4.25  # 4 bits and an 8-bit scale for every 32 (OCP MX v1.0)
    assert bits["nvfp4"] == pytest.approx(4.5, abs=1e-3)
    rows = _records(cli("formats", "--table", "--samples", "4096", "--json"))
    assert [r["format"] for r in rows] == list(bits)
    text = cli("formats", "--table", "--samples", "4096").stdout
    assert "Student t5" in text
    assert "mxfp4" in text
