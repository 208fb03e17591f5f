"""``opt-rtn``: round to nearest, with scales searched for the least error at the output.

Solver and source: :mod:`onnxq.solvers.scale_search` (AutoRound's optimised RTN, llama.cpp's
importance matrix). The columns' errors are weighted by the energy of their input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.formats import Format
from onnxq.passes.weights.rounding import Array, WeightRounding
from onnxq.solvers.grid import Solution
from onnxq.solvers.rtn import rtn
from onnxq.solvers.scale_search import awq_clip, opt_rtn


@dataclass(frozen=True)
class OptRtn(WeightRounding):
    """Round the planned weights of MatMul and Gemm layers to nearest, on searched scales.

    Args:
        clip: search the range of each row and group by the output error of the group, with all
            correlations of its inputs (AWQ's clip search), instead of column by column.
    """

    name: ClassVar[str] = "opt-rtn"
    summary: ClassVar[str] = "round weights to nearest, scales searched with input energies"

    clip: bool = False

    def solve(self, rows: Array, gram: Array | None, fmt: Format, group: int) -> Solution:
        """Optimised RTN."""
        assert gram is not None
        if self.clip:
            return rtn(rows, fmt, group=group, params=awq_clip(rows, gram, fmt, group=group))
        return opt_rtn(rows, fmt, group=group, importance=np.diag(gram).astype(np.float32))
