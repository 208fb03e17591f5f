"""``gpfq``: round each weight to undo the error that the layer's output has gathered so far.

Solver and source: :mod:`onnxq.solvers.gpfq` (Lybrand and Saab, JMLR 2021). No Hessian is inverted,
so it holds up where calibration rows are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.formats import Format
from onnxq.passes.weights.rounding import Array, WeightRounding, searched_scales
from onnxq.solvers.gpfq import gpfq
from onnxq.solvers.grid import Solution


@dataclass(frozen=True)
class Gpfq(WeightRounding):
    """Round the planned weights of MatMul and Gemm layers with GPFQ."""

    name: ClassVar[str] = "gpfq"
    summary: ClassVar[str] = "round weights with GPFQ: each undoes the error gathered so far"

    def solve(self, rows: Array, gram: Array | None, fmt: Format, group: int) -> Solution:
        """GPFQ on searched scales."""
        assert gram is not None
        return gpfq(rows, gram, fmt, group=group, params=searched_scales(rows, gram, fmt, group))
