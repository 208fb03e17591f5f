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
from onnxq.solvers.scale_search import opt_rtn


@dataclass(frozen=True)
class OptRtn(WeightRounding):
    """Round the planned weights of MatMul and Gemm layers to nearest, on searched scales."""

    name: ClassVar[str] = "opt-rtn"
    summary: ClassVar[str] = "round weights to nearest, scales searched with input energies"

    def solve(self, rows: Array, gram: Array | None, fmt: Format, group: int) -> Solution:
        """Optimised RTN."""
        assert gram is not None
        return opt_rtn(rows, fmt, group=group, importance=np.diag(gram).astype(np.float32))
