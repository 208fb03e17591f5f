"""Integer formats against ONNX Runtime's QuantizeLinear/DequantizeLinear and exact arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.errors import DataError, SpecError
from onnxq.formats import Granularity, IntFormat, affine_params, dequantize, quantize

ONNX_TYPES = {
    (8, True): "int8",
    (8, False): "uint8",
    (16, True): "int16",
    (16, False): "uint16",
    (4, True): "int4",
    (4, False): "uint4",
    (2, True): "int2",
    (2, False): "uint2",
}
QUANTIZED = sorted(ONNX_TYPES)
PACKED = QUANTIZED + [(bits, signed) for bits in (6, 5, 3) for signed in (True, False)]
SMALL = [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2]
SCHEMES = [
    IntFormat(bits, signed, scheme)
    for bits in (16, 8, 6, 5, 4, 3, 2)
    for signed in (True, False)
    for scheme in ("sym", "asym", "full")
]
finite32 = st.floats(-(2.0**100), 2.0**100, width=32)


def ort_qdq(
    x: np.ndarray, scale: np.ndarray, zp: np.ndarray, bits: int, signed: bool, attributes: str
) -> tuple[np.ndarray, np.ndarray]:
    """ORT's codes and dequantized values (graph optimisation off)."""
    kind = ONNX_TYPES[bits, signed]
    dims = ",".join(map(str, x.shape))
    sdims = ",".join(map(str, scale.shape))
    opset = 25 if bits == 2 else 21
    opened = f"<{attributes}>" if attributes else ""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        m (float[{dims}] x, float[{sdims}] s, float[{sdims}] zf)
        => ({kind}[{dims}] q, float[{dims}] y)
        {{ z = Cast<to = {getattr(onnx.TensorProto, kind.upper())}>(zf)
           q = QuantizeLinear{opened}(x, s, z)
           y = DequantizeLinear{opened}(q, s, z) }}""")
    if bits < 8:  # ORT hands 4- and 2-bit outputs over packed; read them through a cast.
        del model.graph.output[0]
        model.graph.node.append(
            onnx.helper.make_node("Cast", ["q"], ["c"], to=onnx.TensorProto.INT32)
        )
        model.graph.output.insert(
            0, onnx.helper.make_tensor_value_info("c", onnx.TensorProto.INT32, x.shape)
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    codes, values = session.run(None, {"x": x, "s": np.asarray(scale), "zf": zp.astype(np.float32)})
    return codes.astype(np.int32), values


def tricky_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal values with exact ties, zeros, large and subnormal ones among them.

    |x / scale| stays below 2**31: beyond it ORT's blocked and sub-byte kernels convert through
    int32 and wrap around, against the operator's definition, which saturates (as we do).
    """
    x = (rng.standard_normal(shape) * 3).astype(np.float32)
    flat = x.reshape(-1)
    special = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, -0.0, 1e7, -1e7, 1e-40, 70000.5]
    flat[: len(special)] = special
    return x


def scales_like(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (2.0 ** rng.integers(-3, 1, shape) * rng.choice([1.0, 1.1], shape)).astype(np.float32)


@pytest.mark.parametrize(("bits", "signed"), QUANTIZED)
@pytest.mark.parametrize(
    ("axis", "block", "scale_shape", "attributes"),
    [
        (None, None, (), ""),
        (0, None, (6,), "axis=0"),
        (1, None, (40,), "axis=1"),
        (1, 8, (6, 5), "axis=1, block_size=8"),
        (0, 4, (2, 40), "axis=0, block_size=4"),
        (1, 16, (6, 3), "axis=1, block_size=16"),
    ],
)
def test_quantize_and_dequantize_match_ort_bit_for_bit(
    bits: int,
    signed: bool,
    axis: int | None,
    block: int | None,
    scale_shape: tuple[int, ...],
    attributes: str,
) -> None:
    rng = np.random.default_rng(bits)
    fmt = IntFormat(bits, signed)
    x = tricky_values(rng, (6, 40))
    scale = scales_like(rng, scale_shape)
    zp = rng.integers(fmt.qmin, fmt.qmax + 1, scale_shape).astype(np.int32)
    codes = quantize(x, scale, zp.astype(fmt.numpy_dtype), fmt, axis, block)
    values = dequantize(codes, scale, zp.astype(fmt.numpy_dtype), axis, block)
    expected_codes, expected_values = ort_qdq(x, scale, zp, bits, signed, attributes)
    assert codes.dtype == np.dtype(fmt.numpy_dtype)
    np.testing.assert_array_equal(codes.astype(np.int32), expected_codes)
    np.testing.assert_array_equal(values, expected_values)


@pytest.mark.parametrize("fmt", SCHEMES, ids=str)
def test_every_code_survives_decode_and_encode(fmt: IntFormat) -> None:
    codes = np.arange(fmt.qmin, fmt.qmax + 1).astype(fmt.numpy_dtype)
    again = fmt.encode(fmt.decode(codes))
    np.testing.assert_array_equal(again.astype(int), codes.astype(int))
    np.testing.assert_array_equal(fmt.decode(codes), fmt.levels())


@pytest.mark.parametrize("fmt", SCHEMES, ids=str)
def test_midpoints_round_to_even_codes(fmt: IntFormat) -> None:
    levels = fmt.levels()
    middle = (levels[:-1] + levels[1:]) / 2
    offset = fmt.zero if fmt.symmetric else 0
    np.testing.assert_array_equal(fmt.encode(middle).astype(int) - offset, np.rint(middle))


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "qmin", "qmax"),
    [
        (8, True, False, -128, 127),
        (8, True, True, -127, 127),
        (8, False, False, 0, 255),
        (16, True, False, -32768, 32767),
        (4, True, False, -8, 7),
        (2, True, False, -2, 1),
        (2, False, False, 0, 3),
        (1, False, False, 0, 1),
    ],
)
def test_ranges(bits: int, signed: bool, narrow: bool, qmin: int, qmax: int) -> None:
    fmt = IntFormat(bits, signed, scheme="sym" if narrow else "", narrow=narrow)
    assert (fmt.qmin, fmt.qmax) == (qmin, qmax)


def test_symmetric_scale_maps_the_extreme_to_qmax_and_asym_covers_both_ends() -> None:
    scale, zp = affine_params([-2.0, -1.0], [1.0, 3.0], IntFormat(8), symmetric=True)
    np.testing.assert_allclose(scale, [2 / 127, 3 / 127], rtol=1e-7)
    assert zp.dtype == np.int8
    assert not zp.any()
    scale, zp = affine_params([-1.0, 2.0], [3.0, 4.0], IntFormat(8, False), symmetric=False)
    np.testing.assert_allclose(scale, [4 / 255, 4 / 255], rtol=1e-7)
    np.testing.assert_array_equal(zp, [64, 0])  # rint(63.75); a positive range starts at 0


def test_unsigned_symmetric_has_its_zero_in_the_middle() -> None:
    scale, zp = affine_params(-1.0, 1.0, IntFormat(8, False), symmetric=True)
    assert int(zp) == 128
    assert float(scale) == pytest.approx(1 / 127, rel=1e-7)


@given(lo=finite32, hi=finite32, bits=st.integers(2, 16), signed=st.booleans(), sym=st.booleans())
def test_zero_is_exact_and_the_range_is_covered(
    lo: float, hi: float, bits: int, signed: bool, sym: bool
) -> None:
    lo, hi = min(lo, hi), max(lo, hi)
    fmt = IntFormat(bits, signed)
    scale, zp = affine_params(lo, hi, fmt, symmetric=sym)
    assert np.isfinite(scale)
    assert scale >= np.finfo(np.float32).smallest_normal
    zero = quantize(np.zeros(1), scale, zp, fmt)
    assert dequantize(zero, scale, zp)[0] == 0
    ends = np.array([min(lo, 0), max(hi, 0)], np.float32)
    reached = dequantize(quantize(ends, scale, zp, fmt), scale, zp)
    assert np.all(np.abs(reached.astype(float) - ends) <= 1.001 * float(scale))


@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_ranges(symmetric: bool) -> None:
    tiny = np.finfo(np.float32).smallest_normal
    big = np.finfo(np.float32).max
    scale, zp = affine_params(
        [0.0, 0.0, -big, -1e-42], [0.0, 1e-44, big, 0.0], IntFormat(8), symmetric=symmetric
    )
    assert scale[0] == 1
    assert scale[1] == tiny
    assert scale[3] == tiny
    assert np.isfinite(scale[2])
    x = np.array([0.0, 1e-44, big, -1e-42], np.float32)
    assert np.isfinite(dequantize(quantize(x, scale, zp, IntFormat(8), axis=0), scale, zp, 0)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_ranges_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="DATA-NOT-FINITE"):
        affine_params(np.minimum(0, bad), np.maximum(0, bad), IntFormat(8), symmetric=True)
    with pytest.raises(DataError, match="DATA-NOT-FINITE"):
        IntFormat(4, block=32).fake_quant(np.array([1.0, bad]))


def test_nan_is_refused_and_infinity_saturates() -> None:
    with pytest.raises(DataError, match="DATA-NAN"):
        quantize(np.array([1.0, np.nan]), 1.0, None, IntFormat(8))
    codes = quantize(np.array([np.inf, -np.inf]), 1.0, None, IntFormat(8))
    np.testing.assert_array_equal(codes, [127, -128])


@pytest.mark.parametrize("shape", [(3,), (2, 40), (5, 40, 1)])
def test_a_scale_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="DATA-PARAM-SHAPE"):
        quantize(np.zeros((5, 40)), np.ones(shape), None, IntFormat(8), axis=0)
    with pytest.raises(DataError, match="DATA-PARAM-SHAPE"):
        quantize(np.zeros((5, 40)), np.ones(40), None, IntFormat(8))


def test_float_zero_points() -> None:
    fmt = IntFormat(4, False)
    x = np.array([-1.0, 0.0, 2.0], np.float32)
    codes = quantize(x, 0.25, np.float32(5.5), fmt)
    np.testing.assert_array_equal(codes.astype(int), [2, 6, 14])
    values = dequantize(codes, 0.25, np.float32(5.5))
    np.testing.assert_allclose(values, [-0.875, 0.125, 2.125])


def test_full_range_uses_the_extra_code_and_gains_over_symmetric() -> None:
    fmt = IntFormat(4, True, "full", block=4)
    x = np.array([0.1, -0.2, 0.8, 0.3, 0.1, -0.8, 0.2, 0.3], np.float32)
    params = fmt.params(x)
    codes = fmt.encode(x, params).astype(int)
    np.testing.assert_allclose(params.scale, [-0.1, 0.1], rtol=1e-6)
    assert codes[2] == codes[5] == -8
    np.testing.assert_allclose(fmt.decode(fmt.encode(x, params), params), x, atol=1e-6)


@pytest.mark.parametrize("fmt", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "granularity",
    [
        Granularity.per_tensor(),
        Granularity.per_channel(0),
        Granularity.per_channel(1),
        Granularity.per_token(),
        Granularity.block(-1, 8),
        Granularity.block(0, 4),
        Granularity.block(1, 16),
    ],
    ids=str,
)
def test_quantizing_twice_changes_nothing(fmt: IntFormat, granularity: Granularity) -> None:
    x = np.random.default_rng(1).standard_normal((7, 36)).astype(np.float32)
    params = fmt.params(x, granularity)
    assert params.scale.shape == granularity.param_shape(x.shape)
    codes = fmt.encode(x, params)
    values = fmt.decode(codes, params)
    np.testing.assert_array_equal(fmt.encode(values, params).astype(int), codes.astype(int))
    step = np.abs(granularity.expand(params.scale, x.shape))
    assert np.all(np.abs(values - x) <= step * 1.01)


@given(
    hnp.arrays(np.float32, st.integers(1, 70), elements=finite32),
    st.sampled_from(SCHEMES),
    st.integers(1, 33),
)
def test_idempotence_on_any_data(x: np.ndarray, fmt: IntFormat, size: int) -> None:
    params = fmt.params(x, Granularity.block(0, size))
    codes = fmt.encode(x, params)
    again = fmt.encode(fmt.decode(codes, params), params)
    np.testing.assert_array_equal(again.astype(int), codes.astype(int))


def test_blocks_do_not_mix_rows_and_ragged_tails_stand_alone() -> None:
    x = np.array([[1, 2, 4, 8, 100], [3, 0, 0, 0, 7]], np.float32)
    params = IntFormat(8).params(x, Granularity.block(1, 2))
    np.testing.assert_allclose(params.scale * 127, [[2, 8, 100], [3, 1 * 127, 7]], rtol=1e-6)


@pytest.mark.parametrize(
    ("bits", "signed"), QUANTIZED + [(b, s) for b in (6, 5, 3) for s in (0, 1)]
)
def test_pack_layout_and_round_trip(bits: int, signed: bool) -> None:
    fmt = IntFormat(bits, signed)
    rng = np.random.default_rng(2)
    codes = rng.integers(fmt.qmin, fmt.qmax + 1, (3, 7)).astype(fmt.numpy_dtype)
    data = fmt.pack(codes)
    assert len(data) == -(-21 * bits // 8)
    unpacked = fmt.unpack(data, (3, 7))
    assert unpacked.dtype == codes.dtype
    np.testing.assert_array_equal(unpacked.astype(int), codes.astype(int))


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2]
)
def test_packing_is_that_of_onnx(dtype: np.dtype) -> None:
    info = ml_dtypes.iinfo(dtype)
    codes = np.resize(np.arange(info.min, info.max + 1).astype(dtype), 19)
    kind = getattr(onnx.TensorProto, np.dtype(dtype).name.upper())
    tensor = onnx.numpy_helper.from_array(codes)
    assert tensor.data_type == kind
    assert IntFormat(info.bits, info.min < 0).pack(codes) == tensor.raw_data


def test_unpack_refuses_a_wrong_length() -> None:
    with pytest.raises(DataError, match="DATA-PACKED"):
        IntFormat(4).unpack(b"\0\0", (5,))


def test_bits_per_element_counts_scales() -> None:
    assert IntFormat(4, block=32).bits_per_element((64, 64)) == 5.0
    assert IntFormat(4, block=32).bits_per_element((64, 64), scale_bits=16) == 4.5
    assert IntFormat(4, True, "asym", 32).bits_per_element((64, 64), scale_bits=16) == 4.625
    assert IntFormat(8).bits_per_element((64, 64)) == 8 + 32 / 4096


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 0},
        {"bits": 17},
        {"bits": 1},
        {"bits": 4, "scheme": "odd"},
        {"bits": 4, "block": -1},
        {"bits": 4, "scheme": "asym", "narrow": True},
    ],
)
def test_formats_that_do_not_exist(arguments: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        IntFormat(**arguments)  # type: ignore[arg-type]
