"""Bias correction: give back the mean error of a rounded layer.

Nagel et al., arXiv 1906.04721: ``E[W x] - E[W_hat x] = (W - W_hat) E[x]`` is added to the bias.
"""

from __future__ import annotations

import numpy as np

from onnxq.errors import DataError
from onnxq.solvers.grid import Array, Float32


def bias_correction(W: Array, W_hat: Array, mean_input: Array) -> Float32:
    """What to add to the bias, ``[N]``.

    Args:
        W: ``[N, K]`` before rounding.
        W_hat: ``[N, K]`` after.
        mean_input: ``[K]``, the mean input over the calibration data.

    Raises:
        DataError: shapes that do not fit.
    """
    if W.shape != W_hat.shape or mean_input.shape != (W.shape[1],):
        raise DataError(
            "DATA-SHAPE",
            f"weights {list(W.shape)} and {list(W_hat.shape)}, mean {list(mean_input.shape)}",
            "pass [N, K], [N, K] and [K]",
        )
    delta = np.asarray(W, np.float64) - np.asarray(W_hat, np.float64)
    return np.asarray(delta @ np.asarray(mean_input, np.float64), np.float32)
