"""QuantizeBlock against the formats' own codecs and ml_dtypes, and what it refuses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxq import custom_ops
from onnxq.custom_ops.block_format import block_attributes
from onnxq.custom_ops.defs.quantize_block import round_element
from onnxq.errors import DataError, UnsupportedError
from onnxq.formats import Granularity, parse_format
from onnxq.runtime import Library, session
from tests.custom_ops.cases import BLOCK_FORMATS, Array, Case, model_of

OP = "QuantizeBlock"


def rounded(x: Array, name: str, group: int = 0, factor: float = 0.0) -> Array:
    case = Case(
        name, {"x": x}, attributes=block_attributes(parse_format(name), group=group, factor=factor)
    )
    result: Array = session(model_of(OP, case), threads=1, library=True).run(None, case.inputs)[0]
    return result


@pytest.mark.parametrize(("name", "group"), BLOCK_FORMATS)
def test_is_what_the_format_encodes_and_decodes(name: str, group: int, library: Library) -> None:
    """To the bit where scales are powers of two; else but for ties, whose quotient may differ."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(64, 192)) * rng.lognormal(0, 2, size=(64, 192))).astype(np.float32)
    fmt = parse_format(name)
    granularity = None if fmt.fixed_block else Granularity.block(1, group or 192)
    params = fmt.params(x, granularity, axis=1)
    factor = 0.0 if params.global_scale is None else float(params.global_scale)
    theirs = fmt.decode(fmt.encode(x, params), params)
    ours = rounded(x, name, group, factor)
    if name.startswith("mx"):
        assert np.array_equal(ours, theirs)
        return
    far = np.abs(ours - theirs) > 1e-6 * np.abs(theirs)
    assert np.count_nonzero(far) <= 2
    assert np.abs(ours - theirs).max() <= 0.3 * np.abs(x).max()


@pytest.mark.parametrize(
    ("dtype", "mantissa", "min_exponent", "largest"),
    [
        (ml_dtypes.float4_e2m1fn, 1, 0, 6.0),
        (ml_dtypes.float6_e2m3fn, 3, 0, 7.5),
        (ml_dtypes.float6_e3m2fn, 2, -2, 28.0),
        (ml_dtypes.float8_e4m3fn, 3, -6, 448.0),
        (ml_dtypes.float8_e5m2, 2, -14, 57344.0),
    ],
)
def test_elements_are_those_of_ml_dtypes(
    dtype: type, mantissa: int, min_exponent: int, largest: float
) -> None:
    """All their numbers, the points between them, and one float to both sides."""
    every = np.arange(1 << 8, dtype=np.uint8).view(dtype) if largest > 28 else None
    values = np.linspace(0, largest, 100_003, dtype=np.float32)
    if every is not None:
        numbers = np.unique(np.abs(every.astype(np.float32)))
        numbers = numbers[np.isfinite(numbers)]
        values = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2])
    values = np.concatenate(
        [values, np.nextafter(values, np.float32(0)), np.nextafter(values, np.float32(np.inf))]
    )
    values = values[values <= largest]
    theirs = values.astype(dtype).astype(np.float32)
    assert np.array_equal(round_element(values, mantissa, min_exponent, largest), theirs)


def test_noise_of_mxfp4(
    library: Library,
) -> None:
    """MXFP4 of normal numbers: the published 18.8 dB of signal to noise."""
    x = np.random.default_rng(0).normal(size=(1 << 11, 512)).astype(np.float32)
    error = rounded(x, "mxfp4").astype(np.float64) - x
    assert 10 * np.log10((x.astype(np.float64) ** 2).mean() / (error**2).mean()) == pytest.approx(
        18.79, abs=0.05
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": -1}, "block = -1 is below 0"),
        ({"mantissa": 16}, "mantissa = 16 is not in 0 to 15"),
        ({"min_exponent": -31}, "min_exponent = -31 is not in -30 to 15"),
        ({"largest": 0.0}, "largest is not in"),
        ({"largest": float("nan")}, "largest is not in"),
        ({"scale": 4}, "scale = 4 is not 0 to 3"),
        ({"lowest": 1.0}, "lowest is not in"),
        ({"factor": float("inf")}, "factor is negative or not finite"),
        ({"factor": -1.0}, "factor is negative or not finite"),
        ({"clip": 0.0}, "clip is not in"),
        ({"clip": 1.5}, "clip is not in"),
    ],
)
def test_wrong_attributes_are_refused(
    change: dict[str, float], message: str, library: Library
) -> None:
    attributes = block_attributes(parse_format("mxfp4"))
    case = Case("x", {"x": np.zeros((1, 32), np.float32)}, attributes=attributes)
    model = onnx.load_from_string(model_of(OP, case))
    for attribute in model.graph.node[0].attribute:
        if attribute.name in change:
            value = change[attribute.name]
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, value))
    with pytest.raises(DataError, match=r"com\.onnxq:QuantizeBlock: .*" + message):
        session(model.SerializeToString(), threads=1, library=library.path)


def test_a_scalar_is_refused(library: Library) -> None:
    attributes = block_attributes(parse_format("mxfp4"))
    case = Case("x", {"x": np.zeros((1, 32), np.float32)}, attributes=attributes)
    made = session(model_of(OP, case), threads=1, library=library.path)
    with pytest.raises(Exception, match=r"com\.onnxq:QuantizeBlock: x is a scalar"):
        made.run(None, {"x": np.zeros((), np.float32)})


def test_formats_that_do_not_fit_are_refused() -> None:
    for name in ("nf4", "int8asym", "int4full", "mxfp4-auto", "nvfp4-46", "binary"):
        with pytest.raises(UnsupportedError, match=f"does not round to {name}"):
            block_attributes(parse_format(name))


def test_min_opset() -> None:
    assert custom_ops.get(OP).min_opset == 18
