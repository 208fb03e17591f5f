"""Inputs for the contract test of the integer-only operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from onnxq.solvers.integer_only import dyadic, erf_constants, exp_constants

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, int]
Raw = tuple[str, dict[str, Array], dict[str, Array], dict[str, int], bool]
"""Name, inputs, constants, attributes, whether to run in every opset."""

# Around vectors of 8, 16, 32 and 64, primes, one.
_LENGTHS = (1, 7, 16, 17, 31, 33, 64, 97, 129, 257)
_SHAPES = ((1,), (0, 4), (2, 0, 3), (2, 3, 5, 31))
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
_STEPS = {"int8": 0.03, "uint8": 0.03, "int16": 2.5e-4}
_EXTREMES = np.array(
    [-(2**31), 2**31 - 1, -(2**31) + 1, 0, 1, -1, 2**30, -(2**30), 32767, -32768, 255], np.int32
)


def _accumulators(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Like sums of products: some thousands."""
    return rng.integers(-200_000, 200_000, size=shape).astype(np.int32)


def _factors(rng: np.random.Generator, n: int, ratio: float) -> dict[str, Array]:
    """A bias and a dyadic factor for each of n columns, near ``ratio``."""
    multiplier, shift = dyadic(ratio * np.exp(rng.normal(size=n)))
    bias = rng.integers(-9999, 9999, size=n).astype(np.int32)
    return {"bias": bias, "multiplier": multiplier, "shift": shift}


def one_shift(factors: dict[str, Array], shift: int) -> dict[str, Array]:
    """The same with one shift for all columns."""
    return {**factors, "shift": np.array([shift], np.int32)}


def linear_inputs(rng: np.random.Generator, shape: tuple[int, ...], ratio: float) -> Array:
    """Accumulators of which some lie on the borders of rounding and of int32."""
    x = _accumulators(rng, shape)
    if x.size:
        x.reshape(-1)[:: max(1, x.size // 7)] = rng.choice(_EXTREMES)
    return x


def requantize(dtype: str) -> Iterator[Raw]:
    """Both kinds of input, factors a column and for all, ties, the borders of every range."""
    rng = np.random.default_rng(21)
    low, high = _LIMITS[dtype]
    zero = {"zero_point": np.array(3, dtype)}
    attributes = {"low": low, "high": high}
    for shape in (*((3, n) for n in _LENGTHS), *_SHAPES):
        factors = _factors(rng, shape[-1], (high - low) / 4e5)
        x = linear_inputs(rng, shape, 1e-3)
        yield f"columns {shape}", {"x": x}, factors | zero, attributes, 0 in shape
        x16 = rng.integers(-32768, 32768, size=shape).astype(np.int16)
        yield f"i16 {shape}", {"x": x16}, _factors(rng, 1, 0.01) | zero, attributes, shape == (1,)
    # Every multiplier with every shift: a column for each pair.
    pairs = np.array(
        [
            (multiplier, shift)
            for multiplier in (1, -1, 2**30, 2**31 - 1, -(2**31) + 1, 0)
            for shift in (1, 2, 31, 32, 33, 61, 62)
        ],
        np.int32,
    )
    factors = {"bias": np.array([7], np.int32), "multiplier": pairs[:, 0], "shift": pairs[:, 1]}
    rows = np.concatenate([_EXTREMES, np.arange(-40, 40, dtype=np.int32)])
    x = np.repeat(rows[:, None], len(pairs), axis=1)
    yield "borders", {"x": x}, factors | zero, attributes, False
    for shift in (30, 31, 32, 40):
        for n in (1, 16, 37):
            factors = one_shift(_factors(rng, n, 0.5), shift)
            x = linear_inputs(rng, (4, n), 1e-3)
            yield f"one shift {shift}, {n}", {"x": x}, factors | zero, attributes, False
    narrow = {"low": low + 1, "high": high - 2}
    everything = {"x": linear_inputs(rng, (5, 40), 1e-3), **_factors(rng, 40, 1e-3), **zero}
    yield "no constants", everything, {}, narrow, True
    factors = _factors(rng, 1499, (high - low) / 4e5)
    yield "large", {"x": linear_inputs(rng, (67, 1499), 1e-3)}, factors | zero, attributes, False


def add(dtype: str) -> Iterator[Raw]:
    """Equal shapes, repeated rows, both kinds of the first input."""
    rng = np.random.default_rng(22)
    attributes = {"low": -32767, "high": 32767}

    def second(shape: tuple[int, ...]) -> Array:
        return rng.integers(-32768, 32768, size=shape).astype(np.int16)

    def constants(n: int, ratio: float) -> dict[str, Array]:
        multiplier, shift = dyadic([0.7])
        return _factors(rng, n, ratio) | {"b_multiplier": multiplier, "b_shift": shift}

    for shape in (*((3, n) for n in _LENGTHS), *_SHAPES):
        inputs = {"a": linear_inputs(rng, shape, 0.1), "b": second(shape)}
        yield f"{shape}", inputs, constants(shape[-1], 0.1), attributes, 0 in shape
        inputs = {"a": second(shape), "b": second(shape)}
        yield f"i16 {shape}", inputs, constants(1, 0.5), attributes, shape == (1,)
    for shape in ((5, 33), (1, 5, 33), (33,), (1, 1, 33), (1, 33)):
        inputs = {"a": second((4, 5, 33)), "b": second(shape)}
        yield f"repeated {shape}", inputs, constants(33, 0.5), attributes, False
    inputs = {"a": linear_inputs(rng, (67, 1499), 0.1), "b": second((67, 1499))}
    yield "large", inputs, constants(1499, 0.1), {"low": -128, "high": 127}, False


def embedding(dtype: str) -> Iterator[Raw]:
    """Tables of some widths, indices of any rank."""
    rng = np.random.default_rng(23)
    attributes = {"shift": 40, "low": -32767, "high": 32767}
    for width in _LENGTHS:
        table = rng.integers(-128, 128, size=(11, width)).astype(np.int8)
        multiplier = rng.integers(-(2**31), 2**31, size=11).astype(np.int32)
        constants = {"table": table, "multiplier": multiplier}
        for shape in ((3,), (), (2, 0), (2, 3)):
            indices = rng.integers(-11, 11, size=shape)
            name = f"{shape} of {width}"
            yield name, {"indices": np.asarray(indices)}, constants, attributes, width == 31
    table = rng.integers(-128, 128, size=(999, 384)).astype(np.int8)
    multiplier = rng.integers(2**29, 2**31, size=999).astype(np.int32)
    constants = {"table": table, "multiplier": multiplier}
    narrow = {"shift": 33, "low": -99, "high": 77}
    yield "large", {"indices": rng.integers(0, 999, size=(4, 99))}, constants, narrow, False


def square_root(dtype: str) -> Iterator[Raw]:
    """Squares and their neighbours over the whole range."""
    rng = np.random.default_rng(24)
    roots = np.concatenate([np.arange(300), rng.integers(0, 2**31, size=300), [2**31 - 1]])
    squares = roots.astype(np.int64) ** 2
    x = np.concatenate([squares, squares - 1, squares + 1, 2 ** np.arange(62), [-5, 2**62 - 1]])
    yield "squares", {"x": np.clip(x, -5, 2**62 - 1)}, {}, {}, True
    yield "empty", {"x": np.zeros((3, 0), np.int64)}, {}, {}, True
    yield "large", {"x": rng.integers(0, 2**62, size=(67, 1499))}, {}, {}, False


_EXP_SCALES = ((5.2e-5, 2), (1e-3, 2), (0.06, 2), (1e-3, 3), (6e-3, 4), (0.6, 2))


def exponential(dtype: str) -> Iterator[Raw]:
    """Every input up to where exp is zero, for some scales and degrees."""
    rng = np.random.default_rng(25)
    for scale, degree in _EXP_SCALES:
        attributes = exp_constants(scale, degree).attributes()
        x = np.unique(np.linspace(-31 * attributes["ln2"], 5, 5000).astype(np.int32))
        name = f"{scale} degree {degree}"
        yield name, {"x": np.concatenate([x, _EXTREMES])}, {}, attributes, scale == 6e-3
    for shape in _SHAPES:
        yield f"{shape}", {"x": -_accumulators(rng, shape)}, {}, attributes, False
    yield "large", {"x": _accumulators(rng, (67, 1499))}, {}, attributes, False


_ERF_SCALES = ((5.4e-5, 2, None), (1.7e-4, 2, 14), (0.014, 2, 0), (1e-3, 3, None), (2e-3, 4, None))


def erf(dtype: str) -> Iterator[Raw]:
    """Every input up to the clipping point, for some scales and degrees."""
    rng = np.random.default_rng(26)
    for scale, degree, shift in _ERF_SCALES:
        attributes = erf_constants(scale, degree, shift).attributes()
        edge = attributes["bound"] + 9
        x = np.unique(np.linspace(-edge, edge, 5001).astype(np.int32))
        name = f"{scale} degree {degree}"
        yield name, {"x": np.concatenate([x, _EXTREMES])}, {}, attributes, degree == 4
    for shape in _SHAPES:
        yield f"{shape}", {"x": _accumulators(rng, shape)}, {}, attributes, False
    yield "large", {"x": _accumulators(rng, (67, 1499)) // 40}, {}, attributes, False


def _gelu_attributes(dtype: str, scale: float, degree: int) -> dict[str, int]:
    low, high = _LIMITS[dtype]
    constants = erf_constants(scale / 1.4142, degree)
    multiplier, shift = dyadic(scale * constants.scale / 2 / _STEPS[dtype])
    output = {"out_multiplier": int(multiplier), "out_shift": int(shift), "low": low, "high": high}
    return {**constants.attributes(), "one": constants.one, **output}


def gelu(dtype: str) -> Iterator[Raw]:
    """Several scales and degrees, and every 16-bit number."""
    yield from _activation(dtype, lambda scale, degree: _gelu_attributes(dtype, scale, degree))


def silu(dtype: str) -> Iterator[Raw]:
    """Several scales and degrees, and every 16-bit number."""
    low, high = _LIMITS[dtype]

    def attributes(scale: float, degree: int) -> dict[str, int]:
        constants = exp_constants(scale, degree).attributes()
        constants["exp_multiplier"] = constants.pop("multiplier")
        constants["exp_shift"] = constants.pop("shift")
        multiplier, shift = dyadic(scale * 2.0**-15 / _STEPS[dtype])
        factor = {"out_multiplier": int(multiplier), "out_shift": int(shift)}
        return {**constants, **factor, "low": low, "high": high}

    yield from _activation(dtype, attributes)


def _activation(dtype: str, attributes_of: Any) -> Iterator[Raw]:
    rng = np.random.default_rng(27)
    zero = {"zero_point": np.array({"int8": -100, "uint8": 28, "int16": -1000}[dtype], dtype)}
    attributes = attributes_of(2.4e-4, 2)
    for shape in (*((3, n) for n in _LENGTHS), *_SHAPES):
        constants = _factors(rng, shape[-1], 0.1) | zero
        x = linear_inputs(rng, shape, 0.1)
        yield f"columns {shape}", {"x": x}, constants, attributes, 0 in shape
    identity = {
        "bias": np.array([0], np.int32),
        "multiplier": np.array([2**30], np.int32),
        "shift": np.array([30], np.int32),
    }
    for shift in (30, 31, 33):
        constants = one_shift(_factors(rng, 37, 0.1), shift) | zero
        x = linear_inputs(rng, (5, 37), 0.1)
        yield f"one shift {shift}", {"x": x}, constants, attributes, False
    everything = np.arange(-32768, 32768, dtype=np.int16)
    for scale, degree in ((8e-5, 2), (3e-4, 2), (1e-3, 3), (2e-3, 4), (0.019, 2)):
        attributes = attributes_of(scale, degree)
        name = f"every number, {scale} degree {degree}"
        yield name, {"x": everything}, identity | zero, attributes, degree == 4
    fed = {"x": linear_inputs(rng, (5, 40), 0.1), **_factors(rng, 40, 0.1), **zero}
    yield "no constants", fed, {}, attributes, False
    constants = _factors(rng, 1499, 0.1) | zero
    yield "large", {"x": linear_inputs(rng, (67, 1499), 0.1)}, constants, attributes, False


def softmax(dtype: str) -> Iterator[Raw]:
    """Masks of every shape, rows of every length, the borders of int32."""
    rng = np.random.default_rng(28)

    def attributes(scale: float = 1e-3, degree: int = 2, bits: int = 8, rounding: int = 0) -> Any:
        constants = exp_constants(scale, degree).attributes()
        return {**constants, "bits": bits, "rounding": rounding}

    none = np.zeros((1,), np.int32)
    for index, n in enumerate(_LENGTHS):
        x = rng.integers(-9000, 9000, size=(3, n)).astype(np.int32)
        chosen = attributes(rounding=index % 2)
        yield f"{n}", {"x": x, "mask": none}, {}, chosen, n == 31
    x = rng.integers(-9000, 9000, size=(2, 3, 5, 33)).astype(np.int32)
    for shape in ((2, 1, 1, 33), (1, 1, 5, 33), (2, 3, 5, 33), (33,), (3, 1, 1), (5, 1), ()):
        mask = np.where(rng.random(shape) < 0.4, -(2**24), 0).astype(np.int32)
        yield f"mask {shape}", {"x": x, "mask": mask}, {}, attributes(), shape == (2, 1, 1, 33)
    for scale, degree in _EXP_SCALES:
        x = (rng.normal(size=(9, 77)) * 4 / scale).astype(np.int32)
        for bits, rounding in ((8, 0), (8, 1), (5, 1), (1, 0)):
            chosen = attributes(scale, degree, bits, rounding)
            name = f"{scale} degree {degree}, {bits} bits, rounding {rounding}"
            yield name, {"x": x, "mask": none}, {}, chosen, False
    for scale in (1e-3, 0.6e-3, 5e-3):  # one distance a row
        pairs = np.stack([np.zeros(700, np.int32), -np.arange(700, dtype=np.int32)], axis=-1)
        yield f"pairs {scale}", {"x": pairs, "mask": none}, {}, attributes(scale), False
    x = (rng.normal(size=(3, 5001)) * 900).astype(np.int32)
    yield "wide", {"x": x, "mask": none}, {}, attributes(rounding=1), False
    x = (rng.normal(size=(1, 65_536 + 77)) * 4000).astype(np.int32)
    yield "beyond a sum's chunk", {"x": x, "mask": none}, {}, attributes(), False
    all_masked = np.full((33,), -(2**26), np.int32)
    x = rng.integers(-9000, 9000, size=(5, 33)).astype(np.int32)
    yield "all masked", {"x": x, "mask": all_masked}, {}, attributes(rounding=1), False
    rows = rng.integers(-(2**31), 2**31, size=(9, 40)).astype(np.int32)
    rows[1], rows[2], rows[3] = -(2**31), 2**31 - 1, 0
    rows[4], rows[4, 7] = -(2**31), 2**31 - 1
    rows[5], rows[5, 0] = 0, 1
    yield "borders", {"x": rows, "mask": none}, {}, attributes(), True
    for shape in ((0, 4), (2, 0, 3), (2, 0, 0), (7,)):
        yield f"{shape}", {"x": _accumulators(rng, shape), "mask": none}, {}, attributes(), True
    x = rng.integers(-9000, 9000, size=(2, 3, 67, 251)).astype(np.int32)
    mask = np.where(rng.random((2, 1, 1, 251)) < 0.4, -(2**24), 0).astype(np.int32)
    yield "large", {"x": x, "mask": mask}, {}, attributes(rounding=1), False


def layer_norm(dtype: str) -> Iterator[Raw]:
    """Rows of every length, constant rows, the borders of int16, gammas of zero."""
    yield from _norm(with_beta=True)


def rms_norm(dtype: str) -> Iterator[Raw]:
    """As of LayerNorm, without a beta."""
    yield from _norm(with_beta=False)


def _norm(*, with_beta: bool) -> Iterator[Raw]:
    rng = np.random.default_rng(29)

    def constants(n: int) -> dict[str, Array]:
        gamma = rng.normal(size=n) + 1
        gamma[:: max(1, n // 3)] = 0
        multiplier = np.rint(gamma * 2.0**28).astype(np.int32)
        beta = {"beta": rng.integers(-(2**52), 2**52, size=n)} if with_beta else {}
        return {"multiplier": multiplier} | beta

    attributes = {"shift": 0, "epsilon": 0, "out_shift": 44, "low": -32767, "high": 32767}
    for index, n in enumerate(_LENGTHS):
        x = rng.integers(-32768, 32768, size=(4, n)).astype(np.int16)
        chosen = {**attributes, "shift": index % 5, "epsilon": index * 977}
        yield f"{n}", {"x": x}, constants(n), chosen, n == 31
    rows = rng.integers(-300, 300, size=(8, 97)).astype(np.int16)
    rows[0], rows[1], rows[2], rows[3] = 0, -32768, 32767, 5
    rows[4], rows[5, 1:] = np.where(np.arange(97) % 2, 32767, -32768), 0
    yield "edges", {"x": rows}, constants(97), attributes, True
    yield "coarse", {"x": rows}, constants(97), {**attributes, "shift": 15}, False
    for shape in ((0, 4), (2, 0, 3), (7,)):
        x = rng.integers(-300, 300, size=shape).astype(np.int16)
        yield f"{shape}", {"x": x}, constants(shape[-1]), attributes, True
    x = rng.integers(-9000, 9000, size=(133, 769)).astype(np.int16)
    yield "large", {"x": x}, constants(769), {**attributes, "low": -128, "high": 127}, False


INTEGER_CASES = {
    "IntegerAdd": add,
    "IntegerEmbedding": embedding,
    "IntegerErf": erf,
    "IntegerExp": exponential,
    "IntegerGelu": gelu,
    "IntegerLayerNorm": layer_norm,
    "IntegerRmsNorm": rms_norm,
    "IntegerSilu": silu,
    "IntegerSoftmax": softmax,
    "IntegerSqrt": square_root,
    "Requantize": requantize,
}
