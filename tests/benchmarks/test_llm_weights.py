"""What llm_weights.py measures is what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from onnxq.graph import io

from ..passes import helpers as h

FOLDER = Path(__file__).parents[2] / "benchmarks"
K = 64
BODY = f"""g (float[R,{K}] x) => (float[R,{K}] y) {{
    a = MatMul(x, wa)  t = Tanh(a)  y = MatMul(t, wb) }}"""


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


FORMATS = ["mxfp4", "nvfp4", "nvfp4-46", "nf4", "mxfp6e2m3", "mxfp8e4m3", "fp8e4m3", "mxint8"]


@pytest.mark.parametrize("text", FORMATS)
def test_the_float_graph_is_the_model_that_is_written(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = load("_jobs", monkeypatch)
    weights = {name: h.normal(K, K, seed=i, scale=0.2) for i, name in enumerate(("wa", "wb"))}
    saved = io.save(h.model_of(BODY, weights, opset=21, ir_version=10), tmp_path / "m.onnx")
    passes = f"assign{{mode=weight-only embeddings=float weights={text}}}, qdq"
    x = {"x": h.normal(9, K, seed=7)}
    found = {}
    for name, job in (("codes", jobs.onnxq_passes), ("float", jobs.onnxq_rounded)):
        out = tmp_path / f"{name}.onnx"
        job({"model": str(saved.path), "passes": passes, "out": str(out)})
        found[name] = h.run(io.load(out), x)["y"]
    assert h.relative_error(found["codes"], found["float"]) < 1e-6
    exact = h.run(io.load(saved.path), x)["y"]
    assert h.relative_error(exact, found["float"]) > 1e-3


def test_rows_are_kept_and_fewer_windows_are_their_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("_common", monkeypatch)
    module = load("llm_weights", monkeypatch)
    path = tmp_path / "rows.json"
    facts = {"nll": [511.0, 1022.0, 0.0], "kl": [64.0, 0.0, 0.0], "size": 3.0}
    module.Store(path, "case", 3).keep("row", facts)
    assert module.Store(path, "case", 2).find("row") == facts
    assert module.Store(path, "case", 4).find("row") is None
    assert module.Store(path, "other", 2).find("row") is None
    two = module.figures_of(facts, 2)
    assert two["perplexity"] == pytest.approx(np.exp(1.5))
    assert two["kl"] == pytest.approx(0.5)
    assert two["size"] == 3.0
