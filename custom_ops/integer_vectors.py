"""Test vectors of the integer-only operators, for an implementation in firmware.

``python -m onnxq.custom_ops.integer_vectors FILE`` writes JSON: for each operator some cases, each
with its attributes, its inputs and the outputs that any implementation must give, bit for bit.
Tensors are ``{"type", "shape", "data"}``, numbers in row-major order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.custom_ops.registry import DOMAIN, get
from onnxq.solvers.integer_only import dyadic, erf_constants, exp_constants

Array = np.ndarray[Any, Any]
Inputs = dict[str, Array]

VERSION = 1


def vectors() -> dict[str, Any]:
    """The whole file as JSON-serialisable data; the same every time."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for op_name, inputs, attributes in _cases():
        operator = get(op_name)
        outputs = operator.reference(**inputs, **attributes)
        made = {
            "attributes": attributes,
            "inputs": {name: _tensor(array) for name, array in inputs.items()},
            "outputs": {
                name: _tensor(array) for name, array in zip(operator.outputs, outputs, strict=True)
            },
        }
        cases.setdefault(op_name, []).append(made)
    return {
        "version": VERSION,
        "domain": DOMAIN,
        "rounding": "half up: floor(x + 1/2)",
        "operators": {
            name: {"since_version": get(name).since_version, "cases": cases[name]}
            for name in sorted(cases)
        },
    }


def _tensor(array: Array) -> dict[str, Any]:
    return {
        "type": str(array.dtype),
        "shape": list(array.shape),
        "data": [int(x) for x in array.reshape(-1)],
    }


def _cases() -> Iterator[tuple[str, Inputs, dict[str, int]]]:
    rng = np.random.default_rng(2101_01321)
    zero8, zero_u8 = np.array(0, np.int8), np.array(131, np.uint8)
    sums = rng.integers(-400_000, 400_000, size=(3, 8)).astype(np.int32)
    sums[0, :4] = 2**31 - 1, -(2**31), 0, 1
    columns = _columns(rng, 8, 1e-4)
    int8 = {"low": -128, "high": 127}
    yield "Requantize", {"x": sums, **columns, "zero_point": zero8}, int8
    uint8 = {"low": 0, "high": 255}
    yield "Requantize", {"x": sums, **columns, "zero_point": zero_u8}, uint8
    ties = np.arange(-9, 10, dtype=np.int32)
    half = {"multiplier": np.array([1 << 30], np.int32), "shift": np.array([31], np.int32)}
    none = {"bias": np.zeros(1, np.int32)}
    yield "Requantize", {"x": ties, **none, **half, "zero_point": zero8}, int8
    b = rng.integers(-32768, 32768, size=(3, 8)).astype(np.int16)
    multiplier, shift = dyadic([0.61])
    second: Inputs = {"b": b, "b_multiplier": multiplier, "b_shift": shift}
    yield "IntegerAdd", {"a": sums, **_columns(rng, 8, 0.05), **second}, _wide()
    table = rng.integers(-127, 128, size=(5, 6)).astype(np.int8)
    factors = rng.integers(1 << 28, 1 << 30, size=5).astype(np.int32)
    embedding = {"indices": np.array([4, 0, 4]), "table": table, "multiplier": factors}
    yield "IntegerEmbedding", embedding, {"shift": 24, **_wide()}
    squares = np.array([0, 1, 2, 3, 4, 15, 16, 17, 10**12 - 1, 10**12, 2**62 - 1])
    yield "IntegerSqrt", {"x": squares}, {}
    for degree in (2, 3):
        exp = exp_constants(1e-3, degree).attributes()
        x = -np.array([0, 1, 346, 693, 694, 695, 1388, 5000, 10_000, 20_820, 10**9], np.int32)
        yield "IntegerExp", {"x": x}, exp
        erf = erf_constants(2.4e-4 / 1.4142, degree)
        t = np.array([0, 1, -1, 5000, -5000, 10_423, 10_424, -10_425, 32767, -32767], np.int32)
        yield "IntegerErf", {"x": t}, erf.attributes()
        scores = rng.integers(-6000, 6000, size=(3, 7)).astype(np.int32)
        mask = np.array([0, 0, 0, 0, 0, -(1 << 26), -(1 << 26)], np.int32)
        softmax = {**exp, "bits": 8, "rounding": degree - 2}
        yield "IntegerSoftmax", {"x": scores, "mask": mask}, softmax
        linear = {"x": sums, **_columns(rng, 8, 0.05), "zero_point": zero_u8}
        multiplier, shift = dyadic(2.4e-4 * erf.scale / 2 / 0.03)
        output = {"out_multiplier": int(multiplier), "out_shift": int(shift), **uint8}
        yield "IntegerGelu", linear, {**erf.attributes(), "one": erf.one, **output}
        silu = exp_constants(2.4e-4, degree).attributes()
        silu["exp_multiplier"] = silu.pop("multiplier")
        silu["exp_shift"] = silu.pop("shift")
        multiplier, shift = dyadic(2.4e-4 * 2.0**-15 / 0.03)
        output = {"out_multiplier": int(multiplier), "out_shift": int(shift), **uint8}
        yield "IntegerSilu", linear, {**silu, **output}
    rows = rng.integers(-30_000, 30_000, size=(4, 12)).astype(np.int16)
    rows[1], rows[2] = 7, np.where(np.arange(12) % 2, 32767, -32768)
    gamma = np.rint((rng.normal(size=12) + 1) * 2.0**29).astype(np.int32)
    gamma[3] = 0
    norm = {"shift": 0, "epsilon": 0, "out_shift": 44, **_wide()}
    beta = rng.integers(-(2**54), 2**54, size=12)
    yield "IntegerLayerNorm", {"x": rows, "multiplier": gamma, "beta": beta}, norm
    yield "IntegerLayerNorm", {"x": rows, "multiplier": gamma, "beta": beta}, {**norm, "shift": 4}
    yield "IntegerRmsNorm", {"x": rows, "multiplier": gamma}, {**norm, "epsilon": 12_345}


def _columns(rng: np.random.Generator, n: int, ratio: float) -> Inputs:
    multiplier, shift = dyadic(ratio * np.exp(rng.normal(size=n)))
    bias = rng.integers(-9999, 9999, size=n).astype(np.int32)
    return {"bias": bias, "multiplier": multiplier, "shift": shift}


def _wide() -> dict[str, int]:
    return {"low": -32767, "high": 32767}


def write_vectors(path: Path) -> None:
    """Write the file."""
    path.write_text(json.dumps(vectors(), indent=None, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    write_vectors(Path(sys.argv[1]))
