"""The integers of I-BERT's public code, on inputs of ours.

``ibert_integers.npz`` holds what the code of Hugging Face transformers 4.57.1 (models/ibert, which
is that of arXiv 2101.01321's authors) gave in float64, where it is exact: scales are powers of two.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.integer_math import coefficients, polynomial
from onnxq.solvers.integer_only import dyadic, erf_constants, exp_constants

STEP = 2.0**-10
FINE = 2.0**-12


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "ibert_integers.npz") as arrays:
        return dict(arrays)


def ours(name: str, *arrays: np.ndarray, **attributes: int) -> np.ndarray:
    return custom_ops.get(name).reference(*arrays, **attributes)[0]


def test_exp(theirs: dict[str, np.ndarray]) -> None:
    """Their result before its requantization: the polynomial times 2^(30 - halvings)."""
    attributes = exp_constants(STEP).attributes()
    x = theirs["exp_x"].astype(np.int64)
    distance = np.minimum(-x, 30 * attributes["ln2"])
    halvings = distance // attributes["ln2"]
    z = polynomial(halvings * attributes["ln2"] - distance, *coefficients(attributes))
    assert (z << (30 - halvings) == theirs["exp"]).all()


def test_softmax(theirs: dict[str, np.ndarray]) -> None:
    attributes = exp_constants(STEP).attributes() | {"bits": 8, "rounding": 0}
    y = ours("IntegerSoftmax", theirs["softmax_x"], np.zeros(1, np.int32), **attributes)
    assert (y == theirs["softmax"]).all()


def test_erf_and_gelu(theirs: dict[str, np.ndarray]) -> None:
    constants = erf_constants(FINE / 1.4142, shift=14)
    x = theirs["gelu_x"]
    e = ours("IntegerErf", x, **constants.attributes())
    assert (e == theirs["erf"]).all()
    assert (x * (e.astype(np.int64) + constants.one) == theirs["gelu"]).all()


def test_layer_norm(theirs: dict[str, np.ndarray]) -> None:
    """Theirs goes on to gamma from here; ours with a factor of one, in its 16 upper bits."""
    x = theirs["norm_x"]
    d = x.shape[1]
    factor = np.full(d, 1 << 30, np.int32)
    y = ours(
        "IntegerLayerNorm", x, factor, np.zeros(d, np.int64),
        shift=0, epsilon=0, out_shift=45, low=-32768, high=32767,
    )  # fmt: skip
    assert (y == (theirs["norm"] + (1 << 14)) >> 15).all()
    assert np.abs(y).max() > 5_000


def test_requantize(theirs: dict[str, np.ndarray]) -> None:
    multiplier, shift = dyadic(theirs["fixed_scale"] / np.float64(np.float32(0.05)))
    y = ours(
        "Requantize", theirs["fixed_x"], np.zeros(1, np.int32), multiplier, shift,
        np.array(0, np.int8), low=-128, high=127,
    )  # fmt: skip
    assert (y == theirs["fixed"]).all()
