"""MX9, MX6 and MX4 (shared microexponents) against their definition, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxq.errors import SpecError
from onnxq.formats import BdrFormat, Granularity, parse_format

NAMES = ["mx9", "mx6", "mx4"]


def definition(block: np.ndarray, m: int) -> np.ndarray:
    """One block of 16 in exact arithmetic, from the formula in the paper."""
    exponent = math.frexp(float(np.abs(block).max()))[1] - 1
    out = []
    for pair in block.reshape(-1, 2):
        largest = float(np.abs(pair).max())
        own = math.frexp(largest)[1] - 1 if largest else -1000
        tau = min(1, exponent - own)
        unit = 2.0 ** (exponent - tau - m + 1)
        out += [math.copysign(min(round(abs(float(v)) / unit), 2**m - 1) * unit, v) for v in pair]
    return np.array(out)


@pytest.mark.parametrize(("name", "m"), [("mx9", 7), ("mx6", 4), ("mx4", 2)])
def test_definition(name: str, m: int) -> None:
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((100, 16)) * 64).astype(np.float32) / 64  # with ties
    values = parse_format(name).fake_quant(x)
    np.testing.assert_array_equal(values, [definition(row, m) for row in x])


@pytest.mark.parametrize(("name", "bits"), [("mx9", 9), ("mx6", 6), ("mx4", 4)])
def test_the_number_in_the_name_is_bits_per_element(name: str, bits: int) -> None:
    assert parse_format(name).bits_per_element((32, 64)) == bits


@pytest.mark.parametrize("name", NAMES)
def test_all_codes_decode_and_encode(name: str) -> None:
    fmt = parse_format(name)
    codes = np.arange(1 << fmt.bits).astype(np.uint8)
    values = fmt.decode(codes)
    np.testing.assert_array_equal(np.unique(values), fmt.levels())
    negative_zero = 1 << (fmt.bits - 1)
    expected = np.where(codes == negative_zero, 0, codes)
    np.testing.assert_array_equal(fmt.encode(values), expected)


@pytest.mark.parametrize("name", NAMES)
def test_zero_ragged_nan_and_axis(name: str) -> None:
    fmt = parse_format(name)
    x = np.random.default_rng(1).standard_normal((4, 37)).astype(np.float32)
    x[0] = 0
    x[1, 20] = np.nan
    values = fmt.fake_quant(x)
    assert not values[0].any()
    assert np.isnan(values[1, 16:32]).all()
    assert np.isfinite(values[1, :16]).all()
    padded = np.zeros(16, np.float32)
    padded[:5] = x[2, 32:]
    np.testing.assert_array_equal(values[2, 32:], definition(padded, fmt.bits - 1)[:5])
    np.testing.assert_array_equal(fmt.fake_quant(x.T, axis=0), values.T)
    tiny = np.full(16, 1e-44, np.float32)
    assert np.isfinite(fmt.fake_quant(tiny)).all()


@pytest.mark.parametrize("name", NAMES)
def test_idempotent_and_packable(name: str) -> None:
    fmt = parse_format(name)
    x = np.random.default_rng(2).standard_normal((3, 50)).astype(np.float32)
    params = fmt.params(x)
    codes = fmt.encode(x, params)
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes, params), params), codes)
    np.testing.assert_array_equal(fmt.unpack(fmt.pack(codes), codes.shape), codes)


def test_bad_specs() -> None:
    with pytest.raises(SpecError):
        BdrFormat(8)
    with pytest.raises(SpecError):
        BdrFormat(4, 16, 3)
    with pytest.raises(SpecError):
        BdrFormat(4).params(np.zeros(16), Granularity.per_tensor())
