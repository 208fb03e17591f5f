"""``gpfq``: round each weight to undo the error that the layer's output has gathered so far.

Solver and source: :mod:`onnxq.solvers.gpfq` (Lybrand and Saab, JMLR 2021). No Hessian is inverted,
so it holds up where calibration rows are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.errors import UnsupportedError
from onnxq.formats import Format, MxFormat
from onnxq.passes.weights.rounding import Array, WeightRounding, searched_scales
from onnxq.solvers.gpfq import gpfq
from onnxq.solvers.grid import Solution


@dataclass(frozen=True)
class Gpfq(WeightRounding):
    """Round the planned weights of MatMul and Gemm layers with GPFQ.

    Args:
        refresh: take the scales of a block from its columns as the error so far has changed them,
            which is the error diffusion of the MX paper; for MX formats.
    """

    name: ClassVar[str] = "gpfq"
    summary: ClassVar[str] = "round weights with GPFQ: each undoes the error gathered so far"

    refresh: bool = False

    def solve(self, rows: Array, gram: Array | None, fmt: Format, group: int) -> Solution:
        """GPFQ on searched scales, or on scales taken on the way.

        Raises:
            UnsupportedError: ``refresh`` with a format whose scales would run away.
        """
        assert gram is not None
        if self.refresh:
            if not isinstance(fmt, MxFormat):
                raise UnsupportedError(
                    "UNSUPPORTED-GRID",
                    f"`gpfq{{refresh=true}}` is for MX formats; scales of {fmt} would grow with "
                    "the error",
                    "leave refresh out, or use for example weights=mxfp4",
                )
            return gpfq(rows, gram, fmt, group=group or None, static_groups=False, act_order=False)
        return gpfq(rows, gram, fmt, group=group, params=searched_scales(rows, gram, fmt, group))
