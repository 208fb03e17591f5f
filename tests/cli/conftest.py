"""A finished run with all parts, a small model, and ways to call the command line."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from onnxq.cli.app import app
from onnxq.cli.view import CellView, ErrorView, HistogramView, PassView, RunView, SpeedView


def make_run_view(layers: int = 6) -> RunView:
    cells = [CellView("embeddings/Gather", "Gather", "float", "int8", "weights")]
    errors = []
    for i in range(layers):
        base = f"encoder.layer.{i}"
        for j, op in enumerate(("MatMul", "MatMul", "MatMul", "Softmax", "MatMul", "Add")):
            static = op == "MatMul"
            cells.append(
                CellView(
                    f"{base}/{op}_{j}",
                    op,
                    "uint8" if static else "float",
                    "int8" if static else "",
                    "static" if static else "float",
                    "" if static else "softmax outputs stay float",
                )
            )
            errors.append(ErrorView(f"{base}/{op}_{j}", 0.9999 - 0.001 * i, 40 - 4 * i - j, op))
        cells.append(
            CellView(f"{base}/LayerNormalization", "LayerNormalization", "float", "", "float")
        )
    edges = [-4 + 8 * i / 256 for i in range(257)]
    counts = [1e4 * math.exp(-((-4 + 8 * (i + 0.5) / 256) ** 2)) for i in range(256)]
    return RunView(
        source="in/minilm.onnx",
        output="out/minilm <w8a8>.onnx",
        pipeline="canonicalize,calibrate,smooth-quant{alpha=0.65},assign,qdq,sanity",
        target="cpu",
        command="onnxq run in/minilm.onnx --passes w8a8 --calib t.txt -o 'out/m <w8a8>.onnx'",
        passes=[
            PassView("canonicalize", 0.4, [("a", "constant folded", "")] * 9),
            PassView(
                "smooth-quant{alpha=0.65}",
                1.25,
                [(f"n{i}", "scales folded into the norm", "") for i in range(12)],
                [(f"encoder.layer.{i}/Add", "residual add") for i in range(12)]
                + [("pooler & <head>", "no norm before it")],
                ["largest scale 7.1"],
            ),
        ],
        bytes_before=90_300_000,
        bytes_after=23_300_000,
        seconds=9.8,
        warnings=["random calibration data: the ranges mean nothing"],
        errors=[ErrorView("last_hidden_state", 0.99731, 22.6, cosine_min=0.99, samples=16)],
        speed=SpeedView(0.0319, 0.0175, 2, "1 x 128"),
        layers=errors,
        histograms=[
            HistogramView(f"encoder.layer.{i}.input", edges, counts, -2.0 - i / 4, 2.5, "uint8 mse")
            for i in range(14)
        ],
        cells=cells,
        weights_before={"float32": 90_200_000, "int64": 4_800},
        weights_after={"int8": 22_600_000, "float32": 700_000, "int64": 4_800},
        weight_bits=8.06,
        provenance={"onnxq.version": "0.1.0", "onnxq.seed": "0"},
        samples="16 held-back samples",
    )


@pytest.fixture
def run_view() -> RunView:
    return make_run_view()


ROOT = Path(__file__).resolve().parents[2]

Cli = Callable[..., Result]
Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli() -> Cli:
    """Run a command line in this process; a traceback in the output fails the test."""

    def call(*args: object, **kwargs: object) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in args], **kwargs)  # type: ignore[arg-type]
        assert "Traceback" not in result.output
        return result

    return call


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


@pytest.fixture
def shell() -> Shell:
    """Run a command line in a process of its own."""

    def call(*args: object, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "onnxq", *map(str, args)],
            capture_output=True,
            text=True,
            env=environment(**extra),
            timeout=120,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def mlp_bytes() -> bytes:
    """``y = relu(x W1) W2`` with x: [N, 16] and y: [N, 8]."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        mlp (float[N, 16] x) => (float[N, 8] y) {
            h = MatMul(x, W1)
            r = Relu(h)
            y = MatMul(r, W2)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("W1", (16, 32)), ("W2", (32, 8))):
        weight = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    for i, node in enumerate(model.graph.node):
        node.name = f"layer.{i}"
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture
def mlp(tmp_path: Path, mlp_bytes: bytes) -> Path:
    path = tmp_path / "mlp.onnx"
    path.write_bytes(mlp_bytes)
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Thirty-two samples of the MLP's input."""
    rng = np.random.default_rng(1)
    path = tmp_path / "samples.npz"
    np.savez(path, x=rng.standard_normal((32, 16)).astype(np.float32))
    return path
