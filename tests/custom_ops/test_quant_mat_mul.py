"""QuantMatMul against other people's products, what it refuses, and its packed layout."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.defs.dynamic_quantize_per_token import quantize_groups
from onnxq.custom_ops.defs.quant_mat_mul import NO_ORDER
from onnxq.custom_ops.layout import pack_codes, pack_groups, unpack_codes, unpack_groups
from onnxq.custom_ops.packed_weight import pack_table, pack_weight
from onnxq.errors import DataError, UnsupportedError
from onnxq.formats import Granularity, parse_format
from onnxq.runtime import Library, session
from tests.custom_ops.cases import (
    _WEIGHTS,
    Array,
    Case,
    model_of,
    quantized_weight,
    takes_int8,
)

RNG = np.random.default_rng(5)
OP = "QuantMatMul"
FLOAT_SUM = 1e-5
"""Relative to the largest result: two orders of summation of a few hundred floats."""
INT8_ROWS = 0.02
"""The same for INT8 activations, whose steps are 1/127 of a row's largest value."""


def product(case: Case, library: bool = True) -> Array:
    result: Array = session(model_of(OP, case), threads=1, library=library).run(None, case.inputs)[
        0
    ]
    return result


def case_of(kind: str, m: int, n: int, k: int, group: int, *, int8: int = 0) -> Case:
    rng = np.random.default_rng(9)
    packed = quantized_weight(kind, n, k, group, int8_activations=int8, rng=rng)
    x = rng.normal(size=(m, k)).astype(np.float32)
    return Case(kind, {"x": x}, packed.inputs, packed.attributes)


def mat_mul_nbits(
    inputs: list[str], tensors: dict[str, Array], *, k: int, n: int, bits: int, group: int
) -> bytes:
    """A model of ONNX Runtime's own product, ``x: [M, k]``."""
    node = onnx.helper.make_node(
        "MatMulNBits", inputs, ["y"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=group, accuracy_level=1,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node],
        "theirs",
        [onnx.helper.make_tensor_value_info("x", 1, ["M", k])],
        [onnx.helper.make_tensor_value_info("y", 1, ["M", n])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in (("", 21), ("com.microsoft", 1))]
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=opsets)
    return onnx.ModelProto.SerializeToString(model)


@pytest.mark.parametrize(
    ("bits", "group", "asymmetric"), [(4, 32, False), (4, 128, True), (8, 32, False)]
)
def test_agrees_with_onnxruntimes_mat_mul_nbits(
    bits: int, group: int, asymmetric: bool, library: Library
) -> None:
    """Their operator, their packing (as their documentation states it), the same numbers."""
    k, n, m = 256, 96, 5
    codes = RNG.integers(0, 1 << bits, size=(n, k)).astype(np.uint8)
    scale = RNG.uniform(0.01, 0.02, size=(n, k // group)).astype(np.float32)
    middle = 1 << (bits - 1)
    zero = np.full(scale.shape, middle, np.uint8)
    if asymmetric:
        zero = RNG.integers(0, 1 << bits, size=scale.shape).astype(np.uint8)
    x = RNG.normal(size=(m, k)).astype(np.float32)
    blocks = codes.reshape(n, k // group, group)
    pairs = zero.reshape(n, -1)
    if bits == 4:
        blocks = blocks[..., ::2] | blocks[..., 1::2] << 4
        pairs = zero[:, ::2] | zero[:, 1::2] << 4
    tensors = {"b": blocks, "s": scale, "z": pairs}
    model = mat_mul_nbits(["x", "b", "s", "z"], tensors, k=k, n=n, bits=bits, group=group)
    theirs = session(model, threads=1, library=False).run(None, {"x": x})[0]
    constants = {
        "codes": pack_codes(codes, bits),
        "scales": pack_groups(scale),
        "zero_points": pack_groups((zero.astype(np.int16) - middle).astype(np.int8)),
        "levels": np.arange(-middle, middle, dtype=np.float32),
        "bias": np.zeros(1, np.float32),
        "order": NO_ORDER,
    }
    for int8, tolerance in ((0, FLOAT_SUM), (1, INT8_ROWS), (2, INT8_ROWS)):
        attributes = {
            "K": k, "N": n, "group": group, "bits": bits, "int8_activations": int8,
            "exponent_scales": 0, "factor": 1.0, "layout": 1,
        }  # fmt: skip
        ours = product(Case("ours", {"x": x}, constants, attributes))
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("kind", _WEIGHTS)
def test_weights_are_those_of_the_format(kind: str, library: Library) -> None:
    """The product with the unit matrix is the format's own decoding, to the last bit."""
    fmt = parse_format({"fp8": "fp8e4m3"}.get(kind, kind))
    w = RNG.normal(size=(40, 64)).astype(np.float32)
    granularity = None if fmt.fixed_block else Granularity.block(1, 32)
    params = fmt.params(w, granularity, axis=1)
    codes = fmt.encode(w, params)
    packed = pack_weight(fmt, codes, params, int8_activations=False, scale_type="float32")
    unit = np.eye(64, dtype=np.float32)
    got = product(Case(kind, {"x": unit}, packed.inputs, packed.attributes))
    assert np.array_equal(got, fmt.decode(codes, params).T)


@pytest.mark.parametrize("kind", [kind for kind in _WEIGHTS if takes_int8(kind)])
def test_int8_activations_cost_little(kind: str, library: Library) -> None:
    exact = product(case_of(kind, 4, 64, 512, 32))
    rounded = product(case_of(kind, 4, 64, 512, 32, int8=True))
    assert 0 < np.abs(rounded - exact).max() <= INT8_ROWS * np.abs(exact).max()


def test_order_is_the_group_index_of_mat_mul_nbits(library: Library) -> None:
    """ONNX Runtime gives each column the index of its group; here columns of a group are beside
    one another."""
    m, n, k, group = 5, 48, 256, 32
    codes = RNG.integers(0, 16, size=(n, k)).astype(np.uint8)
    scale = RNG.lognormal(-3, 1, size=(n, k // group)).astype(np.float32)
    group_of = RNG.permutation(np.repeat(np.arange(k // group), group)).astype(np.int32)
    x = RNG.normal(size=(m, k)).astype(np.float32)
    blocks = codes.reshape(n, k // group, group)
    tensors = {"b": blocks[..., ::2] | blocks[..., 1::2] << 4, "s": scale, "g": group_of}
    theirs = session(
        mat_mul_nbits(["x", "b", "s", "", "g"], tensors, k=k, n=n, bits=4, group=group),
        threads=1,
        library=False,
    ).run(None, {"x": x})[0]
    order = np.argsort(group_of, kind="stable").astype(np.int32)
    packed = pack_table(
        codes[:, order], np.arange(-8, 8, dtype=np.float32), scale, group=group,
        scale_type="float32", int8_activations=0, order=order,
    )  # fmt: skip
    ours = product(Case("ours", {"x": x}, packed.inputs, packed.attributes))
    assert np.abs(ours - theirs).max() <= FLOAT_SUM * np.abs(theirs).max()


def test_scales_by_group_keep_quiet_groups(library: Library) -> None:
    """One loud column costs its own group's numbers; with a scale a row it costs them all."""
    w = RNG.normal(size=(64, 256)).astype(np.float32)
    x = RNG.normal(size=(8, 256)).astype(np.float32)
    x[:, 70] *= 100
    fmt = parse_format("int8")
    params = fmt.params(w, Granularity.block(1, 32))
    codes = fmt.encode(w, params)
    weight = fmt.decode(codes, params).astype(np.float64)
    groups = x.astype(np.float64).reshape(8, 8, 32)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / 127
    expected = (np.rint(groups / scale) * scale).reshape(x.shape) @ weight.T
    error = {}
    for int8 in (1, 2):
        packed = pack_weight(fmt, codes, params, int8_activations=int8, scale_type="float32")
        got = product(Case("", {"x": x}, packed.inputs, packed.attributes))
        error[int8] = np.abs(got - x @ weight.T).mean()
    assert np.abs(got - expected).max() <= FLOAT_SUM * np.abs(expected).max()
    assert error[2] < error[1] / 2


@pytest.mark.parametrize("int8", [1, 2])
def test_quantized_before_or_inside_is_the_same(int8: int, library: Library) -> None:
    case = case_of("int4", 9, 64, 160, 32, int8=int8)
    inside = product(case)
    size = 32 if int8 == 2 else 160
    q, scale = quantize_groups(case.inputs["x"], size)
    constants = {name: array for name, array in case.constants.items() if name != "order"}
    before = Case("", {"q": q, "q_scale": scale}, constants, case.attributes)
    model = model_of("QuantMatMulInt8", before)
    got = session(model, threads=1, library=True).run(None, before.inputs)[0]
    assert np.array_equal(got, inside)


@pytest.mark.parametrize(
    ("mode", "q", "q_scale", "message"),
    [
        (1, (9, 64), (9, 1), r"q has shape \[9, 64\]; its last extent must be 160"),
        (1, (9, 160), (9, 5), r"q_scale has shape \[9, 5\], not \[9, 1\]"),
        (2, (9, 160), (9, 1), r"q_scale has shape \[9, 1\], not \[9, 5\]"),
        (2, (9, 160), (8, 5), r"q_scale has shape \[8, 5\], not \[9, 5\]"),
    ],
)
def test_wrong_quantized_activations_are_refused(
    mode: int, q: tuple[int, ...], q_scale: tuple[int, ...], message: str, library: Library
) -> None:
    case = case_of("int4", 9, 64, 160, 32, int8=mode)
    groups = quantize_groups(case.inputs["x"], 32 if mode == 2 else 160)
    constants = {name: array for name, array in case.constants.items() if name != "order"}
    before = Case("", dict(zip(("q", "q_scale"), groups, strict=True)), constants, case.attributes)
    made = session(model_of("QuantMatMulInt8", before), threads=1, library=library.path)
    with pytest.raises(Exception, match=r"com\.onnxq:QuantMatMulInt8: " + message):
        made.run(None, {"q": np.zeros(q, np.int8), "q_scale": np.zeros(q_scale, np.float32)})


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 5), (32, 4), (33, 129), (0, 4)])
def test_layout_round_trip(bits: int, n: int, k: int) -> None:
    codes = RNG.integers(0, 1 << bits, size=(n, k)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (-(-n // 32), -(-k // 4), 16 * bits)
    assert np.array_equal(unpack_codes(packed, n, k), codes)
    values = RNG.normal(size=(n, k))
    assert np.array_equal(unpack_groups(pack_groups(values), n), values)


def test_layout_as_documented() -> None:
    """Column 17 at k = 6 of 4-bit codes: step 1, byte 4 * 1 + 2, the high nibble."""
    codes = np.zeros((32, 8), np.uint8)
    codes[17, 6] = 13
    packed = pack_codes(codes, 4)
    assert packed[0, 1, 6] == 13 << 4
    assert np.count_nonzero(packed) == 1


def test_planes_as_documented() -> None:
    """Column 17 at k = 6 of 3-bit codes: the low two bits in a plane of 32 bytes, the third behind.

    Plane of 2 bits: d = 8, byte 4 * (17 % 8) + 2 = 6, field 2. Plane of 1 bit: d = 4, byte
    4 * (17 % 4) + 2 = 6 of the plane, field 4.
    """
    codes = np.zeros((32, 8), np.uint8)
    codes[17, 6] = 0b110
    packed = pack_codes(codes, 3)
    assert packed.shape == (1, 2, 48)
    assert packed[0, 1, 6] == 0b10 << 4
    assert packed[0, 1, 32 + 6] == 1 << 4
    assert np.count_nonzero(packed) == 2


def test_float16_scales_may_be_tiny() -> None:
    fmt = parse_format("int8")
    w = RNG.normal(size=(8, 64)).astype(np.float32) * 1e-9
    params = fmt.params(w, Granularity.block(1, 32))
    packed = pack_weight(fmt, fmt.encode(w, params), params, int8_activations=False)
    stored = unpack_groups(packed.inputs["scales"], 8).astype(np.float64)
    assert np.allclose(stored * packed.attributes["factor"], params.scale, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 2}, "weights in layout 2; this library reads layout 1"),
        ({"bits": 5}, "codes of 5 bits"),
        ({"bits": 3}, r"codes has shape \[2, 32, 64\], not \[2, 32, 48\]"),
        ({"group": 8}, "groups of 8"),
        ({"group": 18}, "not a multiple of 4"),
        ({"group": 64}, r"scales has shape \[2, 4, 32\], not \[2, 2, 32\]"),
        ({"K": 124}, r"codes has shape \[2, 32, 64\], not \[2, 31, 64\]"),
        ({"N": 31}, r"codes has shape \[2, 32, 64\], not \[1, 32, 64\]"),
        ({"K": -1}, "K and N must be from 1 to 2"),
        ({"N": 2**62}, "K and N must be from 1 to 2"),
        ({"exponent_scales": 1}, "as exponents"),
        ({"factor": float("nan")}, "factor is not finite"),
        ({"int8_activations": 3}, "int8_activations = 3 is not 0 to 2"),
        ({"int8_activations": -1}, "int8_activations = -1 is not 0 to 2"),
    ],
)
def test_wrong_attributes_are_refused(
    change: dict[str, float], message: str, library: Library
) -> None:
    good = case_of("int4", 2, 64, 128, 32)
    model = onnx.load_from_string(model_of(OP, good))
    for attribute in model.graph.node[0].attribute:
        if attribute.name in change:
            value = change[attribute.name]
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, value))
    with pytest.raises(DataError, match="com.onnxq:QuantMatMul: .*" + message):
        session(model.SerializeToString(), threads=1, library=library.path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("codes", np.zeros((2, 32, 63), np.uint8), r"not \[2, 32, 64\]"),
        ("scales", np.full((2, 4, 32), np.nan, np.float16), "scale 0 is NaN or infinite"),
        ("scales", np.full((2, 4, 32), np.inf, np.float32), "scale 0 is NaN or infinite"),
        ("scales", np.ones((2, 4, 32), np.float64), "scales of element type 11"),
        ("zero_points", np.ones((1, 1, 1), np.int8), "a zero point for all must be 0"),
        ("levels", np.zeros(15, np.float32), r"levels has shape \[15\], not \[16\]"),
        ("levels", np.linspace(0, 1, 16, dtype=np.float32), "levels must be integers"),
        ("levels", np.full(16, np.nan, np.float32), "levels must be integers"),
        ("bias", np.zeros(63, np.float32), r"bias has shape \[63\], not \[64\] or \[1\]"),
        ("order", np.zeros(127, np.int32), r"order has shape \[127\], not \[128\] or \[1\]"),
        ("order", np.ones(1, np.int32), "an order of one place must be 0"),
        ("order", np.full(128, 128, np.int32), "order holds 128, which is not in 0 to 127"),
        ("order", np.full(128, -1, np.int32), "order holds -1, which is not in 0 to 127"),
    ],
)
def test_wrong_constants_are_refused(
    name: str, array: Array, message: str, library: Library
) -> None:
    good = case_of("int4", 2, 64, 128, 32, int8=True)
    model = onnx.load_from_string(model_of(OP, good))
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    with pytest.raises(DataError, match="com.onnxq:QuantMatMul: .*" + message):
        session(model.SerializeToString(), threads=1, library=library.path)


@pytest.mark.parametrize("shape", [(2, 127), ()])
def test_wrong_activations_are_refused(shape: tuple[int, ...], library: Library) -> None:
    made = session(model_of(OP, case_of("int4", 2, 64, 128, 32)), threads=1, library=library.path)
    with pytest.raises(Exception, match=r"com\.onnxq:QuantMatMul: x has shape .* must be 128"):
        made.run(None, {"x": np.zeros(shape, np.float32)})


def test_output_shape_is_inferred(library: Library) -> None:
    model = onnx.load_from_string(model_of(OP, case_of("int4", 2, 64, 128, 32)))
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", 128])
    model.graph.input[0].CopyFrom(value)
    made = session(model.SerializeToString(), threads=1, library=library.path)
    assert made.get_outputs()[0].shape == ["M", 64]


def test_formats_that_do_not_fit_are_refused() -> None:
    w = RNG.normal(size=(8, 64)).astype(np.float32)
    for name, granularity, int8, message in (
        ("nf4", Granularity.block(1, 32), True, "no multiples of one number"),
        ("int4", Granularity.block(1, 8), False, "groups of 8"),
        ("int4", Granularity.block(0, 32), False, r"scales by block\(0,32\)"),
        ("int16", Granularity.block(1, 32), False, "int16 weights"),
    ):
        fmt = parse_format(name)
        params = fmt.params(w, granularity)
        with pytest.raises(UnsupportedError, match=message):
            pack_weight(fmt, fmt.encode(w, params), params, int8_activations=int8)


def test_body_attaches_what_it_is_written_with() -> None:
    functions = onnx.load_from_string(model_of(OP, case_of("int4", 1, 32, 32, 32))).functions
    assert [function.name for function in functions] == ["DynamicQuantizePerToken", OP]
    assert custom_ops.get(OP).min_opset == 21


@pytest.mark.parametrize("name", ["codes", "scales", "levels"])
def test_a_missing_constant_is_refused(name: str, library: Library) -> None:
    model = onnx.load_from_string(model_of(OP, case_of("int4", 2, 64, 128, 32)))
    node = model.graph.node[0]
    node.input[list(node.input).index(name)] = ""
    with pytest.raises(DataError, match=rf"{OP}[\s\S]*empty string"):
        session(model.SerializeToString(), threads=1, library=library.path)


@pytest.mark.parametrize("dtype", [onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE])
def test_activations_without_a_kernel_are_refused(dtype: int, library: Library) -> None:
    model = onnx.load_from_string(model_of(OP, case_of("int4", 2, 64, 128, 32)))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = dtype
    with pytest.raises(DataError, match=OP):
        session(model.SerializeToString(), threads=1, library=library.path)
