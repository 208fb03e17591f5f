"""``kmeans``: codebooks for each row or block, centroids weighted by the energy of the inputs.

Solver and source: :mod:`onnxq.solvers.kmeans` (SqueezeLLM, arXiv 2306.07629).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import UnsupportedError
from onnxq.formats import Format, Granularity, KMeansFormat
from onnxq.passes.weights.rounding import Array, WeightRounding
from onnxq.solvers.grid import Solution
from onnxq.solvers.kmeans import kmeans


@dataclass(frozen=True)
class KMeans(WeightRounding):
    """Round the planned weights of MatMul and Gemm layers to k-means centroids."""

    name: ClassVar[str] = "kmeans"
    summary: ClassVar[str] = "round weights to centroids that suit the layer's inputs"

    def solve(self, rows: Array, gram: Array | None, fmt: Format, group: int) -> Solution:
        """Weighted k-means.

        Raises:
            UnsupportedError: the plan asks for another kind of format.
        """
        assert gram is not None
        if not isinstance(fmt, KMeansFormat):
            raise UnsupportedError(
                "UNSUPPORTED-GRID",
                f"`kmeans` finds codebooks; {fmt} has fixed levels",
                "use `assign{mode=weight-only weights=kmeans4}`, or with blocks kmeans4g64",
            )
        granularity = Granularity.block(1, group) if group else Granularity.per_channel(0)
        importance = np.diag(gram).astype(np.float32)
        return kmeans(rows, fmt, importance=importance, granularity=granularity)
