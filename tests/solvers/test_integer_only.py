"""Integer arithmetic against float64, over whole input ranges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from onnxq import custom_ops
from onnxq.errors import UnsupportedError
from onnxq.solvers.integer_only import (
    EXP_ONE,
    dyadic,
    erf_constants,
    exp_constants,
    min_erf_scale,
    min_exp_scale,
)


def operator(name: str, *arrays: object, **attributes: int) -> np.ndarray:
    """The numpy reference, which the contract test holds body and kernels to."""
    (result,) = custom_ops.get(name).reference(*arrays, **attributes)
    return result


def test_dyadic_is_exact_to_31_bits() -> None:
    ratio = np.exp(np.random.default_rng(0).uniform(-20, 20, size=10_000))
    ratio[::2] *= -1
    mantissa, shift = dyadic(ratio)
    assert (np.abs(mantissa.astype(np.int64)) >= 1 << 30).all()
    error = np.abs(mantissa / np.exp2(shift.astype(np.float64)) / ratio - 1)
    assert error.max() <= 2.0**-31


def test_dyadic_carries_into_the_exponent() -> None:
    mantissa, shift = dyadic([1 - 2.0**-40, 0.0, 0.5])
    assert mantissa.tolist() == [1 << 30, 0, 1 << 30]
    assert shift.tolist() == [30, 31, 31]


@pytest.mark.parametrize("ratio", [2.0**31, 2.0**-33, np.inf, np.nan])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(UnsupportedError) as caught:
        dyadic(ratio)
    assert caught.value.code == "UNSUPPORTED-SCALE-RANGE"


@pytest.mark.parametrize(
    ("scale", "degree", "bound"),
    [
        (min_exp_scale(), 2, 2e-3),
        (1e-4, 2, 2e-3),
        (1e-3, 2, 2e-3),
        (1e-4, 3, 1e-4),
        (1e-3, 4, 5e-4),
        (0.06, 2, 0.06 / 4),
    ],
)
def test_exp_over_its_whole_range(scale: float, degree: int, bound: float) -> None:
    """Every integer down to 30 halvings, where the result has long been zero."""
    constants = exp_constants(scale, degree)
    x = np.arange(-30 * constants.ln2 - 5, 1, dtype=np.int32)
    y = operator("IntegerExp", x, **constants.attributes())
    assert np.abs(y / EXP_ONE - np.exp(scale * x)).max() <= bound
    assert (np.diff(y) >= 0).all() or degree > 2


@pytest.mark.parametrize(
    ("scale", "degree", "bound"),
    [
        (2.4e-4, 2, 0.0185),
        (8e-5, 2, 0.0185),
        (1e-3, 2, 0.0185),
        (2.4e-4, 3, 0.0024),
        (2.4e-4, 4, 0.0024),
    ],
)
def test_gelu_over_its_whole_range(scale: float, degree: int, bound: float) -> None:
    """Every 16-bit input, before the rounding to 8 bits."""
    constants = erf_constants(scale / 1.4142, degree)
    t = np.arange(-32767, 32768, dtype=np.int32)
    e = operator("IntegerErf", t, **constants.attributes())
    product = t * (e.astype(np.int64) + constants.one)
    assert np.abs(product).max() < 1 << 31
    exact = scale * t / 2 * (1 + erf(scale * t / np.sqrt(2)))
    assert np.abs(product * (scale * constants.scale / 2) - exact).max() <= bound


@pytest.mark.parametrize("degree", [2, 3])
def test_gelu_to_8_bits_exhaustively(degree: int) -> None:
    """All 8-bit inputs: off by no more than the bound, half a step and what clipping explains."""
    scale, out = 8 / 127, 8 / 255
    fine = 8 / 32767
    constants = erf_constants(fine / 1.4142, degree)
    factor, shift = dyadic([scale / fine])
    out_multiplier, out_shift = dyadic(fine * constants.scale / 2 / out)
    x = np.arange(-127, 128, dtype=np.int16)
    y = operator(
        "IntegerGelu", x, np.zeros(1, np.int32), factor, shift, np.array(6, np.uint8),
        **constants.attributes(), one=constants.one, out_multiplier=int(out_multiplier),
        out_shift=int(out_shift), low=0, high=255,
    )  # fmt: skip
    exact = scale * x / 2 * (1 + erf(scale * x / np.sqrt(2)))
    exact = np.clip(exact, -6 * out, 249 * out)
    bound = {2: 0.0185, 3: 0.0024}[degree]
    assert np.abs((y.astype(int) - 6) * out - exact).max() <= bound + out / 2


@pytest.mark.parametrize(("degree", "bound"), [(2, 0.004), (3, 0.0008)])
def test_silu_to_8_bits(degree: int, bound: float) -> None:
    scale, out = 8 / 32767, 8.3 / 255
    constants = exp_constants(scale, degree).attributes()
    constants["exp_multiplier"] = constants.pop("multiplier")
    constants["exp_shift"] = constants.pop("shift")
    out_multiplier, out_shift = dyadic(scale * 2.0**-15 / out)
    x = np.arange(-32767, 32768, dtype=np.int16)
    y = operator(
        "IntegerSilu", x, np.zeros(1, np.int32), np.array([1 << 30], np.int32),
        np.array([30], np.int32), np.array(9, np.uint8),
        **constants, out_multiplier=int(out_multiplier), out_shift=int(out_shift),
        low=0, high=255,
    )  # fmt: skip
    exact = scale * x / (1 + np.exp(-scale * x))
    assert np.abs((y.astype(int) - 9) * out - exact).max() <= bound * 4 + out / 2


@pytest.mark.parametrize(("rounding", "bound"), [(0, 1.6), (1, 1.1)])
def test_softmax_against_float64(rounding: int, bound: float) -> None:
    """Within a step of 2^-8 when rounded down, less when rounded to nearest."""
    rng = np.random.default_rng(1)
    scale = 1e-3
    x = (rng.normal(size=(500, 48)) * 3 / scale).astype(np.int32)
    attributes = exp_constants(scale).attributes() | {"bits": 8, "rounding": rounding}
    y = operator("IntegerSoftmax", x, np.zeros(1, np.int32), **attributes)
    e = np.exp(scale * (x - x.max(axis=-1, keepdims=True)))
    exact = np.minimum(e / e.sum(axis=-1, keepdims=True), 255 / 256)
    assert np.abs(y / 256 - exact).max() * 256 <= bound


def test_softmax_gives_masked_positions_nothing() -> None:
    x = np.random.default_rng(2).integers(-9000, 9000, size=(64, 32)).astype(np.int32)
    mask = np.where(np.arange(32) < 20, 0, -(1 << 24)).astype(np.int32)
    attributes = exp_constants(1e-3).attributes() | {"bits": 8, "rounding": 1}
    y = operator("IntegerSoftmax", x, mask, **attributes)
    assert not y[:, 20:].any()
    short = operator("IntegerSoftmax", x[:, :20], np.zeros(1, np.int32), **attributes)
    assert (y[:, :20] == short).all()


@pytest.mark.parametrize("name", ["IntegerLayerNorm", "IntegerRmsNorm"])
@pytest.mark.parametrize("size", [20, 3000])
def test_norms_against_float64(name: str, size: int) -> None:
    """An error of a few steps of the input's own resolution; gammas of zero and below included."""
    rng = np.random.default_rng(3)
    d, out = 384, 12 / 32767
    x = np.clip(rng.normal(size=(200, d)) * size + size, -32768, 32767).astype(np.int16)
    gamma = rng.normal(size=d)
    gamma[::7] = 0
    beta = rng.normal(size=d)
    out_shift = 42
    ratio = gamma * np.sqrt(d) / 2.0**30 / out
    multiplier = np.rint(ratio * 2.0**out_shift).astype(np.int32)
    centred = name == "IntegerLayerNorm"
    arrays = [x, multiplier]
    if centred:
        arrays.append(np.rint(beta / out * 2.0**out_shift).astype(np.int64))
    y = operator(name, *arrays, shift=0, epsilon=0, out_shift=out_shift, low=-32767, high=32767)
    wide = x.astype(np.float64)
    v = wide - wide.mean(axis=-1, keepdims=True) if centred else wide
    exact = v / np.sqrt((v**2).mean(axis=-1, keepdims=True)) * gamma + (beta if centred else 0)
    error = np.abs(y * out - exact).max()
    assert error <= 2.5 / size + 2 * out


def test_square_root_is_exact() -> None:
    roots = np.random.default_rng(4).integers(0, 2**31, size=20_000)
    for offset in (0, -1, 1):
        x = np.maximum(roots**2 + offset, 0)
        y = operator("IntegerSqrt", x)
        assert (y**2 <= x).all()
        assert ((y + 1) ** 2 > x).all()


def test_requantize_exhaustively() -> None:
    """All 16-bit inputs, to 8 bits: never more than half a step off."""
    x = np.arange(-32768, 32768, dtype=np.int16)
    for ratio in (0.003, 1 / 256, 0.0077):
        multiplier, shift = dyadic([ratio])
        y = operator(
            "Requantize", x, np.zeros(1, np.int32), multiplier, shift, np.array(0, np.int8),
            low=-128, high=127,
        )  # fmt: skip
        exact = np.clip(x * ratio, -128, 127)
        assert np.abs(y - exact).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("scale", [min_exp_scale() * 0.99, 0.8])
def test_a_scale_that_exp_cannot_take_is_refused(scale: float) -> None:
    with pytest.raises(UnsupportedError, match="input of the exponential") as caught:
        exp_constants(scale)
    assert caught.value.code == "UNSUPPORTED-SCALE-RANGE"


@pytest.mark.parametrize("scale", [min_erf_scale() * 0.99, 0.5])
def test_a_scale_that_erf_cannot_take_is_refused(scale: float) -> None:
    with pytest.raises(UnsupportedError, match="input of erf") as caught:
        erf_constants(scale)
    assert caught.value.code == "UNSUPPORTED-SCALE-RANGE"
