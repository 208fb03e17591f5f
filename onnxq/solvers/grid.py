"""The values a weight may take, and the result of choosing among them.

All solvers take weights ``W [N, K]``: N output channels, K input channels, the axis along which
groups run (PyTorch's order; an ONNX ``MatMul`` weight is its transpose). ``X [K, T]`` are T input
vectors; ``H = 2/T X X'`` is the Hessian of the squared output error with respect to a row of W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, UnsupportedError
from onnxq.formats import (
    BdrFormat,
    Format,
    Granularity,
    IntFormat,
    KMeansFormat,
    NvFp4Format,
    Params,
    TernaryFormat,
)

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

Fit = Callable[[Float32, int], Params]
"""Parameters for the columns ``[N, g]`` of one group, given the first column's number."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Rounded weights.

    Attributes:
        fmt: the format.
        codes: ``[N, K]``, in the code dtype of the format.
        params: scales; granularity ``block(1, g)``, or ``channel(0)`` without groups.
    """

    fmt: Format
    codes: Array
    params: Params

    def values(self) -> Float32:
        """What the codes decode to, ``[N, K]`` float32."""
        return self.fmt.decode(self.codes, self.params)


def granularity_of(fmt: Format, group: int | None) -> Granularity:
    """``block(1, g)``, or one scale per row when there is no group.

    Args:
        fmt: gives the group when ``group`` is None.
        group: columns per scale; 0 for the whole row.

    Raises:
        SpecError: the format has a fixed block of another size.
    """
    size = fmt.block if group is None else group
    granularity = Granularity.block(1, size) if size else Granularity.per_channel(0)
    return fmt.resolve_granularity(granularity)


def check_weights(W: Array) -> Float32:
    """``W`` as float32.

    Raises:
        DataError: not a matrix, or NaN or Inf in it.
    """
    if W.ndim != 2:
        raise DataError("DATA-SHAPE", f"weights of shape {list(W.shape)}", "pass a matrix [N, K]")
    weights = np.asarray(W, np.float32)
    if not np.isfinite(weights).all():
        raise DataError("DATA-NOT-FINITE", "NaN or Inf in the weights", "repair the checkpoint")
    return weights


class Grid:
    """Per-column rounding to a format whose scales may be refreshed group by group.

    Every value is ``scale * element``, so a column is rounded as ``decode(encode(w / scale))`` at
    scale 1 and the codes are those of the format.

    Args:
        fmt: any format with one scale per group.
        params: scales for all of W.
        columns: K.

    Raises:
        UnsupportedError: a format whose groups have more than a scale (codebooks, microexponents).
    """

    def __init__(self, fmt: Format, params: Params, columns: int) -> None:
        if isinstance(fmt, KMeansFormat | BdrFormat | TernaryFormat):
            raise UnsupportedError(
                "UNSUPPORTED-GRID",
                f"error-diffusing solvers cannot round to {fmt}, one column at a time",
                "use an integer, float, MX, NVFP4 or NF4 format, or the rtn solver",
            )
        self.fmt = fmt
        self.size = params.granularity.size or columns
        self.params = replace(
            params,
            scale=params.scale.copy(),
            zero_point=None if params.zero_point is None else params.zero_point.copy(),
        )
        self._groups = -(-columns // self.size)
        self._scale, self._zero = self._columns(self.params)

    def _columns(self, params: Params) -> tuple[Float32, Float32]:
        """Effective scales and zero points as ``[G, N]`` float32."""
        scale = params.scale.astype(np.float32)
        if params.global_scale is not None:
            scale = scale * params.global_scale
        zero = np.zeros_like(scale)
        if params.zero_point is not None:
            zero = params.zero_point.astype(np.float32)
        if params.granularity.kind == "channel":
            scale, zero = scale[:, None], zero[:, None]
        return np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T)

    def refit(self, group: int, params: Params) -> None:
        """Replace the parameters of one group by ``params`` of its columns alone."""
        if self.params.granularity.kind == "channel":
            self.params = params
            self._scale, self._zero = self._columns(params)
            return
        self.params.scale[:, group] = params.scale[:, 0]
        if self.params.zero_point is not None and params.zero_point is not None:
            self.params.zero_point[:, group] = params.zero_point[:, 0]
        scale, zero = self._columns(params)
        self._scale[group], self._zero[group] = scale[0], zero[0]

    def round(self, w: Float32, column: int) -> tuple[Array, Float32]:
        """Codes and values of one column ``w`` (``[N]``) of W."""
        group = column // self.size
        scale, zero = self._scale[group], self._zero[group]
        fmt = self.fmt
        if isinstance(fmt, IntFormat):
            codes = np.clip(np.rint(w / scale) + zero, fmt.qmin, fmt.qmax)
            return codes, (codes - zero) * scale
        safe = np.where(scale == 0, np.float32(1), scale)
        codes = fmt.encode(np.where(scale == 0, np.float32(0), w / safe))
        return codes, fmt.decode(codes) * scale

    def solution(self, codes: Array) -> Solution:
        """The result for ``codes [N, K]``."""
        fmt = self.fmt
        if isinstance(fmt, IntFormat):
            wide = codes.astype(np.int32)
            narrow = wide.astype(np.int8) if fmt.bits < 8 and fmt.signed else wide
            return Solution(fmt, narrow.astype(fmt.numpy_dtype), self.params)
        return Solution(fmt, codes, self.params)


def plain_fit(fmt: Format, W: Float32, group: int | None) -> tuple[Params, Fit]:
    """Parameters of the extremes: for all of W, and a function for one group of columns.

    NVFP4's tensor scale stays that of W in both.
    """
    granularity = granularity_of(fmt, group)
    params = fmt.params(W, granularity)
    if isinstance(fmt, NvFp4Format):
        largest = float(np.abs(W).max(initial=0))
        return params, lambda block, _: fmt.params(block, granularity, tensor_amax=largest)
    return params, lambda block, _: fmt.params(block, granularity)
