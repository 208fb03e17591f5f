"""AWQ: scale weight columns by how large their inputs are before rounding them.

Lin et al., arXiv 2306.00978, section 3.2. Rounding errors count by the inputs that they meet, so
columns with large inputs are scaled up (the input down)::

    s = mean|x|^r, clamped at 1e-4 and divided by sqrt(max s * min s),   r in {0, 1/20, ..., 19/20}

and the r with the least squared error of the layer's output is taken; r = 0 leaves all as it is.
With ``duo`` the columns' own size counts too, as in AutoAWQ's ``duo_scaling``::

    s = mean|x|^r / rms(w)^(1 - r),   r in {0, 1/20, ..., 19/20}

so that r = 0 makes all columns of W as large as one another. Formats with few exponents, whose
small numbers lie on a fixed grid within a block, lose columns that are small beside their
neighbours; where these meet large inputs it is they that matter.

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
        scale: s ``[K]`` float32; the input is divided by it. All ones if nothing gains.
        ratio: r.
        gain_db: by how much the squared output error falls.
    """

    scale: Float32
    ratio: float
    gain_db: float

    @property
    def changes(self) -> bool:
        """Whether there is a scale that lowers the error."""
        return self.gain_db > 0


def awq_scale(mean_abs: npt.ArrayLike, ratio: float) -> Float64:
    """``mean|x|^r``, clamped and centred so that the geometric mean of its ends is 1, ``[K]``."""
    scale = np.maximum(np.asarray(mean_abs, np.float64) ** ratio, _LEAST)
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()), np.float64)


def duo_scale(mean_abs: npt.ArrayLike, columns: npt.ArrayLike, ratio: float) -> Float64:
    """``mean|x|^r / rms(w)^(1 - r)``, 1 for columns of zeros, centred likewise, ``[K]``."""
    size = np.asarray(columns, np.float64)
    divisor = np.where(size > 0, size, 1.0) ** (1 - ratio)
    scale = np.maximum(np.asarray(mean_abs, np.float64) ** ratio / divisor, _LEAST)
    scale = np.where(size > 0, scale, 1.0)
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()), np.float64)


def search_awq(
    mean_abs: npt.ArrayLike,
    gram: Float64,
    weight: Float32,
    fmt: Format,
    group: int,
    *,
    duo: bool = False,
    steps: int = STEPS,
    constrain: Callable[[Float32], Float32] = lambda scale: scale,
) -> AwqScale:
    """The scale with the least error of the rounded layers' output.

    Args:
        mean_abs: ``[K]`` mean of ``|x|`` of each channel.
        gram: ``[K, K]`` ``X'X`` up to a factor.
        weight: ``[N, K]`` rows of all layers that read x.
        fmt: format of the weights, rounded to nearest.
        group: columns that share a scale; 0 for whole rows.
        duo: let the columns' size count too.
        steps: values of r.
        constrain: what the writer of x can take, see ``ScalingSite.constrain``.
    """
    narrow = (gram / max(float(np.trace(gram)), np.finfo(np.float64).tiny)).astype(np.float32)
    ones = np.ones(weight.shape[1], np.float32)
    best = AwqScale(ones, 0.0, 0.0)
    base = least = _error(weight, ones, narrow, fmt, group)
    columns = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=0))
    for step in range(0 if duo else 1, steps):
        ratio = step / steps
        wide = duo_scale(mean_abs, columns, ratio) if duo else awq_scale(mean_abs, ratio)
        scale = constrain(wide.astype(np.float32))
        error = _error(weight, scale, narrow, fmt, group)
        if error < least:
            least = error
            gain = 10 * np.log10(base / error) if error > 0 else np.inf
            best = AwqScale(scale, ratio, float(gain))
    return best


def _error(weight: Float32, scale: Float32, gram: Float32, fmt: Format, group: int) -> float:
    rounded = rtn(weight * scale, fmt, group=group).values() / scale
    difference = rounded - weight
    return float(np.einsum("nk,nk->", difference @ gram, difference, dtype=np.float64))
