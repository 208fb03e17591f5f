"""The proof that a model is integer-only: what it finds, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxq.cli.app import app
from onnxq.custom_ops.integer_check import check_integer_only
from onnxq.errors import PreconditionError
from tests.custom_ops.cases import CASES, model_of


def model(body: str, **weights: np.ndarray) -> ir.Model:
    head = '<ir_version: 10, opset_import: ["" : 21, "com.onnxq" : 1]>\n'
    proto = onnx.parser.parse_model(head + body)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


PRODUCT = "g (uint8[M,K] x) => (int32[M,N] y) { y = MatMulInteger (x, w) }"


def test_the_bound_of_a_product_is_reached_and_never_passed() -> None:
    """The worst inputs give exactly the interval."""
    w = np.random.default_rng(0).integers(-127, 128, size=(40, 7)).astype(np.int8)
    (row,) = check_integer_only(model(PRODUCT, w=w)).rows
    most = (np.where(w > 0, 255, 0) * w.astype(int)).sum(axis=0)
    least = (np.where(w < 0, 255, 0) * w.astype(int)).sum(axis=0)
    assert (row.lo, row.hi) == (least.min(), most.max())
    assert row.accumulator == max(-least.min(), most.max())


def test_a_sum_that_can_overflow_is_refused() -> None:
    w = np.full((66_400, 1), 127, np.int8)
    with pytest.raises(PreconditionError, match="MatMulInteger") as caught:
        check_integer_only(model(PRODUCT, w=w))
    assert caught.value.code == "CHECK-INTEGER-OVERFLOW"
    report = check_integer_only(model(PRODUCT, w=w[:66_300]))
    assert report.worst is not None
    assert report.worst.accumulator == 66_300 * 127 * 255


def test_a_bias_that_can_overflow_is_refused() -> None:
    body = """g (int32[M,3] x) => (int8[M,3] y) {
        y = com.onnxq.Requantize <low = -128, high = 127> (x, b, m, s, z)
    }"""
    factors = {"m": np.array([1 << 30], np.int32), "s": np.array([40], np.int32)}
    constants = {"b": np.array([1, 0, 0], np.int32), "z": np.array(0, np.int8)}
    with pytest.raises(PreconditionError) as caught:
        check_integer_only(model(body, **factors, **constants))
    assert caught.value.code == "CHECK-INTEGER-OVERFLOW"


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        (
            "g (int8[M] x) => (int8[M] y) { f = Cast <to = 1> (x)\n y = Cast <to = 3> (f) }",
            "CHECK-INTEGER-FLOAT",
            "Cast",
        ),
        (
            "g (uint8[M] x) => (float[M] y) { d = DequantizeLinear (x, t)\n y = Neg (d) }",
            "CHECK-INTEGER-FLOAT",
            "DequantizeLinear",
        ),
        ("g (float[M] x) => (float[M] y) { y = Relu (x) }", "CHECK-INTEGER-FLOAT", "Relu"),
        ("g (int32[M] x) => (int32[M] y) { y = Abs (x) }", "CHECK-INTEGER-OPERATOR", "Abs"),
        ("g (int32[M] x) => (int32[M] y) { y = Add (x, x) }", "CHECK-INTEGER-OVERFLOW", "Add"),
        ("g (int16[M] x) => (int16[M] y) { y = Mul (x, x) }", "CHECK-INTEGER-OVERFLOW", "int16"),
        ("g (uint8[M] x) => (uint8[M] y) { y = Sub (x, x) }", "CHECK-INTEGER-OVERFLOW", "uint8"),
        ("g (int64[M] x) => (int64[M] y) { y = Identity (x) }", "CHECK-INTEGER-OPERATOR", "no"),
        (
            "g (uint8[B,M,K] x, int8[B,K,N] z) => (int32[B,M,N] y) { y = MatMulInteger (x, z) }",
            "CHECK-INTEGER-EXTENT",
            "dynamic axis",
        ),
    ],
)
def test_refusals(body: str, code: str, named: str) -> None:
    with pytest.raises(PreconditionError, match=named) as caught:
        check_integer_only(model(body, t=np.array(0.5, np.float32)))
    assert caught.value.code == code


def test_a_dynamic_extent_is_bounded_by_the_given_one() -> None:
    body = "g (uint8[B,M,K] x, int8[B,K,N] z) => (int32[B,M,N] y) { y = MatMulInteger (x, z) }"
    (row,) = check_integer_only(model(body), max_extent=512).rows
    assert row.accumulator == 512 * 255 * 128


_KINDS = {"IntegerEmbedding": "int64", "IntegerErf": "int32", "IntegerExp": "int32"}


@pytest.mark.parametrize("name", ["IntegerLayerNorm", "IntegerRmsNorm", *_KINDS])
def test_every_result_lies_within_the_interval(name: str) -> None:
    for case in list(CASES[name](_KINDS.get(name, "int16")))[:6]:
        made = ir.from_proto(onnx.load_from_string(model_of(name, case)))
        (row,) = check_integer_only(made).rows
        (y,) = case.reference(name)
        assert y.size == 0 or (row.lo <= y.min() and y.max() <= row.hi)


def _function(name: str, **changes: int) -> ir.Model:
    """A model of one operator with a polynomial, with other constants."""
    kind = {"IntegerGelu": "uint8", "IntegerSilu": "uint8"}.get(name, "int32")
    case = next(iter(CASES[name](kind)))
    made = ir.from_proto(onnx.load_from_string(model_of(name, case)))
    (node,) = made.graph
    for attribute, value in changes.items():
        node.attributes[attribute] = ir.AttrInt64(attribute, value)
    return made


@pytest.mark.parametrize("name", ["IntegerExp", "IntegerErf", "IntegerSoftmax", "IntegerSilu"])
def test_a_polynomial_that_leaves_int32_is_refused(name: str) -> None:
    with pytest.raises(PreconditionError, match="polynomial") as caught:
        check_integer_only(_function(name, p2=30_000, p0=2**31 - 1))
    assert caught.value.code == "CHECK-INTEGER-OVERFLOW"


def test_gelu_whose_product_leaves_int32_is_refused() -> None:
    with pytest.raises(PreconditionError, match="product with erf") as caught:
        check_integer_only(_function("IntegerGelu", one=60_000))
    assert caught.value.code == "CHECK-INTEGER-OVERFLOW"


def test_the_interval_of_a_function_is_that_of_its_constants() -> None:
    """With other constants it yields other numbers."""
    made = _function("IntegerErf", erf_shift=0)
    (row,) = check_integer_only(made).rows
    (node,) = made.graph
    assert row.hi == -node.attributes["p0"].as_int() == -row.lo


@pytest.mark.parametrize(("attribute", "value"), [("ln2", 0), ("shift", 70), ("s1", 32)])
def test_attributes_out_of_range_are_refused(attribute: str, value: int) -> None:
    with pytest.raises(PreconditionError, match=f"{attribute} = {value}") as caught:
        check_integer_only(_function("IntegerExp", **{attribute: value}))
    assert caught.value.code == "CHECK-INTEGER-OPERATOR"


def test_missing_attributes_are_refused() -> None:
    made = _function("IntegerSoftmax")
    (node,) = made.graph
    node.attributes.pop("p1")
    with pytest.raises(PreconditionError, match="p1 is missing"):
        check_integer_only(made)


def test_the_command_line_proves_and_refuses(tmp_path: object) -> None:
    w = np.ones((4, 2), np.int8)
    good, bad = f"{tmp_path}/good.onnx", f"{tmp_path}/bad.onnx"
    onnx.save(ir.to_proto(model(PRODUCT, w=w)), good)
    onnx.save(ir.to_proto(model("g (float[M] x) => (float[M] y) { y = Relu (x) }")), bad)
    proved = CliRunner().invoke(app, ["inspect", good, "--integer-only", "--json"])
    assert proved.exit_code == 0, proved.output
    assert '"accumulator": 1020' in proved.output
    assert CliRunner().invoke(app, ["inspect", bad, "--integer-only"]).exit_code == 6
    assert CliRunner().invoke(app, ["inspect", good, "--max-extent", "4"]).exit_code == 2
