"""Damaged models: an error with a code or a model that can be saved, never a traceback."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxq.errors import DataError, UnsupportedError
from onnxq.graph import io
from tests.graph.io_helpers import external_model, shared_folder, small_model, weight

INTEGERS = [0, 1, -1, 2, 5, 16, 77, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 62, -(1 << 63)]
WORDS = ["", "x", "w", "h", "y", "If", "ai.onnx", "com.microsoft", "a" * 300, "é", "../x", "\0"]


def _messages(message: Any) -> list[Any]:
    """The message and all messages in it, set ones only."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                found += _messages(part)
    return found


def _mutate(model: onnx.ModelProto, rng: random.Random) -> str:
    """Change one field somewhere in the model; says which."""
    message = rng.choice(_messages(model))
    field = rng.choice(list(message.DESCRIPTOR.fields))
    where = f"{message.DESCRIPTOR.name}.{field.name}"
    if field.is_repeated:
        values = getattr(message, field.name)
        action = rng.choice(["drop", "repeat", "swap", "add"])
        if action == "drop" and values:
            del values[rng.randrange(len(values))]
        elif action == "repeat" and values:
            values.append(values[0])
        elif action == "swap" and len(values) > 1 and field.type != field.TYPE_MESSAGE:
            values[0], values[-1] = values[-1], values[0]
        elif field.type == field.TYPE_MESSAGE:
            values.add()
        else:
            values.append(_scalar(field, rng))
    elif field.type == field.TYPE_MESSAGE:
        if rng.random() < 0.5:
            message.ClearField(field.name)
        else:
            getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _scalar(field, rng))
    return where


def _scalar(field: Any, rng: random.Random) -> Any:
    if field.type == field.TYPE_STRING:
        return rng.choice(WORDS)
    if field.type == field.TYPE_BYTES:
        return rng.choice([b"", b"x", b"\xff\xfe", bytes(48)])
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice([0.0, -1.0, float("inf"), float("nan"), 3.5])
    if field.type == field.TYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    low = 0 if field.type in (field.TYPE_UINT64, field.TYPE_UINT32) else -(1 << 63)
    top = (1 << 31) - 1 if field.type in (field.TYPE_INT32, field.TYPE_UINT32) else 1 << 63
    low = max(low, -top - 1)
    return rng.choice([value for value in INTEGERS if low <= value <= top])


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
        places = [_mutate(model, rng) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
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
