"""How far codes flow from convolutions, and what clamps promise about a range."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.graph.match import analyze
from onnxq.passes.decide.integer_regions import find_integer_ops, known_bounds

from .. import helpers as h

WEIGHTS = {"w": h.normal(3, 3, 1, 1), "four": np.array(4, np.float32), "one": np.array([1.0], "f")}


def regions(body: str, outputs: str = "float[A, B, C, D] y") -> dict[str, tuple[str, bool]]:
    """Name of each operator -> the value that holds its codes, and whether codes are kept."""
    model = h.model_of(f"g (float[1, 3, 8, 8] x) => ({outputs}) {{ {body} }}", WEIGHTS)
    return {
        op.name: (str(op.output.name), op.keeps_codes) for op in find_integer_ops(analyze(model))
    }


def test_codes_flow_on_through_what_runs_on_them() -> None:
    found = regions(
        """a = Conv(x, w) ar = Relu(a)
        b = Conv(ar, w)
        c = Concat <axis = 1> (ar, b)
        m = MaxPool <kernel_shape = [2, 2]> (c)
        v = AveragePool <kernel_shape = [2, 2]> (m)
        t = Transpose <perm = [0, 2, 3, 1]> (v)
        y = Add(t, t)"""
    )
    assert found == {
        "c": ("c", False),
        "m": ("m", True),
        "v": ("v", False),
        "t": ("t", True),
        "y": ("y", False),
    }


@pytest.mark.parametrize(
    "body",
    [
        "a = Conv(x, w) y = Add(a, x)",  # one input is float
        "a = Conv(x, w) y = Add(a, one)",  # a constant has no codes
        "a = Conv(x, w) s = Sigmoid(a) y = MaxPool <kernel_shape = [2, 2]> (s)",
        "y = MaxPool <kernel_shape = [2, 2]> (x)",  # no convolution at all
    ],
)
def test_codes_stop_where_one_input_is_float(body: str) -> None:
    assert regions(body) == {}


def test_the_second_output_of_a_pooling_has_no_codes() -> None:
    body = "a = Conv(x, w) y, i = MaxPool <kernel_shape = [2, 2]> (a)"
    assert regions(body, "float[A, B, C, D] y, int64[A, B, C, D] i") == {}


def test_a_relu_that_is_not_the_only_reader_stays() -> None:
    found = regions(
        "a = Conv(x, w) b = Add(a, a) y = Relu(b) z = Neg(b)",
        "float[A, B, C, D] y, float[A, B, C, D] z",
    )
    assert found == {"b": ("b", False)}


def test_operators_of_one_name_are_kept_apart() -> None:
    model = h.model_of(
        "g (float[1, 3, 8, 8] x) => (float[A, B, C, D] y) {"
        "a = Conv(x, w) b = Add(a, a) y = Add(b, a) }",
        WEIGHTS,
    )
    for node in list(model.graph)[1:]:
        node.name = "add"
    assert [op.name for op in find_integer_ops(analyze(model))] == ["b", "y"]


def bounds(body: str, opset: int = 13) -> tuple[float, float]:
    model = h.model_of(f"g (float[4] x) => (float[4] y) {{ {body} }}", WEIGHTS, opset=opset)
    return known_bounds(model.graph.outputs[0])


def test_clamps_promise_a_range() -> None:
    assert bounds("y = Relu(x)") == (0.0, math.inf)
    assert bounds("y = Sigmoid(x)") == (0.0, 1.0)
    assert bounds("y = Clip(x, , four)") == (-math.inf, 4.0)
    assert bounds("y = Clip(x, four)") == (4.0, math.inf)
    assert bounds("y = Clip <min = -1.0, max = 2.0> (x)", opset=6) == (-1.0, 2.0)
    assert bounds("y = Neg(x)") == (-math.inf, math.inf)
    assert known_bounds(ir.Value(name="input")) == (-math.inf, math.inf)
    assert known_bounds(None) == (-math.inf, math.inf)
