"""``gptq``: round weights so that the layer's output, not the weight, stays close.

Solver and source: :mod:`onnxq.solvers.gptq` (arXiv 2210.17323). The Hessian ``X^T X`` is taken on
the model as it is at the last ``calibrate``; grids are fixed before rounding starts, so that the
order of the columns leaves no trace in the packed weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.errors import SpecError
from onnxq.formats import Format
from onnxq.passes.weights.rounding import Array, WeightRounding, searched_scales
from onnxq.solvers.gptq import gptq
from onnxq.solvers.grid import Solution


@dataclass(frozen=True)
class Gptq(WeightRounding):
    """Round the planned weights of MatMul and Gemm layers with GPTQ.

    Args:
        damping: share of the mean diagonal that is added to the Hessian's diagonal; more for
            fewer calibration rows.
        act_order: round the columns with the largest activations first.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "round weights with GPTQ: later columns make up for each error"

    damping: float = 0.05
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise SpecError("SPEC-RANGE", f"damping={self.damping} is not above 0 and at most 1")

    def solve(self, rows: Array, gram: Array | None, fmt: Format, group: int) -> Solution:
        """GPTQ on searched scales."""
        assert gram is not None
        return gptq(
            rows,
            gram,
            fmt,
            group=group,
            act_order=self.act_order,
            params=searched_scales(rows, gram, fmt, group),
            damp=self.damping,
        )
