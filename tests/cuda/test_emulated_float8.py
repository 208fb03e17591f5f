"""FP8 activations: rows and groups of rows in E4M3, and products with plain FP8 weights."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.block_format import block_attributes
from onnxq.custom_ops.cuda_calls import Activations
from onnxq.custom_ops.defs.dynamic_float8_mat_mul import spread_scales
from onnxq.formats import parse_format
from tests.cuda.arrays import Array
from tests.cuda.emulation import BFLOAT16, Emulation, half_step
from tests.custom_ops.cases import float8_weight

TYPES = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
E4M3 = ml_dtypes.float8_e4m3fn


def rows(dtype: np.dtype[Any], shape: tuple[int, int]) -> Array:
    rng = np.random.default_rng(2)
    x = (rng.normal(size=shape) * rng.lognormal(0, 2, size=shape)).astype(dtype)
    x[1, :] = 0
    x[0, 1] = -0.0
    x[2, 3] = np.nan
    return x


def rounded(x: Array, group: int) -> Array:
    """What QuantizeBlock makes of rows: the same numbers, which were proven against the format."""
    attributes = block_attributes(parse_format("fp8e4m3"), group=group)
    (y,) = custom_ops.get("QuantizeBlock").reference(x.astype(np.float32), **attributes)
    return y


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    for k in (5, 64, 1000):
        x = rows(dtype, (7, k))
        codes, scale = emulation.per_token(x, Activations.FLOAT8)
        finite = np.isfinite(scale)
        assert np.array_equal(finite, np.isfinite(x.astype(np.float32)).all(axis=1))
        decoded = codes.view(E4M3).astype(np.float32)
        assert not decoded[~finite].any()
        assert np.array_equal((decoded * scale[:, None])[finite], rounded(x, 0)[finite])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("group", [32, 128])
def test_groups(emulation: Emulation, group: int, dtype: np.dtype[Any]) -> None:
    for k in (group, 3 * group, 9 * group):
        x = rows(dtype, (7, k))
        codes, scale = emulation.float8_groups(x, group)
        got = codes.view(E4M3).astype(np.float32) * np.repeat(scale.T, group, axis=1)
        assert np.array_equal(got, rounded(x, group), equal_nan=True)


def test_every_code_is_reached_and_right(emulation: Emulation) -> None:
    """Numbers of the format, the points between them and their neighbours, at a scale of 1."""
    every = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    between = (every[1:] + every[:-1]) / 2
    near = [np.nextafter(between, np.float32(side)) for side in (0, 500)]
    values = np.concatenate([every, between, *near])
    x = np.concatenate([values, -values, [448.0]]).astype(np.float32)[None]
    codes, scale = emulation.per_token(x, Activations.FLOAT8)
    assert scale[0] == 1
    assert np.array_equal(codes, x.astype(E4M3).view(np.uint8))
    assert len(np.unique(codes)) == 254


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("block", [0, 128])
def test_products(emulation: Emulation, block: int, dtype: np.dtype[Any]) -> None:
    """Whatever cuBLASLt takes: all, no scales of rows, no scales of blocks, nothing."""
    rng = np.random.default_rng(4)
    seen = set()
    for (m, k, n), takes in itertools.product(
        ((3, 256, 144), (35, 128, 48), (2, 640, 34)), (7, 6, 4, 0)
    ):
        weights, scales = float8_weight(n, k, block, rng)
        for bias in (np.zeros(1, np.float32), rng.normal(size=n).astype(np.float32)):
            x = (rng.normal(size=(m, k)) * rng.lognormal(size=(m, k))).astype(dtype)
            x[1, k // 2] = np.nan
            got, ran = emulation.float8_mat_mul(
                x, weights.view(np.uint8), scales, bias, block, takes
            )
            seen.add(ran)
            matrix = weights.astype(np.float64) * spread_scales(scales, n, k, block)
            seen_x = rounded(x, block).astype(np.float64)
            expected = seen_x @ matrix.T + bias
            size = np.abs(seen_x) @ np.abs(matrix.T) + np.abs(bias)
            budget = 2.0**-20 * size + half_step(dtype) * 1.01 * np.abs(expected)
            budget += 2.0**-24  # below the least normal float16
            assert np.array_equal(np.isnan(got.astype(np.float32)), np.isnan(expected))
            error = np.abs(got.astype(np.float64) - expected)
            assert (error <= budget)[~np.isnan(expected)].all(), (m, k, n, ran)
    direct = set() if dtype == np.float32 else {"s"}
    assert seen == {"p", "sf" if block else "uf"} | direct
