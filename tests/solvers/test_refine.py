"""refine: codes by coordinate descent and scales by least squares, after any solver."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxq.errors import SpecError, UnsupportedError
from onnxq.formats import IntFormat, parse_format
from onnxq.solvers.gptaq import gptaq
from onnxq.solvers.gptq import gptq
from onnxq.solvers.grid import Solution
from onnxq.solvers.refine import refine
from onnxq.solvers.rtn import rtn

ASYM = replace(parse_format("uint4"), scheme="asym")  # type: ignore[type-var]
FULL = replace(parse_format("int4"), scheme="full")  # type: ignore[type-var]
TWO = replace(parse_format("uint2"), scheme="asym")  # type: ignore[type-var]
FORMATS = [ASYM, FULL, TWO, *map(parse_format, ("nvfp4", "mxfp4", "nf4", "fp8e4m3"))]


def group_of(fmt: Any) -> int | None:
    return 32 if isinstance(fmt, IntFormat) else None


def row_losses(layer: Any, found: Solution, H: np.ndarray) -> np.ndarray:
    """``|(w - q) X|^2`` of each row by its definition."""
    delta = layer.W.astype(np.float64) - found.values()
    return np.einsum("nk,kj,nj->n", delta, H, delta)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_row_gets_worse_and_the_layer_gets_better(layer: Any, fmt: Any) -> None:
    H = layer.H_float
    before = gptq(layer.W, H, fmt, group=group_of(fmt))
    after = refine(layer.W, H, before, damp=0.0)
    old, new = row_losses(layer, before, H), row_losses(layer, after, H)
    assert (new <= old * (1 + 1e-5)).all()
    assert new.sum() < 0.98 * old.sum()
    assert after.codes.dtype == before.codes.dtype
    if not isinstance(fmt, IntFormat):  # scales of other formats have a grid of their own
        np.testing.assert_array_equal(after.params.scale, before.params.scale)


def test_in_the_end_no_single_code_can_be_improved(layer: Any) -> None:
    W, H = layer.W[:8, :64], layer.H_float[:64, :64]
    found = refine(W, H, rtn(W, ASYM, group=32), damp=0.0, sweeps=100)
    exact = W.astype(np.float64)

    def total(codes: np.ndarray) -> np.ndarray:
        delta = exact - ASYM.decode(codes, found.params)
        return np.einsum("nk,kj,nj->n", delta, H, delta)

    least = total(found.codes)
    for column in range(64):
        for code in range(16):
            codes = found.codes.copy()
            codes[:, column] = code
            assert (total(codes) >= least * (1 - 1e-5)).all()


def test_scales_are_those_of_least_squares(layer: Any) -> None:
    """One sweep that moves no code leaves the scales of ``numpy.linalg.lstsq`` on the inputs."""
    W, X = layer.W[:4, :64], layer.X[:64]
    H = X @ X.T
    settled = refine(W, H, rtn(W, ASYM, group=32), damp=0.0, sweeps=100)
    centred = settled.codes.astype(np.float64) - np.repeat(settled.params.zero_point, 32, axis=1)
    for row in range(4):
        groups = np.stack([centred[row, i : i + 32] @ X[i : i + 32] for i in (0, 32)], axis=1)
        wanted, *_ = np.linalg.lstsq(groups, W[row].astype(np.float64) @ X, rcond=None)
        np.testing.assert_allclose(settled.params.scale[row], wanted, rtol=1e-4)


def test_with_the_inputs_error_the_loss_behind_a_rounded_prefix_falls(layer: Any) -> None:
    before = gptaq(layer.W, layer.H, layer.D, ASYM, group=32, alpha=1.0)
    after = refine(layer.W, layer.H, before, D=layer.D, alpha=1.0)
    assert layer.loss(after.values()) < 0.95 * layer.loss(before.values())
    unaware = refine(layer.W, layer.H, before)
    assert layer.loss(after.values()) < layer.loss(unaware.values())


def test_zero_rows_dead_inputs_and_ragged_groups(layer: Any) -> None:
    W, H = layer.W[:, :80].copy(), layer.H_float[:80, :80].copy()
    W[3] = 0
    W[:, 32:64][5] = 0
    H[7] = H[:, 7] = 0
    for fmt in (ASYM, FULL):
        before = gptq(W, H, fmt, group=32)
        values = refine(W, H, before).values()
        assert np.isfinite(values).all()
        assert (values[3] == 0).all()
        assert (values[:, 7] == 0).all()


def test_no_sweeps_change_nothing_and_other_input_is_refused(layer: Any) -> None:
    before = gptq(layer.W, layer.H_float, ASYM, group=32)
    assert refine(layer.W, layer.H_float, before, sweeps=0) is before
    with pytest.raises(SpecError, match="sweeps=-1"):
        refine(layer.W, layer.H_float, before, sweeps=-1)
    codebook = rtn(layer.W, parse_format("ternary"))
    with pytest.raises(UnsupportedError, match="one column at a time"):
        refine(layer.W, layer.H_float, codebook)
