"""FP8 activations: rows and groups of rows in E4M3, and what stands around cuBLASLt's product."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.block_format import block_attributes
from onnxq.custom_ops.cuda_calls import Activations, Operands, QuantMatMulArgs, Route, WeightKind
from onnxq.custom_ops.packed_weight import PackedWeight
from onnxq.formats import parse_format
from tests.cuda.emulation import BFLOAT16, Array, Emulation, exact, half_step
from tests.custom_ops.cases import quantized_weight, same_bits

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
        numbers, same = emulation.per_token(x, Activations.FLOAT8, floats=True)
        assert same_bits(scale, same)
        finite = np.isfinite(scale)
        assert np.array_equal(finite, np.isfinite(x.astype(np.float32)).all(axis=1))
        decoded = codes.view(E4M3).astype(np.float32)
        assert np.array_equal(decoded, numbers.astype(np.float32))
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
def test_products(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(4)
    for m, k, n in ((130, 64, 48), (5, 272, 96)):
        packed = quantized_weight("fp8", n, k, k, int8_activations=False, rng=rng)
        bias = rng.normal(size=n).astype(np.float32)
        packed = PackedWeight({**packed.inputs, "bias": bias}, packed.attributes)
        x = rng.normal(size=(m, k)).astype(dtype)
        q, scale = emulation.per_token(x, Activations.FLOAT8)
        got = emulation.float8_product(q, packed, scale, dtype)
        seen = q.view(E4M3).astype(np.float64) * scale[:, None]
        expected, size = exact(seen, packed)
        budget = 2.0**-22 * size + half_step(dtype) * 1.01 * np.abs(expected)
        assert (np.abs(got.astype(np.float64) - expected) <= budget).all()


def test_plans(emulation: Emulation) -> None:
    there = 1  # any address: the plan asks whether rows have scales
    args = QuantMatMulArgs(m=129, n=512, k=512, group=512, groups=1, row_scale=there, bits=8)

    def route(**changes: int) -> Route:
        for name, value in changes.items():
            setattr(args, name, value)
        plan = emulation.plan(
            args, WeightKind.E4M3, multiprocessors=132, library=True, operands=Operands.FLOAT8
        )
        return Route(plan.route)

    assert route() == Route.FLOAT8
    assert route(m=128) == Route.TILE
    assert route(m=4096, k=520) == Route.EXPAND  # cuBLASLt takes FP8 by 16
    assert route(k=512, groups=4, group=128) == Route.EXPAND
    assert route(groups=1, group=512, row_scale=0) == Route.EXPAND
