"""Scale searches, HQQ, GPFQ, Qronos and k-means: optimality where it is known, merit elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from onnxq.errors import DataError, SpecError, UnsupportedError
from onnxq.formats import IntFormat, KMeansFormat, parse_format
from onnxq.solvers.gpfq import gpfq
from onnxq.solvers.gptq import gptq
from onnxq.solvers.hessian import output_error
from onnxq.solvers.hqq import hqq
from onnxq.solvers.kmeans import kmeans
from onnxq.solvers.qronos import qronos
from onnxq.solvers.rtn import rtn
from onnxq.solvers.scale_search import awq_clip, mse_params, opt_rtn

SEARCHED = ["int4g32", "int4g32asym", "int4g32full", "int2g16asym", "mxfp4", "nvfp4", "nf4",
            "fp4g32", "fp8e4m3", "uint3"]  # fmt: skip


def squared(W: np.ndarray, values: np.ndarray, importance: np.ndarray | float = 1.0) -> float:
    return float(np.sum(importance * (values.astype(np.float64) - W) ** 2))


@pytest.mark.parametrize("name", SEARCHED)
def test_mse_search_never_loses(layer: Any, name: str) -> None:
    fmt = parse_format(name)
    plain, params = rtn(layer.W, fmt), mse_params(layer.W, fmt, norm=2.0)
    assert params.scale.shape == plain.params.scale.shape
    assert params.scale.dtype == plain.params.scale.dtype
    searched = rtn(layer.W, fmt, params=params)
    assert squared(layer.W, searched.values()) <= squared(layer.W, plain.values()) * (1 + 1e-7)


def test_mse_search_finds_the_least_error_of_a_fine_scan() -> None:
    w = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    fmt = IntFormat(4)
    found = squared(w, rtn(w, fmt, params=mse_params(w, fmt, group=0, norm=2.0)).values())

    def error(factor: float) -> float:
        scale = factor * np.abs(w).max() / 7
        return float(np.sum((np.clip(np.rint(w / scale), -8, 7) * scale - w) ** 2))

    scan = min(error(f) for f in np.linspace(0.2, 1, 4001))
    assert found <= 1.02 * scan


def test_the_exponent_of_the_error_matters() -> None:
    """A high norm protects the extreme, a low one the many."""
    w = np.r_[np.random.default_rng(1).standard_normal(255), 12].astype(np.float32)[None]
    fmt = IntFormat(3)
    high, low = (mse_params(w, fmt, group=0, norm=n).scale[0] for n in (8.0, 1.0))
    assert high > 2 * low


@pytest.mark.parametrize("name", ["int4g32", "int4g32full", "int2g16", "int4g32asym", "mxfp4"])
def test_opt_rtn_beats_the_plain_search_under_its_weights(layer: Any, name: str) -> None:
    fmt = parse_format(name)
    importance = np.diag(layer.H_float)
    found = opt_rtn(layer.W, fmt, importance=importance)
    plain = rtn(layer.W, fmt)
    assert squared(layer.W, found.values(), importance) < 0.97 * squared(
        layer.W, plain.values(), importance
    )
    unweighted = opt_rtn(layer.W, fmt)
    assert squared(layer.W, found.values(), importance) <= squared(
        layer.W, unweighted.values(), importance
    )


def test_opt_rtn_scale_is_optimal_for_its_codes() -> None:
    W = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float32)
    got = opt_rtn(W, IntFormat(4), group=0)
    codes = got.codes.astype(np.float64)
    for row in range(4):
        best = minimize_scalar(lambda s, r=row: np.sum((s * codes[r] - W[r]) ** 2)).x
        assert got.params.scale[row] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("name", ["int4g32", "int3g32asym", "int3"])
def test_awq_clip_lowers_the_output_error_of_its_blocks(layer: Any, name: str) -> None:
    fmt = parse_format(name)
    H = layer.H_float
    size = fmt.block or len(H)
    blocks = H * np.kron(np.eye(len(H) // size), np.ones((size, size)))
    clipped = rtn(layer.W, fmt, params=awq_clip(layer.W, H, fmt))
    plain = rtn(layer.W, fmt)
    assert output_error(layer.W, clipped.values(), blocks) < output_error(
        layer.W, plain.values(), blocks
    )


@pytest.mark.parametrize("name", ["uint4g64", "int3g64asym", "uint2g16", "uint4g48"])
def test_hqq_lowers_the_p_norm(layer: Any, name: str) -> None:
    fmt = parse_format(name)
    for W, gain in ((layer.W, 0.985), (layer.W**3, 1.0)):
        norms = [
            np.sum(np.abs(s.values() - W) ** 0.7)
            for s in (hqq(W, fmt), hqq(W, fmt, iterations=0), rtn(W, fmt))
        ]
        assert norms[0] < gain * norms[1]
        assert norms[0] < gain * norms[2]
    got = hqq(layer.W, fmt)
    assert got.params.zero_point is not None
    assert got.params.zero_point.dtype == np.float32


def test_hqq_degenerate_groups() -> None:
    W = np.zeros((3, 20), np.float32)
    W[1], W[2] = 2.5, -0.3
    np.testing.assert_allclose(hqq(W, parse_format("uint4g16")).values(), W, rtol=1e-6)
    with pytest.raises(UnsupportedError, match="UNSUPPORTED-GRID"):
        hqq(W, parse_format("int4"))


def test_gpfq_follows_its_definition() -> None:
    """Against the recursion over residual vectors, without Gram matrices."""
    rng = np.random.default_rng(3)
    W = rng.standard_normal((5, 12)).astype(np.float32)
    X = rng.standard_normal((12, 60))
    Y = X + 0.2 * rng.standard_normal((12, 60))
    fmt = IntFormat(4)
    got = gpfq(W, Y @ Y.T, fmt, G=X @ Y.T, act_order=False)
    scale = got.params.scale.astype(np.float64)
    for row in range(5):
        u = np.zeros(60)
        for t in range(12):
            wanted = Y[t] @ (u + W[row, t] * X[t]) / (Y[t] @ Y[t])
            q = np.clip(np.rint(wanted / scale[row]), -8, 7)
            assert q == int(got.codes[row, t])
            u = u + W[row, t] * X[t] - q * scale[row] * Y[t]


def test_gpfq_merit(layer: Any) -> None:
    H = layer.H_float
    for name in ("int4g32", "mxfp4", "nvfp4"):
        fmt = parse_format(name)
        plain = output_error(layer.W, rtn(layer.W, fmt).values(), H)
        for options in ({}, {"act_order": False}):
            assert (
                output_error(layer.W, gpfq(layer.W, H, fmt, **options).values(), H) < 0.85 * plain
            )


def test_mx_error_diffusion_scales_blocks_by_corrected_columns(layer: Any) -> None:
    fmt = parse_format("mxfp4")
    moving = gpfq(layer.W, layer.H_float, fmt, static_groups=False)
    plain = output_error(layer.W, rtn(layer.W, fmt).values(), layer.H_float)
    assert output_error(layer.W, moving.values(), layer.H_float) < 0.8 * plain
    fixed = gpfq(layer.W, layer.H_float, fmt)
    first = moving.params.scale.view(np.uint8)[:, 0]
    np.testing.assert_array_equal(first, fixed.params.scale.view(np.uint8)[:, 0])
    assert (moving.params.scale.view(np.uint8) != fixed.params.scale.view(np.uint8)).any()


def test_solvers_that_know_the_mismatch_win_under_it(layer: Any) -> None:
    fmt = parse_format("int4g32")
    blind = layer.loss(gptq(layer.W, layer.H, fmt).values())
    assert layer.loss(qronos(layer.W, layer.H, fmt, G=layer.G).values()) < 0.8 * blind
    unaware = layer.loss(gpfq(layer.W, layer.H, fmt).values())
    assert layer.loss(gpfq(layer.W, layer.H, fmt, G=layer.G).values()) < 0.9 * unaware


@pytest.mark.parametrize("name", ["int4g32", "int3", "mxfp4"])
def test_qronos_without_mismatch_is_gptq(layer: Any, name: str) -> None:
    fmt = parse_format(name)
    ours = qronos(layer.W, layer.H_float, fmt)
    plain = gptq(layer.W, layer.H_float, fmt)
    # The two solve the same problem by other sums: codes differ only near ties.
    assert np.mean(ours.values() == plain.values()) > 0.99


def test_qronos_follows_its_definition_on_two_columns() -> None:
    rng = np.random.default_rng(4)
    X = rng.standard_normal((2, 50))
    Y = X + 0.3 * rng.standard_normal((2, 50))
    W = rng.standard_normal((9, 2)).astype(np.float32)
    got = qronos(W, Y @ Y.T, IntFormat(5), G=X @ Y.T, act_order=False, damp=0.0)
    scale = got.params.scale[:, None].astype(np.float64)
    target = W.astype(np.float64) @ X
    for row in range(9):
        # First: best real value with the second weight as it is; second: best given the first.
        first = (target[row] - W[row, 1] * Y[1]) @ Y[0] / (Y[0] @ Y[0])
        q0 = np.clip(np.rint(first / scale[row]), -16, 15)[0]
        second = (target[row] - q0 * scale[row] * Y[0]) @ Y[1] / (Y[1] @ Y[1])
        q1 = np.clip(np.rint(second / scale[row]), -16, 15)[0]
        assert [q0, q1] == got.codes[row].astype(int).tolist()


def test_kmeans_weights_its_rows(layer: Any) -> None:
    importance = np.diag(layer.H_float)
    fmt = KMeansFormat(3)
    plain, weighted = kmeans(layer.W, fmt), kmeans(layer.W, fmt, importance=importance)
    assert squared(layer.W, weighted.values(), importance) < 0.9 * squared(
        layer.W, plain.values(), importance
    )
    assert squared(layer.W, plain.values()) < 0.8 * squared(
        layer.W, rtn(layer.W, IntFormat(3), group=0).values()
    )


def test_bad_input(layer: Any) -> None:
    broken = layer.W.copy()
    broken[0, 0] = np.inf
    for solve in (
        lambda: rtn(broken, IntFormat(4)),
        lambda: mse_params(broken, IntFormat(4)),
        lambda: opt_rtn(broken, IntFormat(4)),
        lambda: hqq(broken, parse_format("uint4g32")),
        lambda: kmeans(broken, KMeansFormat()),
        lambda: gpfq(broken, layer.H, IntFormat(4)),
        lambda: qronos(broken, layer.H, IntFormat(4)),
    ):
        with pytest.raises(DataError, match="DATA-NOT-FINITE"):
            solve()
    with pytest.raises(SpecError, match="SPEC-GRANULARITY"):
        rtn(layer.W, parse_format("mxfp4"), group=64)
    with pytest.raises(SpecError, match="SPEC-ACT-ORDER"):
        gpfq(layer.W, layer.H, parse_format("int4g32"), act_order=True, static_groups=False)
