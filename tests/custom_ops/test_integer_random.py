"""Integer-only operators on random inputs: bodies, and kernels of every instruction set.

The sanitizer test runs the same inputs through the kernels with guarded memory.
"""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.runtime import Library, session
from tests.custom_ops.cases import Case, agrees, model_of
from tests.custom_ops.integer_cases import INTEGER_CASES
from tests.custom_ops.integer_random import random_integer_case

ROUNDS = 4
KINDS = ("int8", "uint8", "int16")


def cases(op: str) -> list[Case]:
    """A few of every type of output."""
    seed = sum(map(ord, op))
    rng = np.random.default_rng(seed)
    return [Case(*random_integer_case(op, KINDS[i % 3], rng)) for i in range(ROUNDS)]


@pytest.mark.parametrize("op", INTEGER_CASES)
def test_bodies(op: str) -> None:
    for case in cases(op):
        got = session(model_of(op, case), threads=1, library=False).run(None, case.inputs)
        assert agrees(op, case, got, kernel=False), case.name


@pytest.mark.parametrize("op", INTEGER_CASES)
def test_kernels(op: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in cases(op):
        for isa in library.isa_levels:
            monkeypatch.setenv("ONNXQ_ISA", isa)
            made = session(model_of(op, case), threads=2, library=library.path)
            assert agrees(op, case, made.run(None, case.inputs), kernel=True), (case.name, isa)
