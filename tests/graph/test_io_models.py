"""Real models, odd ones included: loaded, saved in both ways, and run with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxq.errors import UnsupportedError
from onnxq.graph import io
from tests.graph.io_helpers import shared_folder, shared_models, small_model, write

MODELS = shared_models() or ["no shared models"]
NEEDS_A_LIBRARY = "pytorch_superresolution_with_pre_post_processing_op18.onnx"
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
SYMBOLS = {"sequence": 576, "sequence_length": 2}  # silero_vad reads windows of 576 samples


def _run(path: Path) -> list[np.ndarray]:
    """Outputs on one CPU thread, graph optimisations off, for inputs with a fixed seed."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, _feeds(session))
    return outputs


def _feeds(session: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        shape = [_dim(dim, axis, value.name) for axis, dim in enumerate(value.shape)]
        dtype = NUMPY_TYPES[value.type]
        if value.name == "sr":
            feeds[value.name] = np.array(16000, dtype)
        elif np.issubdtype(dtype, np.integer):
            top = 2 if value.name in ("attention_mask", "token_type_ids") else 20
            feeds[value.name] = rng.integers(1, top, shape).astype(dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def _dim(dim: int | str | None, axis: int, name: str) -> int:
    if isinstance(dim, int):
        return dim
    if name == "input" and dim is None:  # silero_vad does not name its axes
        return (1, 576)[axis]
    return SYMBOLS.get(str(dim), 1 if axis == 0 or dim in ("batch", None) else 16)


@pytest.mark.parametrize("name", MODELS)
def test_load_save_and_run(tmp_path: Path, name: str) -> None:
    path = shared_folder() / "models" / name
    model = io.load(path)
    saved = [
        io.save(model, tmp_path / "internal.onnx"),
        io.save(model, tmp_path / "external.onnx", external=True, threshold=256),
    ]
    expected = io.fingerprint(model)
    for result in saved:
        assert io.fingerprint(io.load(result.path)) == expected
        onnx.checker.check_model(str(result.path))
    if name.endswith(NEEDS_A_LIBRARY):
        for source in (path, saved[0].path):
            for isolated in (False, True):
                with pytest.raises(UnsupportedError, match="UNSUPPORTED-CUSTOM-OP"):
                    io.check_loads(source, isolated=isolated)
        return
    reference = _run(path)
    # of random letters the ensemble says 0, "no mark", for every one
    assert any(np.any(output) for output in reference) or "rawi_ensemble" in name
    for result in saved:
        for ours, theirs in zip(_run(result.path), reference, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_second_round_changes_no_byte(tmp_path: Path, name: str) -> None:
    once = io.save(io.load(shared_folder() / "models" / name), tmp_path / "a.onnx")
    twice = io.save(io.load(once.path), tmp_path / "b.onnx")
    assert once.path.read_bytes() == twice.path.read_bytes()


def test_equal_duplicate_opset_imports_of_a_real_model(tmp_path: Path) -> None:
    path = shared_folder() / "models" / "odd" / "text2tashkeel" / "rawi_ensemble.int8.onnx"
    twice = [(entry.domain, entry.version) for entry in onnx.load(path).opset_import]
    assert len(twice) == 2 * len(set(twice))
    model = io.load(path)
    assert model.opset_imports == dict(twice)
    saved = onnx.load(io.save(model, tmp_path / "o.onnx").path)
    assert sorted((e.domain, e.version) for e in saved.opset_import) == sorted(set(twice))


def test_external_initializers_of_branches_run(tmp_path: Path) -> None:
    model = io.load(write(small_model(), tmp_path / "m.onnx"))
    saved = io.save(model, tmp_path / "o.onnx", external=True, threshold=1)
    assert saved.data_path is not None
    for ours, theirs in zip(_run(saved.path), _run(tmp_path / "m.onnx"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
