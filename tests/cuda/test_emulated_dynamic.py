"""DynamicQuantMatMul's kernels, run on the CPU one after another as the operator launches them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.cuda_calls import Outliers, QuantMatMulArgs, Route
from onnxq.custom_ops.defs.dynamic_quant_mat_mul import outlier_columns
from onnxq.custom_ops.packed_weight import PackedWeight
from tests.cuda.arrays import Array
from tests.cuda.emulation import BFLOAT16, Emulation, exact, half_step
from tests.custom_ops.cases import CASES, quantized_weight, same_bits, same_numbers

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
ERROR_BUDGET = 2.0**-23


def product(
    emulation: Emulation,
    x: Array,
    packed: PackedWeight,
    named: Array,
    threshold: float,
    route: Route,
) -> Array:
    """What the operator launches for ``[M, K]``."""
    adds = len(named) > 0 or threshold > 0
    mask, columns, count = None, np.zeros(x.shape[1], np.int32), 0
    if adds:
        mask, columns, count = emulation.find_outliers(x, named, threshold)
        expected = outlier_columns(x.astype(np.float32), named, threshold)
        assert list(columns[:count]) == expected
        assert sorted(columns) == list(range(x.shape[1]))
        assert list(np.flatnonzero(mask)) == expected
    q, scale = emulation.per_token(x, floats=route != Route.INTEGER, outlier=mask)
    if route == Route.INTEGER:
        y = emulation.integer_product(q, packed, scale, x.dtype, sums=adds)
    else:
        rows = {"row_tiles": 2} if route == Route.TILE else {}
        y = emulation.quant_mat_mul(q, packed, route, row_scale=scale, sums=adds, **rows)
    return emulation.add_outliers(y, x, packed, columns, count) if adds else y


def unordered(packed: PackedWeight) -> list[Array]:
    """The inputs behind x of operators without an order of columns."""
    return [array for name, array in packed.inputs.items() if name != "order"]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_the_contract_s_cases(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    """By the plain kernel, and by those of the tensor cores where they take the shape."""
    routes = set()
    for case in CASES["DynamicQuantMatMul"]("float16"):
        x = case.inputs["x"].reshape(-1, case.inputs["x"].shape[-1]).astype(dtype)
        if x.size == 0:
            continue
        constants = dict(case.constants)
        named = constants.pop("outliers")
        attributes = dict(case.attributes)
        threshold = attributes.pop("threshold")
        packed = PackedWeight(constants, attributes)
        reference = custom_ops.get("DynamicQuantMatMul").reference
        (expected,) = reference(x, *constants.values(), named, threshold=threshold, **attributes)
        for route in routes_of(emulation, x, packed):
            routes.add(route)
            got = product(emulation, x, packed, named, threshold, route)
            assert_close(got, expected, x, packed, f"{case.name} {route}")
    assert len(routes) == (1 if dtype == FLOAT32 else 3)


def routes_of(emulation: Emulation, x: Array, packed: PackedWeight) -> list[Route]:
    """Those that take the shape and the weight."""
    k, group = int(packed.attributes["K"]), int(packed.attributes["group"])
    routes = [Route.ANY]
    if x.dtype == FLOAT32 or emulation.classify(packed).kind == 0:
        return routes
    if k % 4 == 0 and (group >= k or group % 16 == 0):
        routes.append(Route.GEMV)
    if k % 8 == 0 and (group >= k or group in (16, 32) or group % 64 == 0):
        routes.append(Route.TILE)
    return routes


def assert_close(got: Array, expected: Array, x: Array, packed: PackedWeight, what: str) -> None:
    """Within the rounding of sums in another order, and of the type."""
    with np.errstate(all="ignore"):
        finite = np.isfinite(x.astype(np.float64))
        _, size = exact(np.where(finite, x.astype(np.float64), 0), packed)
        wanted = expected.astype(np.float64)
        budget = 2 * ERROR_BUDGET * (4 + np.sqrt(x.shape[1])) * size * 1.01
        budget += 2 * np.abs(wanted) * half_step(x.dtype) + 2.0**-24
        close = np.abs(got.astype(np.float64) - wanted) <= budget
    assert (close | (np.isnan(got) & np.isnan(expected)) | (got == expected)).all(), what


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int3"])
def test_products_of_integers_have_the_cpu_s_bits(
    emulation: Emulation, kind: str, dtype: np.dtype[Any]
) -> None:
    rng = np.random.default_rng(3)
    reference = custom_ops.get("DynamicQuantMatMul").reference
    for m, k, n in ((130, 64, 48), (7, 1040, 16), (200, 128, 272)):
        packed = quantized_weight(kind, n, k, k, int8_activations=True, rng=rng)
        bias = rng.normal(size=n).astype(np.float32)
        packed = PackedWeight({**packed.inputs, "bias": bias}, packed.attributes)
        x = rng.normal(size=(m, k)).astype(dtype)
        x[:, 3] *= 20
        x[1, 5] = np.nan
        for named, threshold in (([], 0.0), ([5, 3, 3], 0.0), ([0, k - 1], 8.0)):
            columns = np.array(named, np.int64)
            (expected,) = reference(
                x, *unordered(packed), columns, threshold=threshold, **packed.attributes
            )
            got = product(emulation, x, packed, columns, threshold, Route.INTEGER)
            assert same_numbers(got.astype(np.float32), expected.astype(np.float32)), (m, k, n)


def test_without_outliers_rows_are_those_of_per_token(emulation: Emulation) -> None:
    x = np.random.default_rng(1).normal(size=(5, 96)).astype(FLOAT16)
    mask, _, count = emulation.find_outliers(x, np.array([-1, 96, 400], np.int64), 0.0)
    assert count == 0  # columns that do not exist name nothing
    for got, expected in zip(
        emulation.per_token(x, outlier=mask), emulation.per_token(x), strict=True
    ):
        assert same_bits(got, expected)


def test_levels_of_int8(emulation: Emulation) -> None:
    for levels, bits, expected in (
        (np.arange(-128, 128), 8, True),
        (np.arange(256), 8, False),
        (np.linspace(-1, 1, 16), 4, False),
        (np.arange(-8, 8), 4, True),
    ):
        assert emulation.has_int8_levels(levels.astype(np.float32), bits) is expected


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_the_launch_function(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    """Every kernel in its order, on one piece of scratch memory; cuBLASLt is a loop."""
    rng = np.random.default_rng(9)
    routes = set()
    for m, (k, n, group) in itertools.product((3, 20, 130), ((128, 48, 128), (96, 40, 32))):
        x = rng.normal(size=(m, k)).astype(dtype)
        x[:, 3] *= 20
        int8 = quantized_weight("int8", n, k, group, int8_activations=True, rng=rng)
        for named, threshold in (([], 0.0), ([5, 3, 3], 0.0), ([k - 1], 8.0)):
            if m == 130 and group < k:
                continue  # goes to 16-bit products of cuBLASLt
            columns = np.array(named, np.int64)
            reference = custom_ops.get("DynamicQuantMatMul").reference
            (expected,) = reference(
                x, *unordered(int8), columns, threshold=threshold, **int8.attributes
            )
            got, route = emulation.dynamic_product(x, int8, columns, threshold)
            routes.add(route)
            assert_close(got, expected, x, int8, f"{m} {k} {named} {route}")
    tensor_cores = set() if dtype == FLOAT32 else {Route.GEMV, Route.TILE}
    plain = {Route.ANY} if dtype == FLOAT32 else set()
    assert routes == {Route.INTEGER} | tensor_cores | plain


def test_parts_of_scratch_memory_lie_behind_one_another(emulation: Emulation) -> None:
    args = QuantMatMulArgs(m=200, n=48, k=100)
    for route, outliers, adds in (
        (Route.INTEGER, Outliers(), False),
        (Route.GEMV, Outliers(named_count=3), True),
        (Route.EXPAND, Outliers(threshold=6.0), True),
    ):
        at = emulation.dynamic_scratch(args, route, 2, outliers)
        pieces = 3 if outliers.threshold > 0 else 1
        sizes = [200 * 100 * (1 if route == Route.INTEGER else 2), 200 * 4]
        sizes += [pieces * 100, 100, 100 * 4, 4, 200 * 48 * 4] if adds else [0] * 5
        assert all(place % 256 == 0 for place in at)
        for size, begin, end in zip(sizes, at[:-1], at[1:], strict=True):
            assert size <= end - begin < size + 256


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_integer_scales(emulation: Emulation, dtype: np.dtype[Any]) -> None:
    """i16 scales, with and without zero points, as floats that they are."""
    rng = np.random.default_rng(5)
    reference = custom_ops.get("QuantMatMul").reference
    for kind, (m, k, n, group) in itertools.product(
        ("int4", "uint4"), ((3, 128, 40, 32), (10, 192, 96, 64))
    ):
        packed = quantized_weight(
            kind, n, k, group, int8_activations=True, rng=rng, scale_type="int16"
        )
        x = rng.normal(size=(m, k)).astype(dtype)
        (expected,) = reference(x, *packed.inputs.values(), **packed.attributes)
        for route in routes_of(emulation, x, packed):
            got = product(emulation, x, packed, np.zeros(0, np.int64), 0.0, route)
            assert_close(got, expected, x, packed, f"{kind} {route}")
