"""Memory: load, hash and save hold about one tensor, however large the model is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

PROGRAM = """
import json, sys
from pathlib import Path
from onnxq.graph import io
def peak():
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) * 1024
source, folder, kinds = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
small = io.load(sys.argv[4]); io.save(small, folder / 'warm.onnx'); io.fingerprint(small)
start = peak()
result = {}
for kind in kinds:
    model = io.load(source)
    result.setdefault('load', peak() - start)
    io.save(model, folder / 'out.onnx', external=kind == 'external')
    result[kind] = peak() - start
    result['same'] = io.fingerprint(io.load(folder / 'out.onnx')) == io.fingerprint(model)
    source = folder / 'out.onnx'
    folder = folder / 'next'; folder.mkdir()
print(json.dumps(result))
"""


def _generate(folder: Path, count: int, rows: int, columns: int) -> Path:
    """``count`` initializers ``[rows, columns]`` f32 in one data file."""
    body = "\n".join(f"h{i + 1} = Mul(h{i}, w{i})" for i in range(count))
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]>\n'
        f"g (float[{rows}, {columns}] h0) => (float[{rows}, {columns}] h{count}) {{\n{body}\n}}"
    )
    block = np.random.default_rng(0).standard_normal(columns).astype(np.float32)
    nbytes = 4 * rows * columns
    with (folder / "big.data").open("wb") as file:
        for i in range(count):
            for _ in range(rows):
                file.write((block + i).tobytes())
            tensor = model.graph.initializer.add(
                name=f"w{i}",
                data_type=onnx.TensorProto.FLOAT,
                dims=[rows, columns],
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, value in (("location", "big.data"), ("offset", i * nbytes)):
                tensor.external_data.add(key=key, value=str(value))
    path = folder / "big.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _peaks(tmp_path: Path, count: int, columns: int, kinds: list[str]) -> dict[str, int]:
    path = _generate(tmp_path, count, 256, columns)
    small = tmp_path / "small"
    small.mkdir()
    warm = _generate(small, 1, 1, 64)
    out = tmp_path / "out"
    out.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, path, out, json.dumps(kinds), warm],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peaks: dict[str, int] = json.loads(result.stdout)
    assert peaks.pop("same") == 1
    print({name: f"{value / MIB:.1f} MiB" for name, value in peaks.items()})
    return peaks


def test_300_mb_in_less_than_one_tensor(tmp_path: Path) -> None:
    """Ten tensors of 30 MiB: external to internal, internal to external, both streamed."""
    peaks = _peaks(tmp_path, 10, 30 * MIB // 1024, ["internal", "external"])
    assert peaks["load"] < 4 * MIB
    assert peaks["internal"] < 30 * MIB
    assert peaks["external"] < 30 * MIB


@pytest.mark.slow
def test_3500_mb_in_less_than_one_tensor(tmp_path: Path) -> None:
    """Fourteen tensors of 250 MiB: above what protobuf holds."""
    peaks = _peaks(tmp_path, 14, 250 * MIB // 1024, ["external"])
    assert peaks["load"] < 4 * MIB
    assert peaks["external"] < 250 * MIB
