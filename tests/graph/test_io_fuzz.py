"""Damaged models: an error with a code or a model that can be saved, never a traceback."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import onnx
import pytest

from onnxq.errors import DataError, UnsupportedError
from onnxq.graph import io
from tests.graph.io_helpers import external_model, shared_folder, small_model, weight
from tests.graph.mutate import mutate


def _try(content: bytes, folder: Path) -> str:
    """Load, and if that works save and load again; the outcome as a word."""
    path = folder / "m.onnx"
    path.write_bytes(content)
    model = None
    refusal = None
    try:
        model = io.load(path)
    except (DataError, UnsupportedError) as error:
        refusal = error
    if model is None:
        assert refusal is not None
        assert refusal.cause
        assert refusal.hint
        return refusal.code
    out = io.save(model, folder / "o.onnx")
    assert io.fingerprint(io.load(out.path)) == io.fingerprint(model)
    return "valid"


def _mutations(sources: list[onnx.ModelProto], count: int, folder: Path) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for seed in range(count):
        rng = random.Random(seed)
        model = onnx.ModelProto()
        model.CopyFrom(rng.choice(sources))
        places = [mutate(model, rng) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
        try:
            outcomes[_try(model.SerializeToString(), folder)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}: {places}")
            raise
    return outcomes


def _sources(folder: Path) -> list[onnx.ModelProto]:
    external = external_model(folder, data=weight().tobytes())
    return [small_model(), onnx.load(external, load_external_data=False)]


def test_mutated_fields(tmp_path: Path) -> None:
    outcomes = _mutations(_sources(tmp_path), 1000, tmp_path)
    assert outcomes["valid"] > 100, outcomes
    assert len(outcomes) > 12, outcomes  # many kinds of damage, many codes


@pytest.mark.slow
def test_many_mutated_fields(tmp_path: Path) -> None:
    sources = _sources(tmp_path)
    for path in sorted((shared_folder() / "models").glob("odd/**/*.onnx")):
        if path.stat().st_size < 2_000_000:
            sources.append(onnx.load(path))
    count = int(os.environ.get("ONNXQ_MUTATIONS", "5000"))
    outcomes = _mutations(sources, count, tmp_path)
    print(dict(outcomes))
    assert sum(outcomes.values()) == count


def test_flipped_bytes(tmp_path: Path) -> None:
    whole = small_model().SerializeToString()
    outcomes: Counter[str] = Counter()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        outcomes[_try(bytes(content), tmp_path)] += 1
    assert sum(outcomes.values()) == len(whole)
    assert outcomes["DATA-CORRUPT"] > 10, outcomes


def test_random_bytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(300):
        content = rng.randbytes(rng.randrange(1, 200))
        assert _try(content, tmp_path) != "valid"
