"""GPTQ and GPTAQ: exact small cases, published order of merit, every kind of format, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from onnxq.errors import DataError, SpecError, UnsupportedError
from onnxq.formats import IntFormat, parse_format
from onnxq.solvers.gptaq import gptaq
from onnxq.solvers.gptq import gptq
from onnxq.solvers.hessian import inverse_factor, output_error
from onnxq.solvers.rtn import rtn
from onnxq.solvers.scale_search import mse_params

INT4 = IntFormat(4)
FORMATS = ["int4g32", "int4g64asym", "int3g32full", "uint2g16", "mxfp4", "mxint8", "nvfp4",
           "nvfp4-46", "nf4", "fp4g32", "fp8e4m3", "int8", "mxfp6e2m3-43"]  # fmt: skip


def loss(layer: Any, W_hat: np.ndarray) -> float:
    return output_error(layer.W, W_hat, layer.H_float)


def test_inverse_factor(layer: Any) -> None:
    factor, damp = inverse_factor(layer.H, 0.01)
    damped = layer.H + 0.01 * np.mean(np.diag(layer.H)) * np.eye(len(layer.H))
    assert damp == 0.01
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(len(damped)), atol=1e-8)
    reference = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(factor, reference, rtol=1e-6, atol=1e-9)


def test_without_correlation_gptq_is_rounding_to_nearest(layer: Any) -> None:
    H = np.diag(np.random.default_rng(1).uniform(0.5, 2, layer.W.shape[1]))
    for order in (False, True):
        got = gptq(layer.W, H, INT4, act_order=order)
        np.testing.assert_array_equal(
            got.codes.astype(int), rtn(layer.W, INT4, group=0).codes.astype(int)
        )


def test_the_last_column_takes_the_exact_optimum() -> None:
    """Two columns: given the first's code, the second must be the best of all codes."""
    rng = np.random.default_rng(2)
    X = np.linalg.cholesky([[1, 0.9], [0.9, 1]]) @ rng.standard_normal((2, 500))
    H = X @ X.T
    W = rng.standard_normal((40, 2)).astype(np.float32)
    got = gptq(W, H, INT4, damp=0.0)
    scale = got.params.scale[:, None].astype(np.float64)
    codes = got.codes.astype(int)
    for row in range(len(W)):
        errors = []
        for second in range(-8, 8):
            delta = W[row] - scale[row] * [codes[row, 0], second]
            errors.append(delta @ H @ delta)
        assert codes[row, 1] == np.argmin(errors) - 8


def test_it_is_near_the_best_of_all_roundings() -> None:
    """Six columns, all 2^6 up/down choices: GPTQ lies between the best and RTN, near the best."""
    rng = np.random.default_rng(3)
    X = rng.standard_normal((6, 6)) @ rng.standard_normal((6, 200))
    H = X @ X.T
    W = rng.standard_normal((30, 6)).astype(np.float32)
    fmt = IntFormat(3)
    got, plain = gptq(W, H, fmt, act_order=True, damp=0.0), rtn(W, fmt, group=0)
    scale = plain.params.scale[:, None]
    down = np.floor(W / scale)
    best = np.full(len(W), np.inf)
    for choice in itertools.product([0, 1], repeat=6):
        delta = (np.clip(down + choice, -4, 3) * scale - W).astype(np.float64)
        best = np.minimum(best, np.einsum("nk,kl,nl->n", delta, H, delta))
    mine, naive = output_error(W, got.values(), H), output_error(W, plain.values(), H)
    optimum = best.sum() / np.einsum("nk,kl,nl->", W, H, W)
    assert mine < naive
    assert mine - optimum < 0.25 * (naive - optimum)


def test_order_of_merit(layer: Any) -> None:
    """RTN > MSE > GPTQ > act-order > both, with gains like the published ones."""
    H = layer.H_float
    errors = [
        loss(layer, s.values())
        for s in (
            rtn(layer.W, INT4, group=0),
            rtn(layer.W, INT4, params=mse_params(layer.W, INT4, group=0)),
            gptq(layer.W, H, INT4, group=0, act_order=False),
            gptq(layer.W, H, INT4, group=0, act_order=True),
            gptq(layer.W, H, INT4, group=0, act_order=True, mse=True),
        )
    ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.75 * errors[0]
    assert errors[3] < 0.5 * errors[2]
    assert errors[4] < 0.8 * errors[3]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_beats_rounding_to_nearest_and_stays_on_its_grid(
    layer: Any, name: str
) -> None:
    fmt = parse_format(name)
    plain = loss(layer, rtn(layer.W, fmt, group=None).values())
    for options in ({}, {"act_order": False}):
        got = gptq(layer.W, layer.H_float, fmt, **options)
        assert loss(layer, got.values()) < plain
        assert got.codes.shape == layer.W.shape
        again = fmt.encode(got.values(), got.params)
        np.testing.assert_array_equal(fmt.decode(again, got.params), got.values())
        np.testing.assert_array_equal(fmt.unpack(fmt.pack(got.codes), got.codes.shape), got.codes)


@pytest.mark.parametrize("static", [True, False])
def test_block_size_does_not_change_the_result(layer: Any, static: bool) -> None:
    fmt = parse_format("int4g32")
    whole = gptq(layer.W, layer.H_float, fmt, static_groups=static, block=256)
    for block in (32, 64, 1000):
        other = gptq(layer.W, layer.H_float, fmt, static_groups=static, block=block)
        # float32 sums in another order move only what is near a tie.
        assert np.mean(other.codes.astype(int) == whole.codes.astype(int)) > 0.998


def test_refreshed_groups_are_scaled_by_what_they_hold(layer: Any) -> None:
    fmt = parse_format("int4g32")
    moving = gptq(layer.W, layer.H_float, fmt, static_groups=False)
    fixed = gptq(layer.W, layer.H_float, fmt)
    np.testing.assert_array_equal(moving.params.scale[:, 0], fixed.params.scale[:, 0])
    assert not np.array_equal(moving.params.scale[:, 1:], fixed.params.scale[:, 1:])


def test_dead_inputs_get_zero_weights(layer: Any) -> None:
    H = layer.H_float.copy()
    H[[3, 100]] = 0
    H[:, [3, 100]] = 0
    values = gptq(layer.W, H, parse_format("int4g32")).values()
    assert not values[:, [3, 100]].any()
    assert np.isfinite(values).all()


def test_singular_hessian_is_damped_until_it_works(layer: Any) -> None:
    few = layer.X[:, :8]
    H = few @ few.T
    assert np.isfinite(gptq(layer.W, H, INT4, damp=0.0).values()).all()
    np.testing.assert_array_less(
        output_error(layer.W, gptq(layer.W, H, INT4).values(), H),
        output_error(layer.W, rtn(layer.W, INT4, group=0).values(), H),
    )


def test_zero_and_tiny_rows(layer: Any) -> None:
    W = layer.W.copy()
    W[0], W[1] = 0, 1e-42
    for name in ("int4g32", "nvfp4", "mxfp4", "uint4g32"):
        values = gptq(W, layer.H_float, parse_format(name)).values()
        assert np.isfinite(values).all()
        assert not values[0].any()


def test_columns_that_no_group_divides() -> None:
    rng = np.random.default_rng(4)
    W = rng.standard_normal((8, 45)).astype(np.float32)
    X = rng.standard_normal((45, 45)) @ rng.standard_normal((45, 300))
    for name in ("int4g16", "mxfp4", "uint4g16"):
        got = gptq(W, X @ X.T, parse_format(name))
        assert output_error(W, got.values(), X @ X.T) < output_error(
            W, rtn(W, parse_format(name)).values(), X @ X.T
        )


def test_gptaq_is_gptq_without_mismatch_and_better_with_it(layer: Any) -> None:
    fmt = parse_format("int4g32")
    plain = gptq(layer.W, layer.H, fmt)
    same = gptaq(layer.W, layer.H, np.zeros_like(layer.H), fmt)
    np.testing.assert_array_equal(same.codes.astype(int), plain.codes.astype(int))
    for options in ({}, {"act_order": False}):
        plain = gptq(layer.W, layer.H, fmt, **options)
        aware = gptaq(layer.W, layer.H, layer.D, fmt, **options)
        assert layer.loss(aware.values()) < 0.97 * layer.loss(plain.values())


def test_bad_input(layer: Any) -> None:
    W, H = layer.W, layer.H
    broken = W.copy()
    broken[1, 2] = np.nan
    with pytest.raises(DataError, match="DATA-NOT-FINITE"):
        gptq(broken, H, INT4)
    with pytest.raises(DataError, match="DATA-NOT-FINITE"):
        gptq(W, np.where(H[0, 1] == H, np.nan, H), INT4)
    with pytest.raises(DataError, match="DATA-SHAPE"):
        gptq(W, H[:10, :10], INT4)
    with pytest.raises(DataError, match="DATA-SHAPE"):
        gptq(W[0], H, INT4)
    with pytest.raises(DataError, match="DATA-HESSIAN"):
        gptq(W, 2 * np.eye(len(H)) - np.ones_like(H), INT4)
    with pytest.raises(SpecError, match="SPEC-ACT-ORDER"):
        gptq(W, H, parse_format("int4g32"), act_order=True, static_groups=False)
    with pytest.raises(SpecError, match="SPEC-ACT-ORDER"):
        gptaq(W, H, layer.D, parse_format("int4g32"), act_order=True, static_groups=False)
    for name in ("kmeans4", "mx6", "ternary"):
        with pytest.raises(UnsupportedError, match="UNSUPPORTED-GRID"):
            gptq(W, H, parse_format(name))
