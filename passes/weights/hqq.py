"""``hqq``: zero points that may lie between the codes, without calibration data.

Solver and source: :mod:`onnxq.solvers.hqq` (Badri and Shaji, 2023). ``MatMulNBits`` takes such zero
points as floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import UnsupportedError
from onnxq.formats import Format, IntFormat
from onnxq.passes.keys import PLAN
from onnxq.passes.weights.rounding import Array, WeightRounding
from onnxq.solvers.grid import Solution
from onnxq.solvers.hqq import hqq


@dataclass(frozen=True)
class Hqq(WeightRounding):
    """Round the planned weights of MatMul and Gemm layers with HQQ."""

    name: ClassVar[str] = "hqq"
    summary: ClassVar[str] = "round weights with real zero points (HQQ); needs no data"
    requires: ClassVar = (PLAN,)

    def solve(self, rows: Array, gram: Array | None, fmt: Format, group: int) -> Solution:
        """HQQ.

        Raises:
            UnsupportedError: the plan asks for symmetric weights, or for no integers.
        """
        if not isinstance(fmt, IntFormat) or fmt.symmetric:
            raise UnsupportedError(
                "UNSUPPORTED-GRID",
                f"`hqq` chooses zero points; {fmt} has none",
                "use `assign{symmetric-weights=false}` and an integer format",
            )
        return hqq(np.asarray(rows, np.float32), fmt, group=group)
