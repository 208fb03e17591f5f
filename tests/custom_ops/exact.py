"""Results in float64, and how far from them an operator's error budget lets a result lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxq.custom_ops.defs import dynamic_quantize_per_token as per_token
from onnxq.custom_ops.defs import hadamard as hadamard_definition
from onnxq.custom_ops.defs import quant_mat_mul as definition
from onnxq.custom_ops.defs import quantize_block
from onnxq.custom_ops.defs.dynamic_float8_mat_mul import ROWS, spread_scales
from onnxq.custom_ops.defs.dynamic_quant_mat_mul import outlier_columns

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Attributes = Mapping[str, Any]


def quant_mat_mul(arrays: Arrays, a: Attributes) -> tuple[Array, Array]:
    """The product in float64 and how far from it a result may lie."""
    level, scale = definition.weight_parts(
        *(arrays[name] for name in ("codes", "scales", "zero_points", "levels")),
        a["K"], a["N"], a["group"], a["exponent_scales"],
    )  # fmt: skip
    wide = np.repeat(scale.astype(np.float64), int(a["group"]), axis=1)[:, : int(a["K"])]
    weight = level.astype(np.float64) * wide * np.float32(a["factor"])
    x = arrays["x"].astype(np.float64)
    with np.errstate(all="ignore"):
        x = definition.in_order(x, arrays.get("order", definition.NO_ORDER))
        if a["int8_activations"]:
            narrow = definition.in_order(arrays["x"], arrays.get("order", definition.NO_ORDER))
            size = int(a["group" if a["int8_activations"] == 2 else "K"])
            q, row = per_token.quantize_groups(narrow, size)
            x = q.astype(np.float64) * np.repeat(row, size, axis=-1)[..., : int(a["K"])]
        exact = x @ weight.T + arrays["bias"]
        size = np.abs(x) @ np.abs(weight.T) + np.abs(arrays["bias"])
        budget = definition.ERROR_BUDGET * (4 + np.sqrt(a["K"])) * size
        if arrays["x"].dtype == np.float16:
            budget = budget * (1 + 2.0**-10) + np.abs(exact) * 2.0**-11 + 2.0**-25
            exact = np.where(np.abs(exact) > 65519, np.inf, exact)
    return exact, budget


def quant_mat_mul_int8(arrays: Arrays, a: Attributes) -> tuple[Array, Array]:
    """The product of the numbers that the codes stand for."""
    q, scale = arrays["q"], arrays["q_scale"].astype(np.float64)
    size = int(a["group" if a["int8_activations"] == 2 else "K"])
    with np.errstate(all="ignore"):
        x = q.astype(np.float64) * np.repeat(scale, size, axis=-1)[..., : int(a["K"])]
    rest = {name: array for name, array in arrays.items() if name not in ("q", "q_scale")}
    return quant_mat_mul({"x": x, **rest}, {**a, "int8_activations": 0})


def hadamard(arrays: Arrays, a: Attributes) -> tuple[Array, Array]:
    """The transform by the dense matrix in float64, and how far from it a result may lie."""
    x, core = arrays["x"], arrays["core"]
    block, scale = int(a["block"]), float(np.float32(a["scale"]))
    matrix = core.astype(np.float64)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    rows = x.astype(np.float64).reshape(-1, block)
    with np.errstate(all="ignore"):
        exact = (rows @ matrix * scale).reshape(x.shape)
        size = np.abs(rows).sum(axis=1, keepdims=True) * abs(scale)
        budget = hadamard_definition.ERROR_BUDGET * (2 + math.sqrt(block)) * size + 0 * rows
        budget = budget.reshape(x.shape) + 2.0**-150
        if x.dtype == np.float16:
            budget = budget * (1 + 2.0**-10) + np.abs(exact) * 2.0**-11 + 2.0**-25
            exact = np.where(np.abs(exact) > 65519, np.inf, exact)
    return exact, budget


def is_quantized_rotation(got: Sequence[Array], arrays: Arrays, a: Attributes) -> bool:
    """Whether ``(q, q_scale)`` are a quantization of the rotation, as near as the budget lets be.

    The greatest of a group lies at 127, and no number further from ``scale * q`` than half a step
    and Hadamard's budget; a group with a number that is not finite has scale NaN and zeros.
    """
    q, scale = got
    x = arrays["x"].astype(np.float32)
    rotated, budget = hadamard({**arrays, "x": x}, a)
    k = x.shape[-1]
    group = max(min(int(a["group"]), k), 1)
    groups = -(-k // group)
    blocks = np.abs(x.astype(np.float64)).reshape(-1, int(a["block"]))
    reach = np.broadcast_to(blocks.sum(axis=1, keepdims=True), blocks.shape).reshape(x.shape)
    if q.dtype != np.int8 or q.shape != x.shape or scale.dtype != np.float32:
        return False
    if scale.shape != (*x.shape[:-1], groups):
        return False
    wide = np.repeat(scale.astype(np.float64), group, axis=-1)[..., :k]
    for start in range(0, k, group):
        part = (..., slice(start, start + group))
        s, r, b = scale[..., start // group], rotated[part], budget[part]
        finite = (reach[part] < np.finfo(np.float32).max).all(axis=-1)  # no sum overflows
        if not np.isnan(s[~np.isfinite(r).all(axis=-1)]).all():
            return False
        if (q[part][np.isnan(s)] != 0).any() or not np.isfinite(s[finite]).all():
            return False
        error = np.abs(wide[part] * q[part] - r)[finite]
        if (error > (0.5001 * wide[part] + b)[finite]).any():
            return False
        most = np.maximum(np.abs(r).max(axis=-1), 127 * np.finfo(np.float32).tiny)[finite]
        if (np.abs(127.0 * s[finite] - most) > b.max(axis=-1)[finite] + 1e-6 * most).any():
            return False
    return True


def dynamic_float8_mat_mul(arrays: Arrays, a: Attributes) -> tuple[Array, Array]:
    """The product of rounded rows in float64, and how far from it a result may lie."""
    x, weight, block = arrays["x"], arrays["weight"], int(a["block"])
    n, k = weight.shape
    (rounded,) = quantize_block.reference(x.astype(np.float32), block=block, **ROWS)
    wide = weight.astype(np.float64) * spread_scales(arrays["scales"], n, k, block)
    with np.errstate(all="ignore"):
        exact = rounded.astype(np.float64) @ wide.T + arrays["bias"]
        size = np.abs(rounded.astype(np.float64)) @ np.abs(wide.T) + np.abs(arrays["bias"])
        budget = 2.0**-20 * (4 + math.sqrt(k)) * size
        if x.dtype == np.float16:
            budget = budget * (1 + 2.0**-10) + np.abs(exact) * 2.0**-11 + 2.0**-25
            exact = np.where(np.abs(exact) > 65519, np.inf, exact)
    return exact, budget


def dynamic_quant_mat_mul(arrays: Arrays, a: Attributes) -> tuple[Array, Array]:
    """The same two products in float64, and how far from them a result may lie."""
    x = arrays["x"]
    wide = x.astype(np.float32)
    flat = wide.reshape(-1, x.shape[-1])
    columns = outlier_columns(flat, arrays["outliers"], a["threshold"])
    inner, outer = wide.copy(), np.zeros(x.shape, np.float32)
    outer[..., columns] = wide[..., columns]
    inner[..., columns] = 0
    most, budget = quant_mat_mul({**arrays, "x": inner}, a)
    no_bias = {**arrays, "x": outer, "bias": np.zeros(1, np.float32)}
    rest, more = quant_mat_mul(no_bias, {**a, "int8_activations": 0})
    with np.errstate(all="ignore"):
        exact, budget = most + rest, budget + more
        if x.dtype == np.float16:
            budget = budget * (1 + 2.0**-10) + np.abs(exact) * 2.0**-11 + 2.0**-25
            exact = np.where(np.abs(exact) > 65519, np.inf, exact)
    return exact, budget
