"""Models that anyone has who has the onnx package: its backend tests.

About 1,740 one-node cases of 200 operator types, which the package makes in memory, and 149 models
in its data folder, some of them exported by PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

FOLDERS = ("light", "simple", "pytorch-converted", "pytorch-operator")


@dataclass(frozen=True)
class Case:
    """A model and its inputs; None for the inputs when the package has none in arrays."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, np.ndarray] | None


@cache
def corpus() -> tuple[Case, ...]:
    """All cases, in a fixed order."""
    return (*_node_cases(), *_stored_cases())


def _node_cases() -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the expected results divide by zero on purpose
        cases = collect_testcases(None)
    for case in cases:
        if case.model is not None:
            yield Case(case.name, case.model, _feeds(case.model, list(case.data_sets[0][0])))


def _stored_cases() -> Iterator[Case]:
    root = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for folder in FOLDERS:
        for entry in sorted((root / folder).iterdir()):
            file = entry if entry.suffix == ".onnx" else entry / "model.onnx"
            if file.exists():
                model = onnx.load(str(file))
                yield Case(f"{folder}/{entry.name}", model, _feeds(model, _stored_inputs(entry)))


def _stored_inputs(case: Path) -> list[Any]:
    arrays: list[Any] = []
    for file in sorted(case.glob("test_data_set_0/input_*.pb")):
        tensor = onnx.TensorProto.FromString(file.read_bytes())
        try:
            arrays.append(numpy_helper.to_array(tensor))
        except TypeError:  # a sequence, which has a message type of its own
            arrays.append(None)
    return arrays


def _feeds(model: onnx.ModelProto, values: list[Any]) -> dict[str, np.ndarray] | None:
    """The inputs by name; None unless each is an array."""
    constants = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in constants]
    if len(values) != len(names) or not all(isinstance(v, np.ndarray) for v in values):
        return None
    return dict(zip(names, values, strict=True))
