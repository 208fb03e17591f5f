"""Weights of ``DynamicFloat8MatMul``: plain FP8, as GPUs' matrix libraries read them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from onnxq.custom_ops.defs.dynamic_float8_mat_mul import BLOCK
from onnxq.custom_ops.packed_weight import PackedWeight
from onnxq.graph.match import Linear
from onnxq.passes.lower.weights import grid_format, rows_of, to_nearest
from onnxq.passes.plan import ActivationPlan, SitePlan
from onnxq.passes.weights.rounded import RoundedWeight

Array = np.ndarray[Any, Any]

TOKENS = ActivationPlan("fp8e4m3")
"""What the operator rounds activations to, beside weights with a scale a channel."""
BLOCKS = ActivationPlan(f"fp8e4m3g{BLOCK}")
"""And beside weights with a scale a block."""
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST = np.float32(448)
_SMALLEST_SCALE = np.finfo(np.float32).tiny


def float8_weight(
    linear: Linear, site: SitePlan, rounded: RoundedWeight | None
) -> PackedWeight | None:
    """The operator's inputs behind x, or None where it cannot perform what is planned.

    Blocks are squares of 128, of which a group of 128 columns in a plan becomes part: what a solver
    has rounded by rows cannot be said with their scales.
    """
    plan = site.weight
    if plan is None or linear.kind == "conv":
        return None
    fmt = grid_format(plan)
    group = plan.block or fmt.block
    if str(fmt).removesuffix(f"g{BLOCK}") != "fp8e4m3":
        return None
    if site.activation == TOKENS and not group:
        made = rounded if rounded is not None else to_nearest(rows_of(linear), fmt, plan)
        if made.levels is None or not _is_e4m3(made.levels) or made.scale.shape[1] != 1:
            return None
        codes = made.codes.astype(np.uint8).view(_E4M3)
        return _inputs(linear, codes, made.scale * np.float32(made.factor), 0)
    whole = linear.in_features % BLOCK == 0
    if site.activation == BLOCKS and group == BLOCK and whole and rounded is None:
        return _inputs(linear, *square_blocks(rows_of(linear)), BLOCK) if _nearest(site) else None
    return None


def square_blocks(rows: Array) -> tuple[Array, Array]:
    """Codes and scales of ``[N, K]`` float32, K a multiple of 128: 448 for each block's extreme.

    Returns:
        ``[N, K]`` float8_e4m3fn, and float32 ``[ceil(N / 128), K / 128 rounded up to 4s]``.
    """
    n, k = rows.shape
    down, across = -(-n // BLOCK), k // BLOCK
    padded = np.zeros((down * BLOCK, k), np.float32)
    padded[:n] = rows
    squares = padded.reshape(down, BLOCK, across, BLOCK)
    scale = np.maximum(np.abs(squares).max(axis=(1, 3)) / _LARGEST, _SMALLEST_SCALE)
    codes = (squares / scale[:, None, :, None]).astype(_E4M3).reshape(padded.shape)[:n]
    stored = np.zeros((down, -(-across // 4) * 4), np.float32)
    stored[:, :across] = scale
    return np.ascontiguousarray(codes), stored


def _nearest(site: SitePlan) -> bool:
    return site.weight is not None and site.weight.method == "minmax"


def _inputs(linear: Linear, codes: Array, scales: Array, block: int) -> PackedWeight:
    bias = np.zeros(1, np.float32) if linear.b is None else linear.b.astype(np.float32)
    inputs = {"weight": codes, "scales": scales.astype(np.float32), "bias": bias}
    return PackedWeight(inputs, {"block": block})


def _is_e4m3(levels: Array) -> bool:
    """Whether code i stands for what E4M3 reads in the bits of i."""
    known = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)
    return len(levels) == 256 and bool(np.array_equal(levels, known, equal_nan=True))
