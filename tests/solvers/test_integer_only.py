"""Integer arithmetic against float64, over whole input ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import erf, expit

from onnxq import custom_ops
from onnxq.errors import UnsupportedError
from onnxq.solvers.integer_only import (
    EXP_ONE,
    MAX_ERF_STEP,
    MAX_EXP_STEP,
    dyadic,
    erf_constants,
    exp_constants,
    exp_refinement,
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


EXP_FLOOR = {2: 2e-3, 3: 1e-4, 4: 5e-5}
GELU_FLOOR = {2: 0.0185, 3: 0.0024, 4: 0.0024}
SILU_FLOOR = {2: 8e-4, 3: 1.5e-4, 4: 1.5e-4}


def exp_bound(scale: float, degree: int) -> float:
    """What docs/integer_only.md states."""
    if degree == 2 and scale <= MAX_EXP_STEP:
        return EXP_FLOOR[2]
    return EXP_FLOOR[degree] + scale / 2


def gelu_bound(scale: float, degree: int) -> float:
    """What docs/integer_only.md states."""
    if degree == 2:
        return max(GELU_FLOOR[2], 2.5 * scale)
    return GELU_FLOOR[degree] + (1.5 * scale if scale > 1e-3 else 0)


def silu_bound(scale: float, degree: int) -> float:
    """What docs/integer_only.md states."""
    return SILU_FLOOR[degree] + 0.65 * scale


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_exp_over_its_whole_range(degree: int) -> None:
    """Every integer down to 30 halvings, where the result has long been zero, at every scale."""
    for scale in np.geomspace(min_exp_scale() * (1 + 1e-9), 0.6931, 60):
        constants = exp_constants(float(scale), degree)
        x = np.arange(-30 * constants.ln2 - 5, 1, dtype=np.int32)
        y = operator("IntegerExp", x, **constants.attributes())
        error = np.abs(y / EXP_ONE - np.exp(scale * x)).max()
        assert error <= exp_bound(float(scale), degree), scale
        assert (np.diff(y) >= 0).all() or degree > 2


def test_exp_up_to_its_coarsest_step() -> None:
    """Rounding the constants to whole steps can be lucky: many scales near the limit."""
    for scale in np.linspace(0.5, 1, 800) * MAX_EXP_STEP:
        constants = exp_constants(float(scale))
        x = np.arange(-3 * constants.ln2, 1, dtype=np.int32)
        y = operator("IntegerExp", x, **constants.attributes())
        assert np.abs(y / EXP_ONE - np.exp(scale * x)).max() <= 2e-3


@pytest.mark.parametrize(("degree", "bound"), [(2, 2e-3), (3, 6e-4), (4, 6e-4)])
def test_exp_of_8_bit_inputs_exhaustively(degree: int, bound: float) -> None:
    """All codes at all scales: refined, they err no more than fine inputs do."""
    x = np.arange(-255, 1, dtype=np.int32)
    for scale in map(float, np.geomspace(min_exp_scale() * (1 + 1e-9), 0.6931, 400)):
        halvings = exp_refinement(scale)
        constants = exp_constants(scale / 2**halvings, degree)
        y = operator("IntegerExp", x << halvings, **constants.attributes())
        assert np.abs(y / EXP_ONE - np.exp(scale * x)).max() <= bound


def test_refining_goes_as_far_as_needed() -> None:
    steps = [MAX_EXP_STEP / 9, MAX_EXP_STEP, MAX_EXP_STEP * 1.01, 2 * MAX_EXP_STEP, 0.06]
    assert [exp_refinement(step) for step in steps] == [0, 0, 1, 1, 6]


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_gelu_over_its_whole_range(degree: int) -> None:
    """Every 16-bit input at every scale, before the rounding to 8 bits."""
    least = min_erf_scale(degree) * (1 + 1e-9)
    for erf_scale in np.geomspace(least, MAX_ERF_STEP * (1 - 1e-9), 60):
        scale = float(erf_scale) * 1.4142
        constants = erf_constants(float(erf_scale), degree)
        t = np.arange(-32767, 32768, dtype=np.int32)
        e = operator("IntegerErf", t, **constants.attributes())
        product = t * (e.astype(np.int64) + constants.one)
        assert np.abs(product).max() < 1 << 31
        exact = scale * t / 2 * (1 + erf(scale * t / np.sqrt(2)))
        error = np.abs(product * (scale * constants.scale / 2) - exact).max()
        assert error <= gelu_bound(scale, degree), scale


@pytest.mark.parametrize("degree", [2, 3, 4])
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
    bound = gelu_bound(fine, degree)
    assert np.abs((y.astype(int) - 6) * out - exact).max() <= bound + out / 2


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_silu_over_its_whole_range(degree: int) -> None:
    """Every 16-bit input at every scale, to 16 bits."""
    for scale in map(float, np.geomspace(min_exp_scale() * (1 + 1e-9), 0.05, 40)):
        y = silu(np.arange(-32767, 32768, dtype=np.int16), scale, scale, degree, np.int16)
        t = scale * np.arange(-32767, 32768)
        exact = t * expit(t)
        assert np.abs(y * scale - exact).max() <= silu_bound(scale, degree) + scale / 2, scale


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_silu_to_8_bits_exhaustively(degree: int) -> None:
    """All 8-bit inputs, on a step of 2^-8 of theirs."""
    step, out = 8 / 127, 8.3 / 255
    x = np.arange(-127, 128, dtype=np.int16)
    y = silu(x * 256, step / 256, out, degree, np.uint8, zero=9)
    exact = step * x * expit(step * x)
    assert (
        np.abs((y.astype(int) - 9) * out - exact).max() <= silu_bound(step / 256, degree) + out / 2
    )


def silu(
    t: np.ndarray, scale: float, out: float, degree: int, dtype: Any, zero: int = 0
) -> np.ndarray:
    """The operator on ``scale * t``, in steps of ``out``."""
    constants = exp_constants(scale, degree).attributes()
    constants["exp_multiplier"] = constants.pop("multiplier")
    constants["exp_shift"] = constants.pop("shift")
    out_multiplier, out_shift = dyadic(scale * 2.0**-15 / out)
    limits = np.iinfo(dtype)
    return operator(
        "IntegerSilu", t.astype(np.int16), np.zeros(1, np.int32), np.array([1 << 30], np.int32),
        np.array([30], np.int32), np.array(zero, dtype),
        **constants, out_multiplier=int(out_multiplier), out_shift=int(out_shift),
        low=int(limits.min), high=int(limits.max),
    )  # fmt: skip


def rows_of_two_heights(n: int, ln2: int) -> np.ndarray:
    """Some of n positions at the top, the others at one distance, for every kind of distance."""
    near = np.arange(17) * ln2
    distances = np.unique(np.concatenate([np.linspace(0, 17 * ln2, 700), near, near + 1]))
    rows = []
    for top in sorted({1, 2, n // 4, n // 2, n - 1} - {0}):
        x = np.zeros((len(distances), n), np.int32)
        x[:, top:] = -distances.astype(np.int32)[:, None]
        rows.append(x)
    return np.concatenate(rows)


@pytest.mark.parametrize("rounding", [0, 1])
@pytest.mark.parametrize("n", [2, 3, 8, 48, 128, 512])
@pytest.mark.parametrize(("scale", "degree"), [(1e-3, 2), (6e-5, 2), (1e-3, 4)])
def test_softmax_against_float64(scale: float, degree: int, n: int, rounding: int) -> None:
    """The worst rows: an exponential just rounded up stands beside one, as often as there is room.

    Half a step of 2^-8 (a whole one rounded down), what the exponential errs, n / 256 steps.
    """
    attributes = exp_constants(scale, degree).attributes() | {"bits": 8, "rounding": rounding}
    x = rows_of_two_heights(n, attributes["ln2"])
    x = np.concatenate([x, np.random.default_rng(1).normal(size=(400, n)) * 3 / scale]).astype(
        np.int32
    )
    y = operator("IntegerSoftmax", x, np.zeros(1, np.int32), **attributes)
    e = np.exp(scale * (x - x.max(axis=-1, keepdims=True)))
    exact = np.minimum(e / e.sum(axis=-1, keepdims=True), 255 / 256)
    bound = (0.5 if rounding else 1) + 0.35 + n / 256
    assert np.abs(y / 256 - exact).max() * 256 <= bound


def test_softmax_of_8_bit_inputs_exhaustively() -> None:
    """Every pair of codes, at coarse scales too."""
    x = np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1).reshape(-1, 2)
    for scale in map(float, np.geomspace(1e-4, 0.5, 12)):
        halvings = exp_refinement(scale)
        attributes = exp_constants(scale / 2**halvings).attributes() | {"bits": 8, "rounding": 1}
        y = operator(
            "IntegerSoftmax", (x << halvings).astype(np.int32), np.zeros(1, np.int32), **attributes
        )
        exact = np.minimum(1 / (1 + np.exp(scale * (x[:, ::-1] - x))), 255 / 256)
        assert np.abs(y / 256 - exact).max() * 256 <= 0.86


def test_softmax_gives_masked_positions_nothing() -> None:
    x = np.random.default_rng(2).integers(-9000, 9000, size=(64, 32)).astype(np.int32)
    mask = np.where(np.arange(32) < 20, 0, -(1 << 24)).astype(np.int32)
    attributes = exp_constants(1e-3).attributes() | {"bits": 8, "rounding": 1}
    y = operator("IntegerSoftmax", x, mask, **attributes)
    assert not y[:, 20:].any()
    short = operator("IntegerSoftmax", x[:, :20], np.zeros(1, np.int32), **attributes)
    assert (y[:, :20] == short).all()


def norm_error(name: str, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """How far each output is off, less what its bound allows."""
    d, out, out_shift = x.shape[-1], 40 / 32767, 40
    multiplier = np.rint(gamma * np.sqrt(d) / 2.0**30 / out * 2.0**out_shift).astype(np.int32)
    centred = name == "IntegerLayerNorm"
    arrays = [x, multiplier]
    if centred:
        arrays.append(np.rint(beta / out * 2.0**out_shift).astype(np.int64))
    y = operator(name, *arrays, shift=0, epsilon=0, out_shift=out_shift, low=-32767, high=32767)
    wide = x.astype(np.float64)
    v = wide - wide.mean(axis=-1, keepdims=True) if centred else wide
    sigma = np.sqrt((v**2).mean(axis=-1, keepdims=True))
    normal = np.divide(v, sigma, out=np.zeros_like(v), where=sigma > 0)
    exact = normal * gamma + (beta if centred else 0)
    allowed = np.divide(2 * np.abs(gamma), sigma, out=np.zeros_like(v), where=sigma > 0) + out
    allowed += np.abs(normal * gamma) * sigma * np.sqrt(d) / 2.0**31
    return np.abs(y * out - exact) - allowed


@pytest.mark.parametrize("name", ["IntegerLayerNorm", "IntegerRmsNorm"])
def test_norms_against_float64(name: str) -> None:
    """Twice gamma / sigma, in steps of the input, and a step of the output, whatever the row is.

    Besides, 2^31 over the deviation is rounded down, which counts where that is large.
    """
    rng = np.random.default_rng(3)
    for d in (1, 2, 3, 7, 64, 384, 1024):
        gamma, beta = rng.normal(size=d) + 0.5, rng.normal(size=d)
        gamma[::7] = 0
        sizes = np.geomspace(0.3, 12_000, 150)[:, None]
        rows = rng.normal(size=(150, d)) * sizes + rng.normal(size=(150, 1)) * sizes
        edges = np.zeros((8, d))
        edges[1], edges[2], edges[3] = 7, -32768, 32767
        edges[4, 0], edges[5, 0], edges[6] = 1, -32768, np.where(np.arange(d) % 2, 32767, -32768)
        edges[7, ::2] = 1
        x = np.clip(np.concatenate([rows, edges]), -32768, 32767).astype(np.int16)
        assert norm_error(name, x, gamma, beta).max() <= 0, d


@pytest.mark.parametrize("name", ["IntegerLayerNorm", "IntegerRmsNorm"])
def test_norms_of_8_bit_inputs_exhaustively(name: str) -> None:
    """Every pair of codes."""
    codes = np.arange(-128, 128)
    x = np.stack(np.meshgrid(codes, codes), axis=-1).reshape(-1, 2).astype(np.int16)
    gamma, beta = np.array([1.0, -0.7]), np.array([0.3, 0.0])
    assert norm_error(name, x, gamma, beta).max() <= 0


def test_square_root_is_exact() -> None:
    drawn = np.random.default_rng(4).integers(0, 2**31, size=20_000)
    roots = np.concatenate([np.arange(1024), drawn, 2**31 - 1 - np.arange(100)])
    for offset in (0, -1, 1):
        x = np.maximum(roots**2 + offset, 0)
        y = operator("IntegerSqrt", x)
        assert (y**2 <= x).all()
        assert ((y + 1) ** 2 > x).all()


def test_square_root_of_16_bits_exhaustively() -> None:
    x = np.arange(1 << 16, dtype=np.int64)
    assert (operator("IntegerSqrt", x) == np.floor(np.sqrt(x))).all()


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
