"""MX against its specification, worked by hand, and ml_dtypes' element and scale types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.errors import SpecError
from onnxq.formats import Granularity, MxFormat, parse_format
from onnxq.formats.mx import SCALE_RULES

ELEMENTS = {
    "fp8e4m3": (ml_dtypes.float8_e4m3fn, 8),
    "fp8e5m2": (ml_dtypes.float8_e5m2, 15),
    "fp6e2m3": (ml_dtypes.float6_e2m3fn, 2),
    "fp6e3m2": (ml_dtypes.float6_e3m2fn, 4),
    "fp4": (ml_dtypes.float4_e2m1fn, 2),
}
ALL = [*ELEMENTS, "int8"]


def specification(x: np.ndarray, element: str) -> np.ndarray:
    """The floor rule on blocks ``[G, 32]``, through exponent bits and ml_dtypes."""
    largest = np.abs(x).max(axis=1).astype(np.float64)
    exponent = np.frexp(largest)[1] - 1
    if element == "int8":
        unit = np.ldexp(1.0, exponent)[:, None]
        return np.clip(np.rint(x / unit * 64), -127, 127) / 64 * unit
    dtype, top = ELEMENTS[element]
    unit = np.ldexp(1.0, exponent - top)[:, None]
    limit = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x / unit, -limit, limit).astype(np.float32).astype(dtype).astype(float) * unit


@pytest.mark.parametrize("element", ALL)
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_floor_rule_bit_for_bit(element: str, source: str) -> None:
    """bfloat16 inputs are full of ties, which tell rounding to even from rounding away."""
    x = np.random.default_rng(0).standard_normal((256, 32)).astype(np.float32)
    if source == "bfloat16":
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(MxFormat(element).fake_quant(x), specification(x, element))


@pytest.mark.parametrize(
    ("element", "largest", "bits"),
    [
        ("fp8e4m3", 448, 8.25),
        ("fp8e5m2", 57344, 8.25),
        ("fp6e3m2", 28, 6.25),
        ("fp6e2m3", 7.5, 6.25),
        ("fp4", 6, 4.25),
        ("int8", 1 + 63 / 64, 8.25),
    ],
)
def test_table_of_the_specification(element: str, largest: float, bits: float) -> None:
    fmt = MxFormat(element)
    assert fmt.max == fmt.levels()[-1] == largest
    assert fmt.bits_per_element((64, 256)) == bits


def test_values_beyond_the_element_saturate_with_floor_and_not_with_ceil() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = [7, -7, 1]
    np.testing.assert_array_equal(MxFormat("fp4").fake_quant(x)[0, :3], [6, -6, 1])
    np.testing.assert_array_equal(MxFormat("fp4", "ceil").fake_quant(x)[0, :3], [8, -8, 1])


@pytest.mark.parametrize(
    ("rule", "amax", "exponent"),
    [
        ("floor", 4.0, 0),
        ("floor", 7.99, 0),
        ("floor", np.nextafter(np.float32(8), np.float32(0)), 0),
        ("floor", 8.0, 1),
        ("ceil", 6.0, 0),
        ("ceil", np.nextafter(np.float32(6), np.float32(7)), 1),
        ("ceil", 4.0, 0),
        ("even", 6.99, 0),
        ("even", 7.0, 1),
        ("4/3", 7.99, 0),
    ],
)
def test_scale_rules_at_their_edges(rule: str, amax: float, exponent: int) -> None:
    params = MxFormat("fp4", rule).params(np.full((1, 32), amax, np.float32))  # type: ignore[arg-type]
    assert params.scale.dtype == ml_dtypes.float8_e8m0fnu
    assert params.scale.view(np.uint8)[0, 0] == exponent + 127


def test_auto_is_never_worse_than_the_best_of_its_three_exponents() -> None:
    x = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    auto = MxFormat("fp4", "auto").fake_quant(x)
    for rule in ("floor", "ceil"):
        other = MxFormat("fp4", rule).fake_quant(x)  # type: ignore[arg-type]
        assert np.all(np.sum((auto - x) ** 2, 1) <= np.sum((other - x) ** 2, 1) * (1 + 1e-6))


@pytest.mark.parametrize("element", ALL)
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_edges_of_the_reference(element: str, rule: str) -> None:
    fmt = MxFormat(element, rule)  # type: ignore[arg-type]
    blocks = np.zeros((5, 32), np.float32)
    blocks[1, 0] = 2.0**-140
    blocks[2, 3] = np.inf
    blocks[3, 4] = np.nan
    blocks[4] = 1
    params = fmt.params(blocks)
    values = fmt.fake_quant(blocks)
    assert not values[0].any()
    assert params.scale.view(np.uint8)[0, 0] == 0
    assert abs(values[1, 0] - 2.0**-140) <= 2.0**-128
    assert params.scale.view(np.uint8)[2, 0] == params.scale.view(np.uint8)[3, 0] == 255
    assert np.isnan(values[2:4]).all()
    assert np.isfinite(values[4]).all()
    assert not fmt.encode(blocks, params)[2:4].any()


def test_the_largest_numbers_saturate() -> None:
    x = np.full((1, 32), 3e38, np.float32)
    assert MxFormat("fp4").fake_quant(x)[0, 0] == np.float32(6 * 2.0**125)  # 2.552e38
    assert np.isfinite(MxFormat("int8", "ceil").fake_quant(np.full(32, 3.4e38))).all()


@pytest.mark.parametrize("element", ALL)
def test_ragged_tails_are_blocks_of_their_own_and_axes_are_free(element: str) -> None:
    fmt = MxFormat(element)
    x = np.random.default_rng(2).standard_normal((3, 77)).astype(np.float32)
    values = fmt.fake_quant(x)
    padded = np.zeros((3, 96), np.float32)
    padded[:, :77] = x
    expected = specification(padded.reshape(-1, 32), element).reshape(3, 96)[:, :77]
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(fmt.fake_quant(x.T, axis=0), values.T)
    short = fmt.fake_quant(x[:, :5])
    assert fmt.params(x[:, :5]).scale.shape == (3, 1)
    np.testing.assert_array_equal(
        short, specification(np.pad(x[:, :5], ((0, 0), (0, 27))), element)[:, :5]
    )


def test_four_thirds_is_one_factor_of_the_tensor() -> None:
    x = np.random.default_rng(3).standard_normal((8, 32)).astype(np.float32)
    fmt = MxFormat("fp4", "4/3")
    params = fmt.params(x)
    assert params.global_scale == np.float32(4 / 3)
    plain = MxFormat("fp4").fake_quant((x.astype(np.float64) * 0.75).astype(np.float32))
    # x * 3/4 may fall into a lower binade; only blocks that keep their exponent agree.
    same = MxFormat("fp4").params(x * np.float32(0.75)).scale.view(np.uint8) == params.scale.view(
        np.uint8
    )
    assert same.any()
    rows = same[:, 0]
    np.testing.assert_allclose(fmt.fake_quant(x)[rows], plain[rows] * 4 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6e2m3", "mxint8", "mxfp8e5m2-ceil", "mxfp4-auto"])
@settings(max_examples=40)
@given(
    x=hnp.arrays(np.float32, st.integers(1, 70), elements=st.floats(-(2.0**60), 2.0**60, width=32))
)
def test_quantizing_twice_changes_nothing(name: str, x: np.ndarray) -> None:
    fmt = parse_format(name)
    params = fmt.params(x)
    codes = fmt.encode(x, params)
    values = fmt.decode(codes, params)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(values, params), params), values)
    np.testing.assert_array_equal(fmt.unpack(fmt.pack(codes), codes.shape), codes)


def test_other_granularities_are_refused() -> None:
    for wrong in (Granularity.per_tensor(), Granularity.block(-1, 16), Granularity.per_token()):
        with pytest.raises(SpecError, match="SPEC-GRANULARITY"):
            MxFormat("fp4").params(np.zeros((2, 64)), wrong)
    with pytest.raises(SpecError):
        MxFormat("fp5")
    with pytest.raises(SpecError):
        MxFormat("fp4", "up")  # type: ignore[arg-type]
    with pytest.raises(SpecError):
        MxFormat("fp4", block=0)
