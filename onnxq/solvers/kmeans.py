"""k-means codebooks weighted by the inputs' second moments (as SqueezeLLM, arXiv 2306.07629)."""

from __future__ import annotations

import numpy as np

from onnxq.formats import Granularity, KMeansFormat
from onnxq.solvers.grid import Array, Solution, check_weights


def kmeans(
    W: Array,
    fmt: KMeansFormat,
    *,
    importance: Array | None = None,
    granularity: Granularity | None = None,
) -> Solution:
    """Weights replaced by the nearest of their group's centroids.

    Args:
        W: ``[N, K]``.
        fmt: gives the number of centroids.
        importance: ``[K]``, diagonal of H; default all equal.
        granularity: which weights share a codebook; default a row, or the format's block.

    Raises:
        DataError: NaN or Inf in W.
    """
    weights = check_weights(W)
    if granularity is None:
        granularity = Granularity.block(1, fmt.block) if fmt.block else Granularity.per_channel(0)
    wide = None if importance is None else np.broadcast_to(importance, weights.shape)
    params = fmt.params(weights, granularity, weights=wide)
    return Solution(fmt, fmt.encode(weights, params), params)
