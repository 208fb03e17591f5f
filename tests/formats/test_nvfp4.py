"""NVFP4 and four-over-six against their definition through ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnxq.errors import DataError, SpecError
from onnxq.formats import Granularity, NvFp4Format, parse_format


def definition(x: np.ndarray) -> np.ndarray:
    """x [G, 16] float32; q * (s * g), every cast done by ml_dtypes."""
    g = np.float32(np.abs(x).max() / 2688)
    s = (np.abs(x).max(axis=1, keepdims=True).astype(float) / 6 / float(g)).astype(np.float32)
    scale = s.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * g
    return np.clip(x / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale


@pytest.mark.parametrize("seed", range(3))
def test_definition_bit_for_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((512, 16)) * 2.0 ** rng.uniform(-3, 3, (512, 1))).astype(np.float32)
    np.testing.assert_array_equal(NvFp4Format().fake_quant(x), definition(x))


def test_scales_have_their_own_types_and_bits() -> None:
    x = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    params = NvFp4Format().params(x)
    assert params.scale.dtype == ml_dtypes.float8_e4m3fn
    assert params.scale.shape == (8, 4)
    assert params.scale.astype(float).max() == 448
    assert NvFp4Format(True).params(x).scale.astype(float).max() in (256, 384)
    assert NvFp4Format().bits_per_element((8, 64)) == 4.5 + 32 / 512


def test_four_over_six_helps_where_a_block_has_values_between_four_and_six() -> None:
    x = np.array(
        [[10, 10, 20, 30, 40, 30, 20, 15] * 2, [6, 4, 3, 2, 1.5, 1, 0.5, 0] * 2], np.float32
    )
    plain, better = NvFp4Format().fake_quant(x), NvFp4Format(True).fake_quant(x)
    assert np.sum((better[0] - x[0]) ** 2) < np.sum((plain[0] - x[0]) ** 2)
    scale = NvFp4Format(True).params(x).scale.astype(float)
    assert scale[0] == 1.5 * 256  # the extreme, 40, is on 4
    assert np.abs(better[0] - x[0]).max() < 0.7


def test_four_over_six_never_loses_against_its_own_six() -> None:
    x = np.random.default_rng(2).standard_t(3, (1000, 16)).astype(np.float32)
    g = np.abs(x).max() / (6 * 256)
    s = (np.abs(x).max(axis=1, keepdims=True) / 6 / g).astype(ml_dtypes.float8_e4m3fn)
    scale = s.astype(np.float32) * np.float32(g)
    six = np.clip(x / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    four_six = NvFp4Format(True).fake_quant(x)
    lost = np.sum((four_six - x) ** 2, 1) - np.sum((six - x) ** 2, 1)
    assert lost.max() <= 1e-5 * np.abs(x).max() ** 2
    assert (lost < 0).mean() > 0.3


def test_zero_blocks_tiny_blocks_and_zero_tensors() -> None:
    x = np.zeros((3, 16), np.float32)
    x[0] = 1000
    x[1] = 1e-6  # its scale rounds to zero
    for fmt in (NvFp4Format(), NvFp4Format(True)):
        values = fmt.fake_quant(x)
        np.testing.assert_allclose(values[0], 1000, rtol=1e-6)
        assert not values[1:].any()
        assert not fmt.fake_quant(np.zeros((2, 20))).any()
        assert np.isfinite(fmt.fake_quant(np.full(16, 3e38))).all()
        assert np.isfinite(fmt.fake_quant(np.full(16, 1e-44))).all()


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-46"])
def test_idempotent_ragged_and_packable(name: str) -> None:
    fmt = parse_format(name)
    x = np.random.default_rng(3).standard_normal((5, 37)).astype(np.float32)
    params = fmt.params(x)
    assert params.scale.shape == (5, 3)
    codes = fmt.encode(x, params)
    np.testing.assert_array_equal(fmt.encode(fmt.decode(codes, params), params), codes)
    np.testing.assert_array_equal(fmt.unpack(fmt.pack(codes), codes.shape), codes)
    np.testing.assert_array_equal(fmt.fake_quant(x.T, axis=0), fmt.fake_quant(x).T)


def test_shared_tensor_range() -> None:
    x = np.random.default_rng(4).standard_normal((4, 16)).astype(np.float32)
    params = NvFp4Format().params(x, tensor_amax=26.88)
    assert params.global_scale == np.float32(0.01)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="DATA-NOT-FINITE"):
        NvFp4Format().params(np.array([1, np.nan]))
    with pytest.raises(SpecError, match="SPEC-GRANULARITY"):
        NvFp4Format().params(np.zeros((2, 64)), Granularity.per_channel(0))
    with pytest.raises(SpecError):
        NvFp4Format(block=0)
