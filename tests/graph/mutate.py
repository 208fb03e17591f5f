"""Damage to a parsed model: fields dropped, repeated, swapped, and set to odd values."""

from __future__ import annotations

import random
from typing import Any

import onnx

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


def mutate(model: onnx.ModelProto, rng: random.Random) -> str:
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
