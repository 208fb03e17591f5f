"""Integer constants for arithmetic without floating point: dyadic factors and polynomials.

Everything here runs once, when a model is converted; what comes out are integers that the operators
of :mod:`onnxq.custom_ops` compute with.

Dyadic factors, ``ratio ~ mantissa / 2^shift``: Jacob et al., arXiv 1712.05877, section 2.2, with a
mantissa of 31 bits. Polynomials of degree 2: Kim et al. (I-BERT), arXiv 2101.01321, equations 7 to
14, with the constants of its public code. Higher degrees are minimax fits of ours, evaluated with a
right shift after each product, so that every number fits into 32 bits.

A polynomial stands as ``p: (p4, p3, p2, p1, p0)`` and ``s: (s3, s2, s1, s0)`` and means::

    z = p4;  z = (z x >> s3) + p3;  z = (z x >> s2) + p2
    z = (z x >> s1) + p1;  z = (z x >> s0) + p0
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.errors import UnsupportedError

Int32 = npt.NDArray[np.int32]
Float64 = npt.NDArray[np.float64]

MAX_SHIFT = 62
"""A product of 32 and 31 bits has 62; what is shifted further is zero."""

EXP_ONE = 32767
"""exp(0) in the output of the integer exponential."""

MAX_LN2 = 1 << 16
"""ln 2 in steps of the input: bounds how fine the input of the exponential may be."""

MAX_EXP_STEP = 1e-3
"""The coarsest input for which I-BERT's exponential errs by no more than 2e-3."""

MAX_ERF_STEP = 0.014
"""The coarsest input for which erf keeps 14 bits."""

MAX_BOUND = 1 << 15
"""The point from which erf is taken for 1, in steps of the input."""

MAX_VALUE = 1 << 30
"""Values of a polynomial lie below: their product with a mantissa has 61 bits."""

# Ascending powers of r, for exp(r) with -ln 2 <= r <= 0. Degree 2 is I-BERT's.
_EXP = {
    2: (1.0, 0.96963238, 0.35815147),
    3: (0.99994652, 0.99744131, 0.48074584, 0.11891659),
    4: (0.99999815, 0.99986325, 0.49837922, 0.15986967, 0.02966982),
}
# The clipping point b, then ascending powers of d = min(|x|, b) - b, for erf(|x|): 1 at b, so that
# GELU(x) is x far out; 3 and 4 have the least error of GELU that leaves.
_ERF = {
    2: (1.769, 1.0, 0.0, -0.2888),
    3: (2.32, 1.0, 0.03099217, 0.08366469, 0.11518057),
    4: (2.3, 1.0, 0.0348676, 0.09251047, 0.12702646, 0.00284394),
}
_LN2 = 0.6931
_SQRT2 = 1.4142

Polynomial = tuple[tuple[int, ...], tuple[int, ...]]


def dyadic(ratio: npt.ArrayLike) -> tuple[Int32, Int32]:
    """``ratio ~ mantissa / 2^shift`` with ``2^30 <= |mantissa| < 2^31``, rounded half up.

    Args:
        ratio: any shape, any sign; zero gives mantissa 0.

    Returns:
        mantissa and shift, of the shape of ``ratio``; relative error at most 2^-31.

    Raises:
        UnsupportedError: ``UNSUPPORTED-SCALE-RANGE``, a ratio needs a shift outside of 1..62.
    """
    wide = np.asarray(ratio, np.float64)
    if not np.isfinite(wide).all():
        raise UnsupportedError("UNSUPPORTED-SCALE-RANGE", "a ratio of two scales is not finite")
    fraction, exponent = np.frexp(wide)
    mantissa = np.floor(np.ldexp(fraction, 31) + 0.5).astype(np.int64)
    carried = np.abs(mantissa) == 1 << 31
    mantissa = np.where(carried, mantissa // 2, mantissa)
    shift = np.where(wide == 0, 31, 31 - exponent.astype(np.int64) - carried)
    if (shift < 1).any() or (shift > MAX_SHIFT).any():
        worst = wide.reshape(-1)[int(np.abs(shift.reshape(-1) - 31).argmax())]
        raise UnsupportedError(
            "UNSUPPORTED-SCALE-RANGE",
            f"the ratio {worst:.3g} of two scales is no 31-bit mantissa over 2^1 to 2^{MAX_SHIFT}",
            "look for a tensor of the layer whose range is next to nothing, or enormous",
        )
    return mantissa.astype(np.int32), shift.astype(np.int32)


def horner(polynomial: Polynomial, x: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The value of ``polynomial`` at integers ``x``, exactly."""
    p, s = polynomial
    z = np.full_like(x, p[0])
    for coefficient, shift in zip(p[1:], s, strict=True):
        z = (z * x >> shift) + coefficient
    return z


@dataclass(frozen=True)
class ExpConstants:
    """The exponential of inputs ``scale * x``.

    Args:
        ln2: ln 2 in steps of the input.
        polynomial: of the remainder ``-ln2 < r <= 0``.
        multiplier, shift: bring the polynomial's value to steps of 1/32767.
    """

    ln2: int
    polynomial: Polynomial
    multiplier: int
    shift: int

    def attributes(self) -> dict[str, int]:
        """As the operators' nodes carry them."""
        return {
            "ln2": self.ln2,
            **polynomial_attributes(self.polynomial),
            "multiplier": self.multiplier,
            "shift": self.shift,
        }


@dataclass(frozen=True)
class ErfConstants:
    """erf of inputs ``scale * x``; with I-BERT's polynomial the output's scale is negative.

    Args:
        bound: from here on erf is 1, in steps of the input.
        polynomial: of ``-bound <= d <= 0``.
        shift: applied to the polynomial's value.
        scale: of the output.
    """

    bound: int
    polynomial: Polynomial
    shift: int
    scale: float

    @property
    def one(self) -> int:
        """1 in steps of the output, rounded down as I-BERT does."""
        return math.floor(1 / self.scale)

    def attributes(self) -> dict[str, int]:
        """As the operators' nodes carry them."""
        return {
            "bound": self.bound,
            **polynomial_attributes(self.polynomial),
            "erf_shift": self.shift,
        }


def polynomial_attributes(polynomial: Polynomial) -> dict[str, int]:
    """``p4`` to ``p0`` and ``s3`` to ``s0``."""
    p, s = polynomial
    return {f"p{4 - i}": c for i, c in enumerate(p)} | {f"s{3 - i}": c for i, c in enumerate(s)}


def min_exp_scale() -> float:
    """The finest input for which I-BERT's exponential stays below ``MAX_VALUE``."""
    c, _, a = _EXP[2]
    return math.sqrt(c / a / MAX_VALUE) * (1 + 1e-9)


def exp_refinement(scale: float) -> int:
    """How often a step of ``scale`` is to be halved, by shifting inputs left, for ``MAX_EXP_STEP``.

    An exponential of coarse inputs errs because its constants are whole steps, ln 2 first of all;
    shifted inputs are the same numbers in finer steps.
    """
    return max(0, math.ceil(math.log2(scale / MAX_EXP_STEP)))


def exp_constants(scale: float, degree: int = 2) -> ExpConstants:
    """Constants of the exponential for inputs in steps of ``scale``.

    It errs by at most 2e-3 up to ``MAX_EXP_STEP`` (I-BERT's), 1e-4 and half a step with degree 3 or
    4. Coarser inputs add half a step: ln 2 is too long by less than a step, which changes
    ``exp(-k ln 2)`` by less than ``k / 2^k`` steps. :func:`exp_refinement` says what to do.

    Raises:
        UnsupportedError: ``UNSUPPORTED-SCALE-RANGE``, the step is too fine for 32 bits, or coarser
            than ln 2.
    """
    ln2 = -math.floor(-_LN2 / scale)
    coefficients = _EXP[degree]
    if not (min_exp_scale() <= scale and ln2 >= 1 and scale <= _LN2):
        raise UnsupportedError(
            "UNSUPPORTED-SCALE-RANGE",
            f"a step of {scale:.3g} in the input of the exponential is not between "
            f"{min_exp_scale():.3g} and {_LN2}",
            "bring the input to another scale first",
        )
    if degree == 2:
        c, b, a = coefficients
        p = (0, 0, 1, math.floor(b / a / scale), math.floor(c / a / scale**2))
        polynomial: Polynomial = p, (0, 0, 0, 0)
        unit = a * scale**2
    else:
        polynomial, unit = _fixed_point(coefficients, scale, ln2, MAX_VALUE)
    multiplier, shift = dyadic(EXP_ONE * unit)
    return ExpConstants(ln2, polynomial, int(multiplier), int(shift))


def min_erf_scale(degree: int = 2) -> float:
    """The finest input of erf: its clipping point is ``MAX_BOUND`` steps away."""
    return _ERF[degree][0] / MAX_BOUND


def erf_constants(scale: float, degree: int = 2, shift: int | None = None) -> ErfConstants:
    """Constants of erf for inputs in steps of ``scale``.

    Args:
        scale: of the input.
        degree: 2 is I-BERT's polynomial.
        shift: applied to the polynomial's value; by default what leaves 14 bits. I-BERT has 14.

    Raises:
        UnsupportedError: ``UNSUPPORTED-SCALE-RANGE``, the step is too fine for 32 bits, or too
            coarse for erf.
    """
    clip, *ascending = _ERF[degree]
    if not min_erf_scale(degree) <= scale <= MAX_ERF_STEP:
        raise UnsupportedError(
            "UNSUPPORTED-SCALE-RANGE",
            f"a step of {scale:.3g} in the input of erf is not between "
            f"{min_erf_scale(degree):.3g} and {MAX_ERF_STEP:.3g}",
            "bring the input to another scale first",
        )
    bound = -math.floor(-clip / scale)
    if degree == 2:
        a = ascending[2]
        p = (0, 0, 1, 0, math.floor(1 / a / scale**2))
        polynomial: Polynomial = p, (0, 0, 0, 0)
        unit = a * scale**2
    else:
        polynomial, unit = _fixed_point(tuple(ascending), scale, bound, 1 << 30)
    if shift is None:
        shift = max(0, abs(polynomial[0][-1]).bit_length() - 15)
    return ErfConstants(bound, polynomial, shift, unit * 2.0**shift)


def _fixed_point(
    ascending: tuple[float, ...], scale: float, extent: int, limit: int
) -> tuple[Polynomial, float]:
    """Horner's rule for ``sum c_i (scale x)^i`` with ``|x| <= extent`` in numbers of 31 bits.

    Each stage holds ``v * unit`` of its true value v. A product with x has the unit
    ``unit / scale``; a shift by s makes that ``unit / scale / 2^s``.

    Returns:
        the polynomial, and what one step of its value is worth.
    """
    coefficients = ascending[::-1]
    # Largest possible values of the stages, for x from -extent to 0.
    x = np.linspace(-extent * scale, 0, 513)
    stages, value = [], np.zeros_like(x)
    for c in coefficients:
        value = value * x + c
        stages.append(float(np.abs(value).max()))
    room = float(limit) * 0.98
    unit = 2.0 ** math.floor(math.log2(room / extent / stages[0]))
    p = [round(coefficients[0] * unit)]
    s = []
    for index, c in enumerate(coefficients[1:], 1):
        last = index == len(coefficients) - 1
        largest = room / stages[index] / (1 if last else extent)
        shift = max(0, math.ceil(math.log2(unit / scale / largest)))
        unit = unit / scale / 2.0**shift
        s.append(shift)
        p.append(round(c * unit))
    missing = 5 - len(p)
    return ((0,) * missing + tuple(p), (0,) * missing + tuple(s)), 1 / unit
