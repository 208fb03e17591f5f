"""Float formats against ml_dtypes and numpy: all codes, all rounding points, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnxq.errors import DataError, SpecError
from onnxq.formats import NAMED_FLOATS, Granularity, MiniFloat, parse_format, search_minifloat

REFERENCE = {
    "fp8e4m3": ml_dtypes.float8_e4m3fn,
    "fp8e5m2": ml_dtypes.float8_e5m2,
    "fp8e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "fp8e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "fp8e3m4ieeeb3": ml_dtypes.float8_e3m4,
    "fp8e4m3ieeeb7": ml_dtypes.float8_e4m3,
    "fp8e4m3fnuzb11": ml_dtypes.float8_e4m3b11fnuz,
    "fp6e2m3": ml_dtypes.float6_e2m3fn,
    "fp6e3m2": ml_dtypes.float6_e3m2fn,
    "fp4": ml_dtypes.float4_e2m1fn,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
SMALL = [name for name in REFERENCE if name not in ("fp16", "bf16")]


def all_codes(fmt: MiniFloat) -> np.ndarray:
    return np.arange(1 << fmt.bits).astype(np.uint8 if fmt.bits <= 8 else np.uint16)


def rounding_points(fmt: MiniFloat) -> np.ndarray:
    """Every level, every midpoint, and the float32 neighbours of both."""
    levels = fmt.levels().astype(np.float32)
    middle = ((levels[:-1].astype(np.float64) + levels[1:]) / 2).astype(np.float32)
    points = np.concatenate([levels, middle])
    up, down = (np.nextafter(points, np.float32(end)) for end in (np.inf, -np.inf))
    return np.concatenate([points, up, down])


@pytest.mark.parametrize("name", REFERENCE)
def test_every_code_decodes_as_the_reference(name: str) -> None:
    fmt = parse_format(name)
    assert isinstance(fmt, MiniFloat)
    codes = all_codes(fmt)
    expected = codes.view(REFERENCE[name]).astype(np.float32)
    np.testing.assert_array_equal(fmt.decode(codes), expected)
    np.testing.assert_array_equal(np.signbit(fmt.decode(codes)), np.signbit(expected))


@pytest.mark.parametrize("name", REFERENCE)
def test_every_code_survives(name: str) -> None:
    fmt = parse_format(name)
    codes = all_codes(fmt)
    values = fmt.decode(codes)
    usable = np.isfinite(values)
    np.testing.assert_array_equal(fmt.encode(values[usable]), codes[usable])


@pytest.mark.parametrize("name", REFERENCE)
def test_ties_midpoints_and_neighbours_round_as_the_reference(name: str) -> None:
    fmt = parse_format(name)
    points = rounding_points(fmt)
    dtype = REFERENCE[name]
    width = np.uint8 if fmt.bits <= 8 else np.uint16
    np.testing.assert_array_equal(fmt.encode(points), points.astype(dtype).view(width))


@pytest.mark.parametrize("name", REFERENCE)
def test_random_values_round_as_the_reference(name: str) -> None:
    fmt = parse_format(name)
    rng = np.random.default_rng(3)
    x = rng.standard_normal(20000) * 2.0 ** rng.uniform(-12, np.log2(fmt.max), 20000)
    x = np.clip(x, -fmt.max, fmt.max).astype(np.float32)
    width = np.uint8 if fmt.bits <= 8 else np.uint16
    np.testing.assert_array_equal(fmt.encode(x), x.astype(REFERENCE[name]).view(width))


@pytest.mark.parametrize("name", ["fp8e4m3", "fp8e5m2", "fp8e4m3fnuz", "fp8e5m2fnuz", "fp16"])
def test_overflow_without_saturation_is_that_of_the_reference(name: str) -> None:
    fmt = parse_format(name)
    assert isinstance(fmt, MiniFloat)
    step = np.float32(fmt.max - fmt.levels()[-2])
    x = np.float32(fmt.max) + step * np.array([0.25, 0.5, 0.75, 1, 4], np.float32)
    x = np.concatenate([x, -x, [np.inf, -np.inf, np.nan]]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(REFERENCE[name]).astype(np.float32)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x, saturate=False)), expected)


@pytest.mark.parametrize("name", SMALL)
def test_saturation_keeps_the_sign(name: str) -> None:
    fmt = parse_format(name)
    x = np.array([1e30, -1e30, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x)), np.array([1, -1, 1, -1]) * fmt.max)


@pytest.mark.parametrize("name", ["fp8e4m3", "fp8e5m2", "fp8e4m3fnuz", "ue5m3", "fp16", "tf32"])
def test_nan_stays_nan(name: str) -> None:
    fmt = parse_format(name)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(np.array([np.nan, 1.0]))), [np.nan, 1.0])


@pytest.mark.parametrize("name", ["fp4", "fp6e2m3", "fp6e3m2", "fp8e3m4", "fp8e2m5"])
def test_nan_is_refused_where_no_code_exists(name: str) -> None:
    with pytest.raises(DataError, match="DATA-NAN"):
        parse_format(name).encode(np.array([np.nan]))


@pytest.mark.parametrize(
    ("name", "largest", "normal", "subnormal"),
    [
        ("fp8e4m3", 448, 2**-6, 2**-9),
        ("fp8e5m2", 57344, 2**-14, 2**-16),
        ("fp8e4m3fnuz", 240, 2**-7, 2**-10),
        ("fp8e5m2fnuz", 57344, 2**-15, 2**-17),
        ("fp6e3m2", 28, 0.25, 0.0625),
        ("fp6e2m3", 7.5, 1, 0.125),
        ("fp4", 6, 1, 0.5),
        ("fp4ieee", 3, 1, 0.5),
        ("ue5m3", 114688, 2**-14, 2**-17),
        ("fp16", 65504, 2**-14, 2**-24),
        ("tf32", float(np.finfo(np.float32).max), 2**-126, 2**-136),
    ],
)
def test_published_limits(name: str, largest: float, normal: float, subnormal: float) -> None:
    fmt = NAMED_FLOATS[name]
    expected = (2 - 2**-10) * 2**127 if name == "tf32" else largest
    assert (fmt.max, fmt.smallest_normal, fmt.smallest_subnormal) == (expected, normal, subnormal)


def test_fp4_levels_and_ties() -> None:
    fmt = NAMED_FLOATS["fp4"]
    np.testing.assert_array_equal(fmt.levels()[7:], [0, 0.5, 1, 1.5, 2, 3, 4, 6])
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    np.testing.assert_array_equal(fmt.decode(fmt.encode(ties)), [0, 1, 1, 2, 2, 4, 4])
    np.testing.assert_array_equal(NAMED_FLOATS["fp4ieee"].levels()[5:], [0, 0.5, 1, 1.5, 2, 3])


def test_ue5m3_is_the_positive_half_of_a_wider_exponent_and_carries() -> None:
    fmt = NAMED_FLOATS["ue5m3"]
    codes = np.arange(255).astype(np.uint8)
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes)), codes)
    assert np.isnan(fmt.decode(np.array([255], np.uint8)))[0]
    # 1.9999 rounds up into the next binade; an encoder that clamps its mantissa gives 1.875.
    assert fmt.decode(fmt.encode(np.array([1.9999])))[0] == 2
    with pytest.raises(DataError, match="DATA-NEGATIVE"):
        fmt.encode(np.array([-1.0]))
    np.testing.assert_array_equal(fmt.encode(np.array([-0.0])), [0])


def test_tf32_drops_thirteen_bits_to_nearest_even_and_takes_four_bytes() -> None:
    fmt = NAMED_FLOATS["tf32"]
    rng = np.random.default_rng(4)
    raw = rng.integers(0, 1 << 32, 50000, dtype=np.uint64).astype(np.uint32)
    x = raw.view(np.float32)
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        wide = x.view(np.uint32).astype(np.uint64)
    expected = (wide + 0xFFF + ((wide >> 13) & 1)) >> 13
    np.testing.assert_array_equal(fmt.encode(x), expected)
    data = fmt.pack(fmt.encode(x))
    np.testing.assert_array_equal(np.frombuffer(data, "<f4"), fmt.decode(fmt.encode(x)))
    np.testing.assert_array_equal(fmt.unpack(data, x.shape), fmt.encode(x))
    assert fmt.bits_per_element((8,)) == 32


@pytest.mark.parametrize("name", SMALL)
def test_scaling_puts_the_extreme_on_the_largest_level(name: str) -> None:
    x = np.random.default_rng(5).standard_normal((4, 33)).astype(np.float32)
    fmt = parse_format(name)
    for granularity in (Granularity.per_tensor(), Granularity.per_channel(0)):
        params = fmt.params(x, granularity)
        codes = fmt.encode(x, params)
        assert np.abs(fmt.decode(codes)).max() == fmt.max
        again = fmt.encode(fmt.decode(codes, params), params)
        np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("name", ["fp4", "fp8e4m3", "fp6e2m3"])
def test_zero_and_tiny_groups(name: str) -> None:
    x = np.array([[0, 0, 0, 0], [1e-44, 0, -1e-45, 0], [3e38, -3e38, 0, 1]], np.float32)
    values = parse_format(name).fake_quant(x, Granularity.per_channel(0))
    assert np.isfinite(values).all()
    assert not values[0].any()
    np.testing.assert_allclose(values[2, :2], x[2, :2], rtol=1e-6)


def test_infinite_weights_are_refused() -> None:
    with pytest.raises(DataError, match="DATA-NOT-FINITE"):
        NAMED_FLOATS["fp8e4m3"].params(np.array([1, np.inf]))


@pytest.mark.parametrize("name", ["fp6e2m3", "fp4", "fp8e4m3", "fp16"])
def test_pack_round_trip_and_length(name: str) -> None:
    fmt = parse_format(name)
    codes = all_codes(fmt)[:13]
    data = fmt.pack(codes)
    assert len(data) == -(-13 * fmt.bits // 8)
    np.testing.assert_array_equal(fmt.unpack(data, (13,)), codes)


def test_six_bit_codes_lie_four_in_three_bytes() -> None:
    data = NAMED_FLOATS["fp6e2m3"].pack(
        np.array([0b000001, 0b100000, 0b111111, 0b000010], np.uint8)
    )
    assert data == bytes([0b00000001, 0b11111000, 0b00001011])


def test_four_bit_codes_are_low_nibble_first() -> None:
    assert NAMED_FLOATS["fp4"].pack(np.array([1, 2, 15], np.uint8)) == bytes([0x21, 0x0F])


def test_search_prefers_mantissa_for_a_normal_and_exponent_for_heavy_tails() -> None:
    rng = np.random.default_rng(6)
    narrow, _ = search_minifloat(rng.uniform(-1, 1, 4096))
    heavy, params = search_minifloat(
        rng.standard_t(2, (2, 4096)) ** 3, 8, Granularity.per_channel(0)
    )
    assert narrow.e < heavy.e
    assert params.scale.shape == (2,)
    x = rng.standard_normal(4096).astype(np.float32)
    best, params = search_minifloat(x)
    chosen = np.mean((best.decode(best.encode(x, params), params) - x) ** 2)
    for name in ("fp8e2m5", "fp8e3m4", "fp8e4m3", "fp8e5m2"):
        assert chosen <= np.mean((parse_format(name).fake_quant(x) - x) ** 2)


@pytest.mark.parametrize(
    "arguments",
    [(0, 3, 1), (9, 3, 1), (4, 24, 7), (4, 3, 7, "odd"), (4, 3, 7, "fnuz", False), (4, 0, 7, "fn")],
)
def test_floats_that_do_not_exist(arguments: tuple[int, ...]) -> None:
    with pytest.raises(SpecError):
        MiniFloat(*arguments)  # type: ignore[arg-type]
