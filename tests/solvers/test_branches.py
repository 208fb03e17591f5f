"""Low-rank branches, bias correction and MagR: their defining optimality."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxq.errors import DataError, SpecError
from onnxq.formats import parse_format
from onnxq.solvers.bias_correction import bias_correction
from onnxq.solvers.hessian import output_error
from onnxq.solvers.low_rank import low_rank_compensate, low_rank_split
from onnxq.solvers.magr import magr, project_l1
from onnxq.solvers.rtn import rtn


def test_split_adds_up_and_is_the_best_of_its_rank(layer: Any) -> None:
    left, right, residual = low_rank_split(layer.W, 16)
    np.testing.assert_allclose(left @ right + residual, layer.W, atol=1e-5)
    singular = np.linalg.svd(layer.W.astype(np.float64), compute_uv=False)
    assert np.sum(residual.astype(float) ** 2) == pytest.approx(
        np.sum(singular[16:] ** 2), rel=1e-5
    )


def test_split_helps_rounding_when_outliers_are_low_rank(layer: Any) -> None:
    rng = np.random.default_rng(0)
    W = layer.W + 8 * np.outer(rng.standard_normal(64), rng.standard_normal(256)).astype(np.float32)
    fmt = parse_format("int4g64")
    left, right, residual = low_rank_split(W, 4)
    split = left @ right + rtn(residual, fmt).values()
    assert np.sum((split - W) ** 2) < 0.1 * np.sum((rtn(W, fmt).values() - W) ** 2)


def test_compensation_is_the_best_of_its_rank_in_the_norm_of_the_inputs(layer: Any) -> None:
    H = layer.H_float
    W_hat = rtn(layer.W, parse_format("int3g32")).values()
    B, A = low_rank_compensate(layer.W, W_hat, H, 8)
    delta = (layer.W - W_hat).astype(np.float64)
    # Eckart-Young on delta H^(1/2), with a square root found in another way.
    root = np.linalg.cholesky(H + 1e-9 * np.eye(len(H)))
    singular = np.linalg.svd(delta @ root, compute_uv=False)
    rest = delta - B.astype(np.float64) @ A
    assert np.sum((rest @ H) * rest) == pytest.approx(np.sum(singular[8:] ** 2), rel=1e-4)
    u, s, v = np.linalg.svd(delta)
    plain = W_hat + (u[:, :8] * s[:8]) @ v[:8]
    assert output_error(layer.W, W_hat + B @ A, H) < 0.95 * output_error(layer.W, plain, H)


def test_compensation_with_a_singular_hessian(layer: Any) -> None:
    few = layer.X[:, :5]
    W_hat = rtn(layer.W, parse_format("int3g32")).values()
    B, A = low_rank_compensate(layer.W, W_hat, few @ few.T, 8)
    assert np.isfinite(B).all()
    assert np.isfinite(A).all()
    assert output_error(layer.W, W_hat + B @ A, few @ few.T) < 1e-6


@pytest.mark.parametrize("rank", [0, 65])
def test_ranks_that_do_not_exist(layer: Any, rank: int) -> None:
    with pytest.raises(SpecError, match="SPEC-RANK"):
        low_rank_split(layer.W, rank)
    with pytest.raises(SpecError, match="SPEC-RANK"):
        low_rank_compensate(layer.W, layer.W, layer.H, rank)


def test_bias_correction_removes_the_mean_error(layer: Any) -> None:
    X = layer.X + 0.5
    W_hat = rtn(layer.W, parse_format("int3g32")).values()
    bias = bias_correction(layer.W, W_hat, X.mean(axis=1))
    error = layer.W.astype(float) @ X - (W_hat.astype(float) @ X + bias[:, None])
    np.testing.assert_allclose(error.mean(axis=1), 0, atol=1e-4)
    assert np.abs(bias).max() > 0.01
    with pytest.raises(DataError, match="DATA-SHAPE"):
        bias_correction(layer.W, W_hat, np.zeros(3))


def test_projection_onto_the_l1_ball() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 9))
    x[0] *= 0.01
    p = project_l1(x)
    np.testing.assert_array_equal(p[0], x[0])
    np.testing.assert_allclose(np.abs(p[1:]).sum(axis=1), 1)
    # The nearest point: no other point of the ball makes an acute angle with x - p.
    for _ in range(200):
        y = rng.standard_normal((50, 9))
        y /= np.abs(y).sum(axis=1, keepdims=True)
        assert np.all(np.sum((x - p) * (y - p), axis=1) <= 1e-9)


def test_magr_reduces_extremes_at_little_cost_and_helps_low_bits(layer: Any) -> None:
    H = layer.H_float
    smaller = magr(layer.W, H, alpha=0.05)
    assert np.abs(smaller).max(axis=1).mean() < 0.9 * np.abs(layer.W).max(axis=1).mean()
    assert output_error(layer.W, smaller, H) < 0.02
    fmt = parse_format("int2")
    assert output_error(layer.W, rtn(smaller, fmt).values(), H) < output_error(
        layer.W, rtn(layer.W, fmt).values(), H
    )
    np.testing.assert_allclose(magr(layer.W, H, alpha=0), layer.W)
