"""Cross-layer equalization: even out weight ranges between layers that follow each other.

Nagel et al., arXiv 1906.04721, section 4.1. For layers with weights W1 (output channel i) and W2
(input channel i), and a function between them with ``f(s x) = s f(x)`` for s > 0::

    s_i = sqrt(r1_i r2_i) / r2_i,   r1_i = max |W1[i]|,   r2_i = max |W2[:, i]|
    W1[i] <- W1[i] / s_i,   b1_i <- b1_i / s_i,   W2[:, i] <- W2[:, i] s_i

after which both ranges are ``sqrt(r1_i r2_i)``, the choice that leaves per-tensor weights the most
precision. In a chain the pairs are swept until nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

MAX_SWEEPS = 40
TOLERANCE = 1e-3
"""Largest relative change of a channel at which the sweeps end."""


def equalizing_scale(first: npt.ArrayLike, second: npt.ArrayLike) -> Float64:
    """``s = sqrt(r1 / r2)``, 1 where a range is zero (a dead channel); ``[C]``."""
    r1, r2 = np.asarray(first, np.float64), np.asarray(second, np.float64)
    alive = (r1 > 0) & (r2 > 0)
    return np.asarray(np.sqrt(np.where(alive, r1, 1.0) / np.where(alive, r2, 1.0)), np.float64)


def sweep(pairs: Sequence[Any], step: Callable[[Any], Float64]) -> int:
    """Call ``step`` on all pairs, over and over, until no scale is far from 1.

    Args:
        pairs: in the order of the data.
        step: equalizes one pair and returns the scale that it applied.

    Returns:
        how many sweeps it took.
    """
    for number in range(1, MAX_SWEEPS + 1):
        largest = max((float(np.abs(np.log(step(pair))).max()) for pair in pairs), default=0.0)
        if largest < TOLERANCE:
            return number
    return MAX_SWEEPS
