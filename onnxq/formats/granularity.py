"""Which elements of a tensor share one scale.

Parameter shapes follow ONNX ``QuantizeLinear``; for a tensor of shape ``[d0, ..., dn]``:

============  =============================================  ==============================
kind          elements that share a scale                    shape of the scale
============  =============================================  ==============================
tensor        all                                            ``[]``
channel(a)    one slice along axis a                         ``[d_a]``
block(a, g)   g neighbours along axis a (the tail may be     ``[d0, ..., ceil(d_a/g), ..]``
              shorter)
token         one row along the last axis                    ``[d0, ..., 1]``
============  =============================================  ==============================
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, SpecError

Array = npt.NDArray[Any]
Kind = Literal["tensor", "channel", "block", "token"]


@dataclass(frozen=True)
class Granularity:
    """Which elements share one scale; see the module text for shapes.

    Args:
        kind: ``tensor``, ``channel``, ``block`` or ``token``.
        axis: axis of the channels, or axis along which blocks run; unused otherwise.
        size: elements of one block; only for ``block``.

    Raises:
        SpecError: an unknown kind, or a block without a positive size.
    """

    kind: Kind = "tensor"
    axis: int = -1
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "channel", "block", "token"):
            raise SpecError(
                "SPEC-GRANULARITY",
                f"unknown granularity {self.kind!r}",
                "use tensor, channel(axis), block(axis,size) or token",
            )
        if (self.kind == "block") != (self.size > 0):
            raise SpecError(
                "SPEC-GRANULARITY",
                f"granularity {self.kind!r} with block size {self.size}",
                "a block needs a size of at least 1; the other kinds take none",
            )

    @classmethod
    def per_tensor(cls) -> Granularity:
        """One scale for all elements."""
        return cls("tensor")

    @classmethod
    def per_channel(cls, axis: int) -> Granularity:
        """One scale for each slice along ``axis``."""
        return cls("channel", axis)

    @classmethod
    def block(cls, axis: int, size: int) -> Granularity:
        """One scale for ``size`` neighbours along ``axis``."""
        return cls("block", axis, size)

    @classmethod
    def per_token(cls) -> Granularity:
        """One scale for each row along the last axis."""
        return cls("token")

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """The granularity that ``str`` printed: ``tensor``, ``channel(0)``, ``block(-1,32)``...

        Raises:
            SpecError: the text is none of these.
        """
        match = re.fullmatch(r"(tensor|token)|channel\((-?\d+)\)|block\((-?\d+),\s*(\d+)\)", text)
        if match is None:
            raise SpecError(
                "SPEC-GRANULARITY",
                f"cannot read the granularity {text!r}",
                "use tensor, channel(axis), block(axis,size) or token",
            )
        if match[2]:
            return cls.per_channel(int(match[2]))
        if match[3]:
            return cls.block(int(match[3]), int(match[4]))
        return cls.per_token() if match[1] == "token" else cls.per_tensor()

    def __str__(self) -> str:
        if self.kind == "channel":
            return f"channel({self.axis})"
        if self.kind == "block":
            return f"block({self.axis},{self.size})"
        return self.kind

    def param_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a scale for a tensor of ``shape``.

        Raises:
            DataError: the tensor has no such axis.
        """
        if self.kind == "tensor":
            return ()
        axis = self._axis(shape)
        if self.kind == "channel":
            return (shape[axis],)
        if self.kind == "token":
            return (*shape[:-1], 1)
        blocks = -(-shape[axis] // self.size)
        return (*shape[:axis], blocks, *shape[axis + 1 :])

    def groups(self, shape: tuple[int, ...]) -> int:
        """Number of scales for a tensor of ``shape``."""
        return math.prod(self.param_shape(shape))

    def _axis(self, shape: tuple[int, ...]) -> int:
        axis = -1 if self.kind == "token" else self.axis
        if not -len(shape) <= axis < len(shape):
            raise DataError(
                "DATA-AXIS",
                f"granularity {self} needs axis {axis}, the tensor has shape {list(shape)}",
                "choose an axis of the tensor, or one scale per tensor",
            )
        return axis % len(shape)

    def split(self, x: Array) -> Groups:
        """The elements of ``x``, one row a group; see :class:`Groups`."""
        return Groups.of(x, self)

    def expand(self, param: Array, shape: tuple[int, ...]) -> Array:
        """A parameter of ``param_shape(shape)``, such that it broadcasts against ``shape``."""
        if self.kind == "channel":
            axis = self._axis(shape)
            return param.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        if self.kind == "block":
            axis = self._axis(shape)
            repeated = np.repeat(param, self.size, axis=axis)
            return np.take(repeated, np.arange(shape[axis]), axis=axis)
        return param


@dataclass(frozen=True, eq=False)
class Groups:
    """The elements of a tensor, sorted into rows that share a scale.

    ``values`` is ``[G, L]``: G groups of L elements. Where the last block of an axis is ragged its
    row is filled with zeros and ``valid`` (``[G, L]`` bool) tells real elements; else it is None.
    """

    values: Array
    valid: npt.NDArray[np.bool_] | None
    granularity: Granularity
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Array, granularity: Granularity) -> Groups:
        """Sort ``x`` into groups. Contiguous blocks along the last axis are not copied."""
        shape = x.shape
        granularity.param_shape(shape)
        if granularity.kind == "tensor":
            return cls(x.reshape(1, -1), None, granularity, shape)
        if granularity.kind == "token":
            return cls(x.reshape(-1, shape[-1]), None, granularity, shape)
        axis = granularity._axis(shape)
        if granularity.kind == "channel":
            rows = np.moveaxis(x, axis, 0)
            return cls(rows.reshape(shape[axis], -1 if x.size else 0), None, granularity, shape)
        return cls._blocks(np.moveaxis(x, axis, -1), granularity, shape)

    @classmethod
    def _blocks(cls, x: Array, granularity: Granularity, shape: tuple[int, ...]) -> Groups:
        size, tail = granularity.size, x.shape[-1] % granularity.size
        if tail == 0:
            return cls(x.reshape(-1, size), None, granularity, shape)
        pad = [(0, 0)] * (x.ndim - 1) + [(0, size - tail)]
        valid = np.broadcast_to(
            np.arange(x.shape[-1] + size - tail) < x.shape[-1], np.pad(x, pad).shape
        )
        return cls(np.pad(x, pad).reshape(-1, size), valid.reshape(-1, size), granularity, shape)

    def merge(self, values: Array) -> Array:
        """The inverse of ``of`` for new ``values`` of shape ``[G, L]``: a tensor of ``shape``."""
        kind, shape = self.granularity.kind, self.shape
        if kind in ("tensor", "token"):
            return values.reshape(shape)
        axis = self.granularity._axis(shape)
        moved = [n for i, n in enumerate(shape) if i != axis]
        if kind == "channel":
            return np.moveaxis(values.reshape([shape[axis], *moved]), 0, axis)
        padded = -(-shape[axis] // self.granularity.size) * self.granularity.size
        whole = values.reshape([*moved, padded])[..., : shape[axis]]
        return np.ascontiguousarray(np.moveaxis(whole, -1, axis))

    def to_param(self, per_group: Array) -> Array:
        """Values ``[G]``, one a group, in the ONNX shape of a scale."""
        param_shape = self.granularity.param_shape(self.shape)
        if self.granularity.kind != "block":
            return per_group.reshape(param_shape)
        axis = self.granularity._axis(self.shape)
        moved = [n for i, n in enumerate(param_shape) if i != axis]
        return np.moveaxis(per_group.reshape([*moved, param_shape[axis]]), -1, axis)

    def from_param(self, param: Array) -> Array:
        """The inverse of ``to_param``, as a column ``[G, 1]``.

        Raises:
            DataError: the parameter has not the shape that the granularity asks for.
        """
        param_shape = self.granularity.param_shape(self.shape)
        if param.shape != param_shape:
            raise DataError(
                "DATA-PARAM-SHAPE",
                f"a scale of shape {list(param.shape)} for {self.granularity} of a tensor "
                f"{list(self.shape)}; it must be {list(param_shape)}",
                "compute the parameters with the same granularity and tensor shape",
            )
        if self.granularity.kind == "block":
            param = np.moveaxis(param, self.granularity._axis(self.shape), -1)
        return param.reshape(-1, 1)

    def count(self) -> npt.NDArray[np.int64]:
        """Real elements of each group, ``[G, 1]``."""
        if self.valid is None:
            return np.full((self.values.shape[0], 1), self.values.shape[1], np.int64)
        return np.asarray(self.valid.sum(axis=1, keepdims=True), np.int64)
