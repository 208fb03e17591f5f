"""The test vectors: up to date, and what bodies and kernels give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxq.custom_ops.integer_vectors import vectors
from onnxq.runtime import session
from tests.custom_ops.cases import Case, model_of
from tests.custom_ops.integer_cases import INTEGER_CASES

FILE = Path(__file__).parents[2] / "docs" / "integer_vectors.json"
STORED: dict[str, Any] = json.loads(FILE.read_text("utf-8"))


def array(tensor: dict[str, Any]) -> np.ndarray:
    return np.array(tensor["data"], tensor["type"]).reshape(tensor["shape"])


def test_the_file_is_what_the_generator_writes() -> None:
    assert vectors() == STORED


def test_every_operator_has_cases() -> None:
    assert set(STORED["operators"]) == set(INTEGER_CASES)


@pytest.mark.parametrize("name", sorted(STORED["operators"]))
def test_bodies_and_kernels_give_the_vectors(name: str) -> None:
    for stored in STORED["operators"][name]["cases"]:
        inputs = {key: array(tensor) for key, tensor in stored["inputs"].items()}
        case = Case("vector", inputs, {}, stored["attributes"])
        source = model_of(name, case)
        (tensor,) = stored["outputs"].values()
        expected = array(tensor)
        (evaluated,) = ReferenceEvaluator(onnx.load_from_string(source)).run(None, inputs)
        assert (evaluated == expected).all()
        for library in (False, True):
            (got,) = session(source, threads=1, library=library).run(None, inputs)
            assert got.dtype == expected.dtype
            assert (got == expected).all()
