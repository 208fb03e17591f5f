"""Damaged models through a whole run: an error with a code, or a valid output; nothing else."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

import onnxq
from onnxq.errors import InternalError, OnnxqError
from tests.graph.mutate import mutate

from .models import Case, corpus
from .test_corpus import RECIPES, session

LARGEST = 200_000
"""Bytes of the models that are damaged; larger ones only take longer."""


def damaged(cases: list[Case], rng: random.Random) -> tuple[onnx.ModelProto, str]:
    """A case with one or two changes, and what they are."""
    case = rng.choice(cases)
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    places = [mutate(model, rng) for _ in range(rng.choice([1, 1, 2]))]
    return model, f"{case.name}: {', '.join(places)}"


def outcome(model: onnx.ModelProto, recipe: str, folder: Path) -> str:
    """``ok``, or the code of the error that the run ended with."""
    content = model.SerializeToString()
    (folder / "m.onnx").write_bytes(content)
    out = folder / "q.onnx"
    out.unlink(missing_ok=True)
    refusal: OnnxqError | None = None
    try:
        onnxq.run(folder / "m.onnx", recipe, calib="random", out=out, allow_noop=True)
    except InternalError:
        raise
    except OnnxqError as error:
        refusal = error
    if refusal is not None:
        assert refusal.cause
        assert not out.exists(), f"{refusal.code}, and an output"
        return refusal.code
    session(content)  # an output of a model that is none would be worse than an error
    session(out.read_bytes())
    return "ok"


def sweep(count: int, folder: Path) -> Counter[str]:
    ort.set_default_logger_severity(4)
    cases = [case for case in corpus() if case.model.ByteSize() <= LARGEST]
    tally: Counter[str] = Counter()
    for seed in range(count):
        rng = random.Random(seed)
        model, what = damaged(cases, rng)
        try:
            tally[outcome(model, rng.choice(RECIPES), folder)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}: {what}")
            raise
    print(dict(tally))
    return tally


def test_damaged_models(tmp_path: Path) -> None:
    tally = sweep(16, tmp_path)
    assert tally["ok"] > 1
    assert len(tally) > 2, tally


@pytest.mark.slow
def test_many_damaged_models(tmp_path: Path) -> None:
    count = int(os.environ.get("ONNXQ_MUTATIONS", "2000"))
    assert sum(sweep(count, tmp_path).values()) == count
