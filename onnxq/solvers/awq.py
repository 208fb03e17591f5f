"""AWQ: scale weight columns by how large their inputs are before rounding them.

Lin et al., arXiv 2306.00978, section 3.2. Rounding errors count by the inputs that they meet, so
columns with large inputs are scaled up (the input down)::

    s = mean|x|^r, clamped at 1e-4 and divided by sqrt(max s * min s),   r in {0, 1/20, ..., 19/20}

and the r with the least squared error of the layer's output is taken; r = 0 leaves all as it is.
The paper measures the error of a whole block by running it. Here it is that of the layers which
read the activation, ``tr(D G D')`` with ``D = Q(W s)/s - W`` and ``G = X'X``, which needs no run
and sees every calibration token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.formats import Format
from onnxq.solvers.rtn import rtn

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

STEPS = 20
_LEAST = 1e-4


@dataclass(frozen=True)
class AwqScale:
    """A choice for one site.

    Attributes:
        scale: s ``[K]`` float32; the input is divided by it. All ones if r is 0.
        ratio: r.
        gain_db: by how much the squared output error falls.
    """

    scale: Float32
    ratio: float
    gain_db: float


def awq_scale(mean_abs: npt.ArrayLike, ratio: float) -> Float64:
    """``mean|x|^r``, clamped and centred so that the geometric mean of its ends is 1, ``[K]``."""
    scale = np.maximum(np.asarray(mean_abs, np.float64) ** ratio, _LEAST)
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()), np.float64)


def search_awq(
    mean_abs: npt.ArrayLike,
    gram: Float64,
    weight: Float32,
    fmt: Format,
    group: int,
    *,
    constrain: Callable[[Float32], Float32] = lambda scale: scale,
) -> AwqScale:
    """The scale with the least error of the rounded layers' output.

    Args:
        mean_abs: ``[K]`` mean of ``|x|`` of each channel.
        gram: ``[K, K]`` ``X'X`` up to a factor.
        weight: ``[N, K]`` rows of all layers that read x.
        fmt: format of the weights, rounded to nearest.
        group: columns that share a scale; 0 for whole rows.
        constrain: what the writer of x can take, see ``ScalingSite.constrain``.
    """
    narrow = (gram / max(float(np.trace(gram)), np.finfo(np.float64).tiny)).astype(np.float32)
    ones = np.ones(weight.shape[1], np.float32)
    best = AwqScale(ones, 0.0, 0.0)
    base = least = _error(weight, ones, narrow, fmt, group)
    for step in range(1, STEPS):
        scale = constrain(awq_scale(mean_abs, step / STEPS).astype(np.float32))
        error = _error(weight, scale, narrow, fmt, group)
        if error < least:
            least = error
            gain = 10 * np.log10(base / error) if error > 0 else np.inf
            best = AwqScale(scale, step / STEPS, float(gain))
    return best


def _error(weight: Float32, scale: Float32, gram: Float32, fmt: Format, group: int) -> float:
    rounded = rtn(weight * scale, fmt, group=group).values() / scale
    difference = rounded - weight
    return float(np.einsum("nk,nk->", difference @ gram, difference, dtype=np.float64))
