"""Every recipe on every model of the corpus: a result that runs, or a refusal with a code.

A result is bad when onnxruntime loads the input and not the output, when an output changes its
shape or type, loses or gains infinities and NaN, or is far from what it was. The expected outputs
are onnxruntime's, on the model as it came.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.calibration.data import open_data
from onnxq.errors import InternalError, OnnxqError
from onnxq.pipeline.recipes import find
from onnxq.pipeline.runner import Pipeline
from onnxq.runtime.metrics import leaves, relative_error

from .models import Case, corpus

RECIPES = ("canonicalize", "w8a8", "w8a8-dynamic", "w4", "w8a8-llm")
FAR = 0.3
"""Largest relative error of an output: one operator on a few random numbers, quantized."""

UNFIT = ("CALIB-NAN", "CALIB-INPUT-TYPE")
"""Refusals of inputs that a case has on purpose: NaN, or a type that no sample can have."""

STEP = 120
"""The default run takes one case in so many."""


def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def before(case: Case) -> list[Any] | None:
    """What onnxruntime makes of the model as it is; None where it cannot run it."""
    try:
        return list(session(case.model.SerializeToString()).run(None, case.feeds or {}))
    except Exception:
        return None


def transformed(case: Case, recipe: str) -> bytes:
    passes = recipe if recipe == "canonicalize" else find(recipe).passes
    model = ir.from_proto(case.model)
    data = open_data("random" if case.feeds is None else [case.feeds] * 2, model)
    result = Pipeline(passes).run(model, data=data, holdout=data)
    return ir.to_proto(result.model).SerializeToString()


def fault(expected: list[Any], found: list[Any]) -> str | None:
    """What is wrong with the outputs ``found``."""
    for index, (old, new) in enumerate(zip(expected, found, strict=True)):
        ours, theirs = dict(leaves(old)), dict(leaves(new))
        if ours.keys() != theirs.keys():
            return f"output {index} has another structure"
        for place, array in ours.items():
            other = theirs[place]
            if (array.shape, array.dtype) != (other.shape, other.dtype):
                return f"output {index} is {other.dtype}{list(other.shape)}"
            error = relative_error(array, other)
            if not error <= FAR:
                return f"output {index} is {error:.2g} away"
    return None


def outcome(case: Case, recipe: str, expected: list[Any] | None) -> str:
    """``ok``, the code of a refusal, or what is bad."""
    try:
        model = transformed(case, recipe)
    except InternalError as error:
        return f"BAD {error.code}"
    except OnnxqError as error:
        refused = expected is None or error.code in UNFIT
        return error.code if refused else f"BAD refused: {error.code}"
    if expected is None:
        return "ok, not compared"
    wrong = fault(expected, list(session(model).run(None, case.feeds or {})))
    return "ok" if wrong is None else f"BAD {wrong}"


def sweep(cases: list[Case], recipe: str) -> Counter[str]:
    tally: Counter[str] = Counter()
    bad = []
    for case in cases:
        found = outcome(case, recipe, before(case))
        tally[found] += 1
        if found.startswith("BAD"):
            bad.append(f"{case.name}: {found}")
    print(recipe, dict(tally))
    assert not bad, "\n".join(bad)
    return tally


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_part_of_the_corpus(recipe: str) -> None:
    tally = sweep(list(corpus()[7::STEP]), recipe)
    assert tally["ok"] > len(corpus()) // STEP // 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_whole_corpus(recipe: str) -> None:
    tally = sweep(list(corpus()), recipe)
    assert tally["ok"] > 1300
