"""Binary, ternary and 2-bit SEQ formats against their papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.errors import DataError, SpecError
from onnxq.formats import BinaryFormat, Granularity, Seq2Format, TernaryFormat, parse_format

ROWS = Granularity.per_channel(0)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, 101)).astype(np.float32)


def test_binary_is_sign_times_mean_magnitude(x: np.ndarray) -> None:
    x[0, 0] = 0
    expected = np.where(x >= 0, 1, -1) * np.abs(x).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(BinaryFormat().fake_quant(x, ROWS), expected, rtol=1e-6)


def test_binary_packs_as_numpy_does(x: np.ndarray) -> None:
    codes = BinaryFormat().encode(x)
    data = BinaryFormat().pack(codes)
    assert data == np.packbits(x.ravel() >= 0, bitorder="little").tobytes()
    np.testing.assert_array_equal(BinaryFormat().unpack(data, x.shape), codes)


def test_mean_of_a_ragged_block_counts_real_elements_only() -> None:
    values = BinaryFormat(block=4).fake_quant(np.array([1, 1, 1, 1, 5, -7], np.float32))
    np.testing.assert_array_equal(values, [1, 1, 1, 1, 6, -6])


def test_ternary_twn(x: np.ndarray) -> None:
    delta = 0.7 * np.abs(x).mean(axis=1, keepdims=True)
    big = np.abs(x) > delta
    alpha = (np.abs(x) * big).sum(axis=1, keepdims=True) / big.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        TernaryFormat().fake_quant(x, ROWS), np.sign(x) * big * alpha, rtol=1e-5
    )


def test_ternary_absmean(x: np.ndarray) -> None:
    mean = np.abs(x).mean(axis=1, keepdims=True)
    expected = np.clip(np.rint(x / mean), -1, 1) * mean
    np.testing.assert_allclose(TernaryFormat("absmean").fake_quant(x, ROWS), expected, rtol=1e-5)


def test_ternary_elastic(x: np.ndarray) -> None:
    alpha = np.abs(x).max(axis=1, keepdims=True)
    expected = np.rint(np.clip(x / alpha, -0.99, 0.99) * 1.5) / 1.5 * alpha
    np.testing.assert_allclose(TernaryFormat("elastic").fake_quant(x, ROWS), expected, rtol=1e-5)


def test_ternary_ttq_has_a_level_for_each_sign(x: np.ndarray) -> None:
    values = TernaryFormat("ttq").fake_quant(x, ROWS)
    for row, got in zip(x, values, strict=True):
        bound = 0.05 * np.abs(row).max()
        expected = np.where(row > bound, row[row > bound].mean(), 0)
        expected = np.where(row < -bound, row[row < -bound].mean(), expected)
        np.testing.assert_allclose(got, expected, rtol=2e-3)  # the levels are float16


def test_seq2(x: np.ndarray) -> None:
    alpha = np.abs(x).max(axis=1, keepdims=True)
    expected = (np.rint(np.clip(x / alpha, -0.99, 0.99) * 2 - 0.5) + 0.5) / 2 * alpha
    np.testing.assert_allclose(Seq2Format().fake_quant(x, ROWS), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        Seq2Format().decode(np.arange(4).astype(np.uint8)), [-0.75, -0.25, 0.25, 0.75]
    )


@pytest.mark.parametrize(
    "name",
    ["binary", "ternary", "ternary-absmean", "ternary-elastic", "ternary-ttq", "seq2", "seq2g16"],
)
def test_idempotent_packable_and_zero(name: str, x: np.ndarray) -> None:
    fmt = parse_format(name)
    params = fmt.params(x)
    codes = fmt.encode(x, params)
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes, params), params), codes)
    np.testing.assert_array_equal(fmt.unpack(fmt.pack(codes), codes.shape), codes)
    assert np.isfinite(fmt.fake_quant(np.zeros((2, 5)))).all()
    if name.startswith("ternary"):
        assert not fmt.fake_quant(np.zeros((2, 5))).any()


def test_five_trits_make_a_byte() -> None:
    codes = np.array([-1, 0, 1, 1, -1, 1], np.int8)
    assert TernaryFormat().pack(codes) == bytes([0 + 3 + 2 * 9 + 2 * 27 + 0, 2 + 3 + 9 + 27 + 81])
    everything = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5), axis=-1).reshape(-1, 5).astype(np.int8)
    data = TernaryFormat().pack(everything)
    assert sorted(data) == list(range(243))
    np.testing.assert_array_equal(TernaryFormat().unpack(data, (243, 5)), everything)
    with pytest.raises(DataError, match="DATA-PACKED"):
        TernaryFormat().unpack(bytes([243]), (5,))


def test_bits() -> None:
    shape = (32, 320)
    assert TernaryFormat().bits_per_element(shape) == pytest.approx(1.6 + 32 / 10240)
    assert BinaryFormat(block=32).bits_per_element(shape) == 2
    assert Seq2Format(block=32).bits_per_element(shape, scale_bits=16) == 2.5


def test_bad_input() -> None:
    for fmt in (BinaryFormat(), TernaryFormat(), Seq2Format()):
        with pytest.raises(DataError, match="DATA-NOT-FINITE"):
            fmt.params(np.array([1, np.nan]))
        with pytest.raises(DataError, match="DATA-NAN"):
            fmt.encode(np.array([np.nan]))
    with pytest.raises(SpecError):
        TernaryFormat("odd")  # type: ignore[arg-type]
