"""Random shapes, scales, constants and values for the integer-only operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxq.solvers.integer_only import (
    MAX_ERF_STEP,
    dyadic,
    erf_constants,
    exp_constants,
    min_erf_scale,
    min_exp_scale,
)
from tests.custom_ops.integer_cases import Array, Raw

Rng = np.random.Generator
INT32 = np.iinfo(np.int32)


def _shape(rng: Rng) -> tuple[int, ...]:
    """One to four axes; the last often longer than a vector or a block, now and then nothing."""
    outer = rng.integers(0 if rng.random() < 0.1 else 1, 6, size=rng.integers(0, 4))
    return (*map(int, outer), int(np.exp(rng.uniform(0, np.log(700)))))


def _int32(rng: Rng, shape: tuple[int, ...], size: float) -> Array:
    """Near zero, anywhere, all equal, or at the ends of int32."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.integers(INT32.min, INT32.max, size=shape, endpoint=True).astype(np.int32)
    if kind == 1:
        return np.full(shape, rng.choice([INT32.min, INT32.max, 0, -1, 7]), np.int32)
    x = np.clip(rng.normal(size=shape) * size, INT32.min, INT32.max).astype(np.int32)
    if kind == 2 and x.size:
        x.reshape(-1)[rng.integers(x.size)] = rng.choice([INT32.min, INT32.max])
    return x


def _int16(rng: Rng, shape: tuple[int, ...]) -> Array:
    kind = rng.integers(3)
    if kind == 0:
        return np.full(shape, rng.integers(-32768, 32768), np.int16)
    reach = float(np.exp(rng.uniform(0, np.log(40_000))))
    return np.clip(rng.normal(size=shape) * reach, -32768, 32767).astype(np.int16)


def _scale(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low * (1 + 1e-6)), np.log(high * (1 - 1e-6)))))


def _factors(rng: Rng, n: int) -> dict[str, Array]:
    """Bias, multiplier, shift; each for every column or for all."""
    columns = [n if rng.random() < 0.5 else 1 for _ in range(3)]
    bias = _int32(rng, (columns[0],), 9999.0)
    multiplier = rng.integers(-(2**31) + 1, 2**31, size=columns[1]).astype(np.int32)
    shift = rng.integers(1, 63, size=columns[2]).astype(np.int32)
    if rng.random() < 0.6:  # as scales have them
        multiplier, shift = dyadic(np.exp(rng.normal(size=n)) * _scale(rng, 1e-6, 1))
    return {"bias": bias, "multiplier": multiplier, "shift": shift}


def _limits(rng: Rng, dtype: str) -> dict[str, int]:
    info = np.iinfo(dtype)
    if rng.random() < 0.5:
        return {"low": int(info.min), "high": int(info.max)}
    low, high = np.sort(rng.integers(info.min, info.max, size=2, endpoint=True))
    return {"low": int(low), "high": int(high)}


def _exp(rng: Rng, coarsest: float = 0.6931) -> dict[str, int]:
    degree = int(rng.integers(2, 5))
    return exp_constants(_scale(rng, min_exp_scale(), coarsest), degree).attributes()


def _linear(rng: Rng, dtype: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """x; factors and zero point."""
    shape = _shape(rng)
    x = _int32(rng, shape, 1e5) if rng.random() < 0.7 else _int16(rng, shape)
    info = np.iinfo(dtype)
    zero = np.array(rng.integers(info.min, info.max, endpoint=True), dtype)
    return {"x": x}, _factors(rng, shape[-1]) | {"zero_point": zero}


def _output(rng: Rng, dtype: str) -> dict[str, int]:
    multiplier, shift = dyadic(_scale(rng, 1e-9, 1e-3) * rng.choice([-1, 1]))
    return {"out_multiplier": int(multiplier), "out_shift": int(shift), **_limits(rng, dtype)}


def _requantize(rng: Rng, dtype: str) -> tuple[Any, ...]:
    return *_linear(rng, dtype), _limits(rng, dtype)


def _gelu(rng: Rng, dtype: str) -> tuple[Any, ...]:
    degree = int(rng.integers(2, 5))
    erf = erf_constants(_scale(rng, min_erf_scale(degree), MAX_ERF_STEP), degree)
    return *_linear(rng, dtype), {**erf.attributes(), "one": erf.one, **_output(rng, dtype)}


def _silu(rng: Rng, dtype: str) -> tuple[Any, ...]:
    constants = _exp(rng)
    constants["exp_multiplier"] = constants.pop("multiplier")
    constants["exp_shift"] = constants.pop("shift")
    return *_linear(rng, dtype), {**constants, **_output(rng, dtype)}


def _add(rng: Rng, dtype: str) -> tuple[Any, ...]:
    inputs, constants = _linear(rng, dtype)
    shape = inputs["x"].shape
    constants.pop("zero_point")
    multiplier, shift = dyadic([_scale(rng, 1e-4, 2)])
    constants |= {"b_multiplier": multiplier, "b_shift": shift}
    b = _int16(rng, shape[rng.integers(len(shape)) :] if rng.random() < 0.5 else shape)
    return {"a": inputs["x"], "b": b}, constants, _limits(rng, "int16")


def _embedding(rng: Rng, dtype: str) -> tuple[Any, ...]:
    rows, width = int(rng.integers(1, 50)), int(rng.integers(1, 600))
    constants = {
        "table": rng.integers(-128, 128, size=(rows, width)).astype(np.int8),
        "multiplier": rng.integers(INT32.min, INT32.max, size=rows).astype(np.int32),
    }
    indices = rng.integers(-rows, rows, size=_shape(rng)[:-1])
    attributes = {"shift": int(rng.integers(1, 63)), **_limits(rng, "int16")}
    return {"indices": np.asarray(indices)}, constants, attributes


def _square_root(rng: Rng, dtype: str) -> tuple[Any, ...]:
    bits = rng.integers(0, 62, size=_shape(rng))
    return {"x": rng.integers(0, 2 ** (bits + 1))}, {}, {}


def _exponential(rng: Rng, dtype: str) -> tuple[Any, ...]:
    constants = _exp(rng)
    return {"x": _int32(rng, _shape(rng), 5.0 * constants["ln2"])}, {}, constants


def _erf(rng: Rng, dtype: str) -> tuple[Any, ...]:
    degree = int(rng.integers(2, 5))
    constants = erf_constants(_scale(rng, min_erf_scale(degree), MAX_ERF_STEP), degree).attributes()
    return {"x": _int32(rng, _shape(rng), 0.7 * constants["bound"])}, {}, constants


def _softmax(rng: Rng, dtype: str) -> tuple[Any, ...]:
    """Ragged, short and equal rows; masks of every broadcast shape, of some or of all columns."""
    constants = _exp(rng)
    shape = _shape(rng)
    x = _int32(rng, shape, 4.0 * constants["ln2"])
    own = tuple(1 if rng.random() < 0.4 else n for n in shape)[rng.integers(len(shape) + 1) :]
    masked = rng.random(own) < rng.choice([0.0, 0.1, 0.7, 1.0])
    mask = np.where(masked, rng.choice([-(1 << 26), -(1 << 29), INT32.min, 3]), 0).astype(np.int32)
    if rng.random() < 0.2:
        mask = _int32(rng, own, 1e6)
    bits = {"bits": int(rng.integers(1, 9)), "rounding": int(rng.integers(2))}
    return {"x": x, "mask": np.asarray(mask)}, {}, constants | bits


def _norm(rng: Rng, *, with_beta: bool) -> tuple[Any, ...]:
    shape = _shape(rng)
    reach = int(2 ** rng.uniform(8, 31))
    constants = {"multiplier": rng.integers(-reach, reach, size=shape[-1]).astype(np.int32)}
    if with_beta:
        constants["beta"] = rng.integers(-(2**60), 2**60, size=shape[-1]) >> rng.integers(0, 60)
    attributes = {
        "shift": int(rng.integers(0, 16)),
        "epsilon": int(rng.integers(0, 2 ** rng.integers(1, 61))),
        "out_shift": int(rng.integers(20, 63)),
        **_limits(rng, "int16"),
    }
    return {"x": _int16(rng, shape)}, constants, attributes


_MAKERS: dict[str, Callable[[Rng, str], tuple[Any, ...]]] = {
    "IntegerAdd": _add,
    "IntegerEmbedding": _embedding,
    "IntegerErf": _erf,
    "IntegerExp": _exponential,
    "IntegerGelu": _gelu,
    "IntegerLayerNorm": lambda rng, _: _norm(rng, with_beta=True),
    "IntegerRmsNorm": lambda rng, _: _norm(rng, with_beta=False),
    "IntegerSilu": _silu,
    "IntegerSoftmax": _softmax,
    "IntegerSqrt": _square_root,
    "Requantize": _requantize,
}


def random_integer_case(op_name: str, dtype: str, rng: Rng) -> Raw:
    """A sound case: what the operator's definition allows."""
    inputs, constants, attributes = _MAKERS[op_name](rng, dtype)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
    return f"random {shapes}", inputs, constants, attributes, False
