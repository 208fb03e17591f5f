"""Logarithmic levels: all codes, the two kinds of rounding, zero."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.errors import DataError, SpecError
from onnxq.formats import Granularity, LogFormat, parse_format

NAMES = ["log2", "logsqrt2", "ulog2", "log2-linear", "log2b3", "logsqrt2b8-linear"]


def test_levels_are_powers() -> None:
    np.testing.assert_array_equal(LogFormat().levels()[7:], [0, *2.0 ** np.arange(-6, 1)])
    np.testing.assert_allclose(
        LogFormat(steps=2).levels()[7:], [0, *np.sqrt(2) ** np.arange(-6, 1)], rtol=1e-15
    )
    np.testing.assert_array_equal(LogFormat(signed=False).levels()[1:], 2.0 ** np.arange(-14, 1))


@pytest.mark.parametrize("name", NAMES)
def test_all_codes_survive(name: str) -> None:
    fmt = parse_format(name)
    assert isinstance(fmt, LogFormat)
    codes = np.arange(1 << fmt.bits).astype(np.uint8)
    if fmt.signed:
        codes = np.delete(codes, 1 << (fmt.bits - 1))  # a zero with a sign is never written
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes)), codes)
    np.testing.assert_allclose(np.sort(fmt.decode(codes)), fmt.levels(), rtol=1e-7)


def test_the_two_roundings_change_over_at_different_points() -> None:
    x = np.array([0.72, 0.74, 0.76])  # between 1/2 and 1: sqrt(1/2) = 0.7071, middle 0.75
    np.testing.assert_array_equal(LogFormat().decode(LogFormat().encode(x)), [1, 1, 1])
    linear = LogFormat(rounding="linear")
    np.testing.assert_array_equal(linear.decode(linear.encode(x)), [0.5, 0.5, 1])


def test_log_rounding_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    x = 2.0 ** rng.uniform(-6, 0.4, 5000)
    for steps in (1, 2):
        fmt = LogFormat(8, steps)
        exponent = np.clip(np.rint(steps * np.log2(x)), 1 - fmt.top, 0)
        np.testing.assert_allclose(fmt.decode(fmt.encode(x)), 2.0 ** (exponent / steps), rtol=1e-6)


def test_small_values_become_zero_at_half_the_smallest_level() -> None:
    fmt = LogFormat()
    x = np.array([2.0**-7, 2.0**-7 * 1.01, -(2.0**-8), 0.0])
    np.testing.assert_array_equal(fmt.decode(fmt.encode(x)), [0, 2.0**-6, 0, 0])


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_powers_and_quantizing_twice_changes_nothing(name: str) -> None:
    fmt = parse_format(name)
    assert isinstance(fmt, LogFormat)
    x = np.abs(np.random.default_rng(1).standard_normal((3, 40))).astype(np.float32)
    params = fmt.params(x, Granularity.per_channel(0))
    power = fmt.steps * np.log2(params.scale.astype(float))
    np.testing.assert_allclose(power, np.rint(power), atol=1e-6)
    codes = fmt.encode(x, params)
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes, params), params), codes)
    np.testing.assert_array_equal(fmt.unpack(fmt.pack(codes), codes.shape), codes)
    assert not fmt.fake_quant(np.zeros(4)).any()


def test_bad_input() -> None:
    with pytest.raises(DataError, match="DATA-NEGATIVE"):
        LogFormat(signed=False).encode(np.array([-1.0]))
    with pytest.raises(DataError, match="DATA-NAN"):
        LogFormat().encode(np.array([np.nan]))
    with pytest.raises(DataError, match="DATA-NOT-FINITE"):
        LogFormat().params(np.array([np.inf]))
    for arguments in ({"bits": 1}, {"steps": 3}, {"rounding": "odd"}):
        with pytest.raises(SpecError):
            LogFormat(**arguments)  # type: ignore[arg-type]
