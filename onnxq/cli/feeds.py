"""Inputs for a benchmark without data: random, of given or default shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxq.errors import SpecError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

Feeds = Mapping[str, "np.ndarray[Any, Any]"]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(bool)": "bool",
}


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``input=1x128`` for each input.

    Raises:
        SpecError: a text has another form.
    """
    found = {}
    for text in texts:
        name, separator, dims = text.rpartition("=")
        parts = dims.replace(",", "x").split("x")
        if not separator or not all(part.isdigit() for part in parts):
            raise SpecError(
                "SPEC-SHAPE", f"`--shape {text}` is not a shape", "write --shape input_ids=1x128"
            )
        found[name] = tuple(int(part) for part in parts)
    return found


def random_feeds(
    session: Any, shapes: Mapping[str, tuple[int, ...]], *, batch: int, length: int, seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs for ``session``: normal floats; ones for integers, which are valid as ids and masks.

    Open dimensions become ``batch`` (the first) and ``length`` (the others).

    Raises:
        SpecError: ``shapes`` names no input of the model, or has another rank.
        UnsupportedError: an input is no tensor of numbers.
    """
    import numpy as np

    arguments = session.get_inputs()
    names = [a.name for a in arguments]
    for name in shapes:
        if name not in names:
            raise SpecError(
                "SPEC-SHAPE", f"the model has no input `{name}`", f"inputs: {', '.join(names)}"
            )
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray[Any, Any]] = {}
    for argument in arguments:
        if argument.type not in _DTYPES:
            raise UnsupportedError(
                "UNSUPPORTED-INPUT",
                f"input `{argument.name}` is a {argument.type}; random data cannot fill it",
                "measure with --calib on real samples",
            )
        dtype = _DTYPES[argument.type]
        declared = list(argument.shape or [])
        shape = shapes.get(argument.name) or tuple(
            d if isinstance(d, int) else (batch if i == 0 else length)
            for i, d in enumerate(declared)
        )
        is_float = np.dtype(dtype).kind == "f"
        data = rng.standard_normal(shape) if is_float else np.ones(shape)
        feeds[argument.name] = data.astype(dtype)
    return feeds


def describe(feeds: Feeds) -> str:
    """The shapes in one line; equal shapes are said once."""
    shapes = dict.fromkeys(" x ".join(str(d) for d in a.shape) or "scalar" for a in feeds.values())
    return ", ".join(shapes)
