"""Hadamard against scipy's matrices and the solver's own transform, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from scipy.linalg import hadamard as sylvester

from onnxq import custom_ops
from onnxq.errors import DataError
from onnxq.runtime import Library, session
from onnxq.solvers.hadamard import hadamard_matrix, transform
from tests.custom_ops.cases import Array, Case, model_of

RNG = np.random.default_rng(8)
OP = "Hadamard"
SAME = 1e-6
"""Relative to the largest result: sums of float32 in another order."""


def case_of(k: int, block: int, c: int, m: int = 3) -> Case:
    x = RNG.normal(size=(m, k)).astype(np.float32)
    core = {"core": hadamard_matrix(c).astype(np.float32)}
    return Case("one", {"x": x}, core, {"block": block, "scale": float(1 / np.sqrt(block))})


def rotated(case: Case) -> Array:
    result: Array = session(model_of(OP, case), threads=1, library=True).run(None, case.inputs)[0]
    return result


@pytest.mark.parametrize("k", [1, 2, 8, 16, 512, 4096])
def test_agrees_with_scipys_matrix(k: int, library: Library) -> None:
    case = case_of(k, k, 1)
    expected = case.inputs["x"].astype(np.float64) @ sylvester(k) / np.sqrt(k)
    assert np.abs(rotated(case) - expected).max() <= SAME * np.abs(expected).max()


@pytest.mark.parametrize(("k", "block", "c"), [(96, 96, 12), (1120, 560, 140), (8960, 8960, 140)])
def test_agrees_with_the_transform_that_folds_weights(
    k: int, block: int, c: int, library: Library
) -> None:
    case = case_of(k, block, c)
    expected = transform(case.inputs["x"].astype(np.float64), block)
    assert np.abs(rotated(case) - expected).max() <= SAME * np.abs(expected).max()


def test_twice_is_the_identity_for_powers_of_two(library: Library) -> None:
    case = case_of(256, 64, 1)
    again = Case("again", {"x": rotated(case)}, case.constants, case.attributes)
    assert np.abs(rotated(again) - case.inputs["x"]).max() <= 4 * SAME


@pytest.mark.parametrize(
    ("k", "attributes", "core", "message"),
    [
        (96, {"block": 64}, 1, "no multiple of block = 64"),
        (96, {"block": 48}, 1, "block = 48 is not the core's order 1 times a power of two"),
        (96, {"block": 32}, 12, "block = 32 is not the core's order 12"),
    ],
)
def test_wrong_widths_are_refused(
    k: int, attributes: dict[str, float], core: int, message: str, library: Library
) -> None:
    model = onnx.load_from_string(model_of(OP, case_of(96, 96, 12)))
    for attribute in model.graph.node[0].attribute:
        if attribute.name in attributes:
            attribute.i = int(attributes[attribute.name])
    matrix = hadamard_matrix(core).astype(np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(matrix, "core"))
    made = session(model.SerializeToString(), threads=1, library=library.path)
    with pytest.raises(Exception, match=r"com\.onnxq:Hadamard: .*" + message):
        made.run(None, {"x": np.zeros((2, k), np.float32)})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("block", 0, "block must be at least 1"), ("scale", float("inf"), "scale is not finite")],
)
def test_wrong_attributes_are_refused(
    name: str, value: float, message: str, library: Library
) -> None:
    model = onnx.load_from_string(model_of(OP, case_of(96, 96, 12)))
    for attribute in model.graph.node[0].attribute:
        if attribute.name == name:
            attribute.CopyFrom(onnx.helper.make_attribute(name, value))
    with pytest.raises(DataError, match="com.onnxq:Hadamard: .*" + message):
        session(model.SerializeToString(), threads=1, library=library.path)


def test_quantizing_on_the_way_gives_the_codes_of_both_operators(library: Library) -> None:
    """One node is Hadamard and DynamicQuantizePerToken behind each other, to the bit."""
    case = case_of(1536, 768, 12, m=9)
    (y,) = session(model_of(OP, case), threads=1, library=True).run(None, case.inputs)
    token = Case("token", {"x": y})
    q, scale = session(model_of("DynamicQuantizePerToken", token), library=True).run(None, {"x": y})
    both = Case("both", case.inputs, case.constants, {**case.attributes, "group": 1536})
    fused = session(model_of("HadamardQuantize", both), threads=1, library=True)
    got = fused.run(None, both.inputs)
    np.testing.assert_array_equal(got[0], q)
    np.testing.assert_array_equal(got[1], scale)


def test_groups_below_one_are_refused(library: Library) -> None:
    case = case_of(96, 96, 12)
    both = Case("both", case.inputs, case.constants, {**case.attributes, "group": 4})
    model = onnx.load_from_string(model_of("HadamardQuantize", both))
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "group":
            attribute.i = 0
    with pytest.raises(DataError, match=r"com\.onnxq:HadamardQuantize: group must be at least 1"):
        session(model.SerializeToString(), threads=1, library=library.path)


def test_extents_that_are_not_known_stay_unknown_behind_the_kernel(library: Library) -> None:
    """Behind shapes that only the run knows, a Shape node must not read -1 as a number."""
    body = """g (float[N, S, 8] x, int64[3] sizes) => (float[A, B, C, D] y) {
      one = Constant <value_floats = [1.0]> ()
      square = Constant <value_ints = [1, 1]> ()
      core = Reshape (one, square)
      r = Reshape (x, sizes)
      h = com.onnxq.Hadamard <block = 8, scale = 0.5> (r, core)
      head = Shape <end = -1> (h)
      parts = Constant <value_ints = [2, 4]> ()
      whole = Concat <axis = 0> (head, parts)
      y = Reshape (h, whole)
    }"""
    model = ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 21, "com.onnxq" : 1]>\n{body}'
        )
    )
    custom_ops.attach(model, "Hadamard")
    data = ir.to_proto(model).SerializeToString()
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    feeds = {"x": x, "sizes": np.array([3, 2, 8])}
    for with_kernels in (True, False):
        (y,) = session(data, library=with_kernels).run(None, feeds)
        assert y.shape == (3, 2, 2, 4)
        np.testing.assert_allclose(y.reshape(6, 8), x.reshape(6, 8) @ sylvester(8) / 2, atol=1e-5)
