"""Fixtures of the builders' tests: small random checkpoints, plain sessions, the shared folder."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("ONNXQ_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("the shared data folder is absent (set ONNXQ_SHARED)")
    return folder


@pytest.fixture(scope="session")
def run_model() -> Callable[..., list[np.ndarray]]:
    """Run a model, by default with ONNX Runtime's optimisations off."""

    def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, optimised: bool = False):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
        )
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(None, feeds)

    return run


LLAMA_SIZES = {"dim": 16, "hidden": 24, "layers": 2, "heads": 4, "kv": 2, "vocab": 300, "max": 64}


@pytest.fixture
def llama2c_files(tmp_path: Path) -> tuple[Path, Path]:
    """A random llama2.c checkpoint (tied output layer) and its tokenizer, as bytes on disk."""
    s = LLAMA_SIZES
    rng = np.random.default_rng(0)
    head = s["dim"] // s["heads"]
    kv_dim = head * s["kv"]
    n = s["layers"]
    shapes = [
        (s["vocab"], s["dim"]), (n, s["dim"]), (n, s["dim"], s["dim"]), (n, kv_dim, s["dim"]),
        (n, kv_dim, s["dim"]), (n, s["dim"], s["dim"]), (n, s["dim"]), (n, s["hidden"], s["dim"]),
        (n, s["dim"], s["hidden"]), (n, s["hidden"], s["dim"]), (s["dim"],),
        (2, s["max"], head // 2),
    ]  # fmt: skip
    header = struct.pack("<7i", *(s[k] for k in ("dim", "hidden", "layers", "heads", "kv")),
                         s["vocab"], s["max"])  # fmt: skip
    body = b"".join(rng.normal(0, 0.4, shape).astype("<f4").tobytes() for shape in shapes)
    weights = tmp_path / "stories260K.bin"
    weights.write_bytes(header + body)
    tokenizer = tmp_path / "tok512.bin"
    tokenizer.write_bytes(_tokenizer_bytes(s["vocab"]))
    return weights, tokenizer


def _tokenizer_bytes(vocab: int) -> bytes:
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256))]
    learnt = [" a", "b ", " ab", "ab", "ba", "aba", " b", "ab ", "bab"]
    characters = [" ", "a", "b", "c", "d"]
    filler = [chr(0x4E00 + i) for i in range(vocab - len(tokens) - len(learnt) - len(characters))]
    scored = [(t, 0.0) for t in tokens]
    # Scores out of step with the ids: merges must follow the scores.
    scored += [(t, -float(i * 4 % len(learnt))) for i, t in enumerate(learnt)]
    scored += [(t, -100.0) for t in [*characters, *filler]]
    out = struct.pack("<i", 8)
    for token, score in scored:
        raw = token.encode()
        out += struct.pack("<fi", score, len(raw)) + raw
    return out
