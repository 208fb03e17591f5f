"""The bodies of the CUDA kernels, run on the CPU with every access checked, against numpy.

What is proven here: each output element is written once, from the right inputs, whatever the
extents; nothing beyond an array is read; shared memory has no race. What is not: that the device's
few primitives (mma, asynchronous copies, conversions) do as the emulator's do; test_device.py and
benchmarks/cuda.py check that where there is a device.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.block_format import block_attributes
from onnxq.custom_ops.cuda_calls import (
    Float8GroupsArgs,
    Float8ProductArgs,
    GatherArgs,
    HadamardArgs,
    MatrixProduct,
    OutlierArgs,
    Outliers,
    PerTokenArgs,
    Plan,
    QuantizeBlockArgs,
    QuantMatMulArgs,
    Route,
    WeightKind,
    WidenArgs,
)
from onnxq.custom_ops.packed_weight import PackedWeight
from onnxq.formats import parse_format
from onnxq.solvers.hadamard import hadamard_matrix
from tests.cuda.arrays import Array
from tests.cuda.emulation import BFLOAT16, Emulation, exact, half_step
from tests.custom_ops.cases import (
    BLOCK_FORMATS,
    CASES,
    quantized_weight,
    same_bits,
    same_numbers,
)

FLOAT16 = np.dtype(np.float16)
TYPES = (FLOAT16, BFLOAT16)
KINDS = {"int4": WeightKind.AFFINE4, "uint4": WeightKind.AFFINE4, "int8": WeightKind.AFFINE8,
         "uint8": WeightKind.AFFINE8, "mxfp4": WeightKind.E2M1, "nvfp4": WeightKind.E2M1,
         "fp8": WeightKind.E4M3, "mxfp8e4m3": WeightKind.E4M3,
         "mxint8": WeightKind.AFFINE8}  # fmt: skip
NARROW = ("binary", "int3", "mxfp6e2m3")  # in planes of 1, 2 and 4 bits

# Of sums in float32 relative to the sum of magnitudes; see docs/cuda.md.
ERROR_BUDGET = 2.0**-23


def weight(kind: str, n: int, k: int, group: int, seed: int = 3) -> PackedWeight:
    rng = np.random.default_rng(seed)
    return quantized_weight(kind, n, k, group, int8_activations=False, rng=rng)


def activations(m: int, k: int, dtype: np.dtype[Any], seed: int = 5) -> Array:
    return np.random.default_rng(seed).normal(size=(m, k)).astype(dtype)


def check(y: Array, x: Array, packed: PackedWeight, *, factor: Array | float = 1.0) -> None:
    """y is the product within the rounding of float32 sums and of its type."""
    product, size = exact(x, packed)
    bias = packed.inputs["bias"].astype(np.float64)
    product = (product - bias) * factor + bias
    k = int(packed.attributes["K"])
    budget = ERROR_BUDGET * (4 + np.sqrt(k)) * size * np.maximum(factor, 1.0)
    budget += np.abs(product) * half_step(x.dtype) * (1 + 2**-9) + 2.0**-25
    worst = np.max(np.abs(y.astype(np.float64) - product) / budget)
    assert worst <= 1, f"{worst} times the budget"


# Around tiles of 16, chunks of 64 and 128 and the eight warps' shares; K of every rest by 16.
GEMVS = (
    (1, 16, 1, 16), (2, 64, 32, 32), (8, 160, 33, 32), (3, 36, 31, 36), (5, 516, 65, 516),
    (7, 1028, 40, 1028), (8, 1040, 64, 80), (1, 2304, 96, 128), (4, 400, 5, 16), (9, 272, 34, 48),
    (17, 132, 3, 132), (2, 1048, 33, 1048), (1, 4, 2, 4),
)  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gemv(emulation: Emulation, kind: str, dtype: np.dtype[Any]) -> None:
    for m, k, n, group in GEMVS:
        packed = weight(kind, n, k, group)
        assert emulation.classify(packed).kind == KINDS[kind]
        x = activations(m, k, dtype)
        check(emulation.quant_mat_mul(x, packed, Route.GEMV), x, packed)


# Rows around 16, 32, 64 and beyond; K around stages of 64; groups of 1, 2, 4, 8 tiles and of all K.
TILES = (
    (9, 64, 32, 16, 2, 1), (16, 72, 130, 72, 2, 1), (17, 320, 33, 32, 4, 1),
    (20, 1024, 129, 128, 4, 3), (33, 456, 96, 64, 8, 2), (70, 640, 40, 128, 8, 5),
    (12, 200, 260, 16, 2, 2), (1, 8, 1, 8, 2, 1),
)  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tile(emulation: Emulation, kind: str, dtype: np.dtype[Any]) -> None:
    for m, k, n, group, row_tiles, splits in TILES:
        packed = weight(kind, n, k, group)
        x = activations(m, k, dtype)
        y = emulation.quant_mat_mul(x, packed, Route.TILE, row_tiles=row_tiles, splits=splits)
        check(y, x, packed)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *TYPES], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "nf4", "mxfp8e5m2", *NARROW])
def test_any(emulation: Emulation, kind: str, dtype: np.dtype[Any]) -> None:
    for m, k, n, group in ((1, 1, 1, 16), (5, 130, 33, 20), (9, 96, 64, 16), (2, 67, 40, 67)):
        packed = weight(kind, n, k, group)
        x = activations(m, k, dtype)
        check(emulation.quant_mat_mul(x, packed, Route.ANY), x, packed)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "nf4", *NARROW])
def test_expand(emulation: Emulation, kind: str, dtype: np.dtype[Any]) -> None:
    for k, n, group in ((1, 1, 16), (130, 33, 20), (600, 40, 32), (67, 32, 67)):
        packed = weight(kind, n, k, group)
        matrix, _ = exact(np.eye(k, dtype=np.float32), packed)
        matrix = (matrix - packed.inputs["bias"]).T
        got = emulation.expand(packed, dtype).astype(np.float64)
        assert np.all(np.abs(got - matrix) <= np.abs(matrix) * half_step(dtype) * 1.001 + 2.0**-25)


def test_row_scales_multiply_before_the_bias(emulation: Emulation) -> None:
    packed = weight("int4", 70, 128, 32)
    bias = np.linspace(-1, 1, 70).astype(np.float32)
    packed = PackedWeight({**packed.inputs, "bias": bias}, packed.attributes)
    x = activations(10, 128, FLOAT16)
    scales = np.linspace(0.5, 2, 10).astype(np.float32)
    for route, row_tiles, splits in ((Route.GEMV, 0, 1), (Route.TILE, 2, 2), (Route.ANY, 0, 1)):
        y = emulation.quant_mat_mul(
            x, packed, route, row_tiles=row_tiles, splits=splits, row_scale=scales
        )
        check(y, x, packed, factor=scales[:, None])


def test_integer_sums_are_exact(emulation: Emulation) -> None:
    """Rounded activations, as int8_activations has them: sums below 2^24 have no error at all."""
    packed = weight("uint4", 64, 512, 128)
    rng = np.random.default_rng(8)
    q = rng.integers(-127, 128, size=(12, 512)).astype(FLOAT16)
    ones = np.ones_like(packed.inputs["scales"])
    packed = PackedWeight(
        {**packed.inputs, "scales": ones}, {**packed.attributes, "factor": 2.0**-12}
    )
    product, _ = exact(q, packed)
    for route, row_tiles in ((Route.GEMV, 0), (Route.TILE, 2)):
        y = emulation.quant_mat_mul(q, packed, route, row_tiles=row_tiles)
        assert same_bits(y, product.astype(np.float32).astype(FLOAT16))


def test_nan_and_infinity_stay_in_their_row(emulation: Emulation) -> None:
    packed = weight("uint4", 40, 160, 32)
    x = activations(20, 160, FLOAT16)
    x[3, 159], x[11, 0], x[19, 77] = np.nan, np.inf, -np.inf
    touched = np.isin(np.arange(20), (3, 11, 19))
    for route, row_tiles in ((Route.GEMV, 0), (Route.TILE, 4), (Route.ANY, 0)):
        y = emulation.quant_mat_mul(x, packed, route, row_tiles=row_tiles)
        assert np.isnan(y[3]).all()
        assert not np.isfinite(y[touched]).any()
        check(y[~touched], x[~touched], packed)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_code_decodes_exactly(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    e4m3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    e2m1 = np.arange(16, dtype=np.uint8).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    half = dtype == FLOAT16
    tables = {
        WeightKind.AFFINE4: np.arange(16, dtype=np.float32),
        WeightKind.AFFINE8: np.arange(256, dtype=np.float32),
        WeightKind.E2M1: e2m1.astype(np.float32) / (2**14 if half else 1),
        WeightKind.E4M3: e4m3 / (2**8 if half else 1),
    }
    for kind, table in tables.items():
        integers = kind in (WeightKind.AFFINE4, WeightKind.AFFINE8)
        wide = (-120.0, -8.0, 7.0, 135.0) if kind == WeightKind.AFFINE4 else (128.0, 255.0)
        for z in (0.0, *wide) if integers else (0.0,):
            for code, place in itertools.product(range(len(table)), range(4)):
                if np.isnan(table[code]):
                    continue
                if len(table) == 16:  # low fields hold the code, high fields its complement
                    byte, other = code | (15 - code) << 4, 5 | 10 << 4
                    expected = np.array([[table[5]] * 4, [table[10]] * 4])
                    expected[:, place] = table[code], table[15 - code]
                else:
                    byte, other = code, 3
                    expected = np.array([[table[3]] * 4])
                    expected[0, place] = table[code]
                word = sum((byte if i == place else other) << 8 * i for i in range(4))
                got = emulation.decode_word(dtype, kind, word, z)
                assert np.array_equal(got, expected - z), (kind, z, code, place)


def test_structs_are_those_of_the_c_interface(emulation: Emulation) -> None:
    mirrored = (
        *(QuantMatMulArgs, PerTokenArgs, HadamardArgs, Plan, MatrixProduct, QuantizeBlockArgs),
        *(OutlierArgs, Outliers, Float8GroupsArgs, Float8ProductArgs, GatherArgs, WidenArgs),
    )
    for which, struct in enumerate(mirrored):
        assert ctypes.sizeof(struct) == emulation.struct_bytes(which), struct


def test_levels_are_recognized(emulation: Emulation) -> None:
    for kind, expected in {**KINDS, "nf4": WeightKind.ANY, "mxfp8e5m2": WeightKind.ANY}.items():
        assert emulation.classify(weight(kind, 8, 64, 32)).kind == expected
    fp8 = weight("fp8", 8, 64, 32)
    assert emulation.classify(fp8, nan_codes=True).kind == WeightKind.ANY
    assert emulation.classify(weight("mxfp4", 8, 64, 32)).unit == 2  # stored doubled


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *TYPES], ids=str)
def test_per_token(emulation: Emulation, dtype: np.dtype[Any], floats: bool) -> None:
    if floats and dtype == np.float32:
        pytest.skip("float32 activations have no tensor-core product")
    reference = custom_ops.get("DynamicQuantizePerToken").reference
    for k in (1, 7, 8, 31, 64, 255, 2048, 2056, 4099):
        x = activations(6, k, dtype)
        x[1, k // 2], x[2, 0], x[3], x[4] = np.nan, np.inf, 0, np.finfo(np.float32).tiny
        x[5] = np.arange(k) - 18.5
        q, scale = emulation.per_token(x, floats=floats)
        expected_q, expected_scale = reference(x.astype(np.float32))
        assert np.array_equal(q.astype(np.int8), expected_q)
        assert np.array_equal(scale, expected_scale[:, 0], equal_nan=True)


HADAMARDS = ((1, 1, 1), (2, 2, 1), (16, 8, 1), (32, 32, 1), (96, 32, 1), (64, 64, 1), (12, 12, 12),
             (240, 24, 12), (112, 56, 28), (1536, 768, 12), (2048, 2048, 1), (8192, 8192, 1),
             (5120, 128, 1), (16384, 16384, 1))  # fmt: skip


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *TYPES], ids=str)
def test_hadamard(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    """The CPU's bits."""
    reference = custom_ops.get("Hadamard").reference
    for k, block, c in HADAMARDS:
        x, core = activations(3, k, dtype), hadamard_matrix(c).astype(np.float32)
        scale = float(np.float32(1 / np.sqrt(block)))
        (expected,) = reference(x.astype(np.float32), core, block=block, scale=scale)
        y, _ = emulation.hadamard(x, core, block, scale)
        assert same_bits(y, expected.astype(dtype)), (k, block, c)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *TYPES], ids=str)
def test_hadamard_quantize(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    """The contract's cases and long rows: the reference's bits."""
    reference = custom_ops.get("HadamardQuantize").reference
    cases = [(case.inputs["x"], case.constants["core"], case.attributes)
             for case in CASES["HadamardQuantize"]("float32")]  # fmt: skip
    for k, block, c in HADAMARDS:
        attributes = {"block": block, "scale": 1 / np.sqrt(block), "group": k}
        cases.append((activations(3, k, dtype), hadamard_matrix(c).astype(np.float32), attributes))
    for x, core, a in cases:
        if x.size == 0:
            continue
        with np.errstate(all="ignore"):
            rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        scale = float(np.float32(a["scale"]))
        expected_q, expected_scales = reference(
            rows.astype(np.float32), core, block=a["block"], scale=scale, group=a["group"]
        )
        q, scales = emulation.hadamard(rows, core, a["block"], scale, group=a["group"])
        assert same_bits(q, expected_q), a
        assert same_numbers(scales, expected_scales), a


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *TYPES], ids=str)
def test_columns_in_another_order(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(6)
    for m, k in ((1, 1), (3, 37), (70, 64)):
        x, order = activations(m, k, dtype), rng.permutation(k)
        assert same_bits(emulation.gather(x, order), x[:, order])
    wrong = np.array([-1, 2, 3])  # columns that do not exist
    assert not emulation.gather(np.ones((2, 3), dtype), wrong)[:, [0, 2]].any()


def test_int8_as_float16(emulation: Emulation) -> None:
    """Every number, at every rest by four; the products of INT8 rows read them so."""
    every = np.arange(-128, 128).astype(np.int8)
    for count in (1, 3, 4, 255, 256):
        assert same_bits(emulation.widen(every[-count:]), every[-count:].astype(np.float16))
    reference = custom_ops.get("QuantMatMulInt8").reference
    packed = weight("int4", 40, 128, 32)
    rng = np.random.default_rng(8)
    q = rng.integers(-127, 128, size=(9, 128)).astype(np.int8)
    scale = rng.uniform(0.1, 1, size=(9, 1)).astype(np.float32)
    weights = [array for name, array in packed.inputs.items() if name != "order"]
    attributes = {**packed.attributes, "int8_activations": 1}
    (expected,) = reference(q, scale, *weights, **attributes)
    for route, tiles in ((Route.GEMV, 0), (Route.TILE, 2), (Route.ANY, 0)):
        y = emulation.quant_mat_mul(
            emulation.widen(q), packed, route, row_tiles=tiles, row_scale=scale[:, 0], sums=True
        )
        _, size = exact(q.astype(np.float64) * scale, packed)
        assert (np.abs(y - expected) <= ERROR_BUDGET * 2 * (4 + np.sqrt(128)) * size).all()


def args_of(m: int, n: int, k: int, group: int) -> QuantMatMulArgs:
    made = QuantMatMulArgs()
    made.m, made.n, made.k, made.group, made.groups = m, n, k, group, -(-k // group)
    made.splits, made.scale_type, made.bits = 1, 1, 4
    return made


def test_plans(emulation: Emulation) -> None:
    def route(m: int, n: int, k: int, group: int, *, library: bool = True) -> Route:
        args = args_of(m, n, k, group)
        kind = WeightKind.AFFINE4
        return Route(emulation.plan(args, kind, multiprocessors=132, library=library).route)

    assert route(1, 4096, 4096, 128) == route(8, 4096, 4096, 32) == Route.GEMV
    assert route(9, 4096, 4096, 32) == route(128, 4096, 4096, 32) == Route.TILE
    assert route(129, 4096, 4096, 32) == Route.EXPAND
    assert route(129, 4096, 4096, 32, library=False) == Route.TILE
    assert route(9, 4096, 4100, 4100) == Route.GEMV  # rows of x begin at 8 bytes, not at 16
    assert route(1, 4096, 4097, 4097) == Route.ANY  # nor at 8
    assert route(1, 4096, 65536, 32) == Route.TILE  # more scales than shared memory holds
    assert route(9, 4096, 4096, 48) == Route.GEMV  # a stage would hold parts of groups
    assert route(1, 4096, 4096, 20) == Route.ANY


def test_plans_fill_the_device_and_no_more(emulation: Emulation) -> None:
    for m, n, k in itertools.product((9, 33, 65), (64, 576, 4096, 50000), (64, 1536, 11008)):
        args = args_of(m, n, k, 32)
        plan = emulation.plan(args, WeightKind.AFFINE4, multiprocessors=132, library=True)
        blocks = -(-n // 128) * -(-m // (8 * plan.row_tiles))
        stages = -(-k // 64)
        assert plan.splits >= 1
        assert plan.splits == 1 or blocks * plan.splits <= 132
        assert plan.splits == 1 or stages // plan.splits >= 7  # each fills the pipeline
        assert plan.scratch_bytes == (plan.splits * m * n * 4 if plan.splits > 1 else 0)
        assert plan.shared_bytes <= 160 * 1024  # of a multiprocessor of sm_80


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *TYPES], ids=str)
def test_quantize_block(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    """The contract's cases, and rows of 16-byte words: the reference's bits."""
    operator = custom_ops.get("QuantizeBlock")
    rng = np.random.default_rng(7)
    source = "float32" if dtype == np.float32 else "float16"
    cases = [(case.inputs["x"], case.attributes) for case in CASES["QuantizeBlock"](source)]
    for (name, group), k in itertools.product(BLOCK_FORMATS, (64, 256, 1024)):
        x = rng.normal(size=(5, k)) * rng.lognormal(0, 3, size=(5, k))
        x[1, 3], x[2, 40], x[3] = np.nan, np.inf, 0
        cases.append((x, block_attributes(parse_format(name), group=group)))
    vectors = 0
    for x, attributes in cases:
        if x.size == 0:
            continue
        with np.errstate(all="ignore"):
            rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        (expected,) = operator.reference(rows, **attributes)
        got = emulation.quantize_block(rows, attributes)
        assert same_numbers(got.astype(np.float32), expected.astype(np.float32)), attributes
        block = int(attributes["block"])
        vectors += block > 0 and block % 8 == 0 and rows.shape[1] % block == 0
    assert vectors > 20  # the kernel of 16-byte words took its share
