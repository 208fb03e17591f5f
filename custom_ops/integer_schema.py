"""Inputs and attributes that several integer-only operators share."""

from __future__ import annotations

from onnxq.custom_ops.registry import Attribute

FACTOR_INPUTS = {
    "bias": "`[N]` or `[1]` i32",
    "multiplier": "`[N]` or `[1]` i32",
    "shift": "`[N]` or `[1]` i32, 1 to 62",
}
"""A bias and a dyadic factor for each column, or for all."""

LINEAR_INPUTS = {
    "x": "`[..., N]` i32 or i16",
    **FACTOR_INPUTS,
    "zero_point": "`[]` i8, u8 or i16",
}
"""Of the operators that read the sum of a linear layer and write the type of the zero point."""

LIMITS = (
    Attribute("low", "INT", "least value of y"),
    Attribute("high", "INT", "largest value of y"),
)

OUTPUT_FACTOR = (
    Attribute("out_multiplier", "INT", "of the product, any sign"),
    Attribute("out_shift", "INT", "of the product, 1 to 62"),
    *LIMITS,
)

_POLYNOMIAL = (
    *(Attribute(f"p{i}", "INT", f"coefficient {i} of the polynomial") for i in (4, 3, 2, 1, 0)),
    *(Attribute(f"s{i}", "INT", f"right shift before coefficient {i}") for i in (3, 2, 1, 0)),
)

ERF = (
    Attribute("bound", "INT", "where erf reaches 1, in steps of its input"),
    *_POLYNOMIAL,
    Attribute("erf_shift", "INT", "of the value of the polynomial"),
)

NORM = (
    Attribute("shift", "INT", "before squaring, 0 to 15"),
    Attribute("epsilon", "INT", "added to the sum of squares"),
    Attribute("out_shift", "INT", "of the multiplier, 1 to 62"),
    *LIMITS,
)


def exponential(prefix: str = "") -> tuple[Attribute, ...]:
    """Of the exponential; ``prefix`` for the names of its factor."""
    return (
        Attribute("ln2", "INT", "ln 2 in steps of its input"),
        *_POLYNOMIAL,
        Attribute(f"{prefix}multiplier", "INT", "of the value of the polynomial"),
        Attribute(f"{prefix}shift", "INT", "of the value of the polynomial"),
    )
