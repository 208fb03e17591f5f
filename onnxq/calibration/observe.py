"""Builds the model of a sweep: the original graph with observers for its only outputs.

Observers work in float32: values of other float types are cast first. Two forms exist. The plain
one reduces the value as it is and also sums it: the sum is finite only if every element was (a
maximum may lose a NaN, a sum cannot). The guarded one, used where a value has a mask or turned out
not to be finite, replaces what must not count by the neutral element of each reduction:

    ok = |x| < inf  and  (mask > MASK_THRESHOLD and |mask| < inf)
    lo = min(where(ok, x, inf)), hi = max(where(ok, x, -inf)), sum = sum(where(ok, x, 0)), ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxq.errors import UnsupportedError

MASK_THRESHOLD = -1e3
"""An additive mask at or below this removes the element from all statistics."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

_WHERE_SINCE = 9
_AXES_INPUT_SINCE = {"ReduceSum": 13}
_AXES_INPUT_SINCE_OTHERS = 18


@dataclass(frozen=True)
class RangeOutputs:
    """Names of the scalars ``lo`` and ``hi``; ``total``, their check, is None when guarded."""

    lo: str
    hi: str
    total: str | None


@dataclass(frozen=True)
class ChannelOutputs:
    """Names of the ``[C]`` reductions; ``count`` is None when plain (all elements count)."""

    lo: str
    hi: str
    sum: str
    sum_abs: str
    sum_sq: str
    count: str | None
    shape: str


class Observers:
    """Appends observers to a copy of a model.

    Args:
        model: is not changed; its tensors are shared.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self._graph = self.model.graph
        self._graph.outputs.clear()
        self._values = named_values(self._graph)
        self._opset = self._graph.opset_imports.setdefault("", 17)
        self._constants: dict[tuple[str, bytes], ir.Value] = {}
        self._floats: dict[str, ir.Value] = {}
        self._guards: dict[tuple[str, str | None], ir.Value] = {}
        self._made = 0

    def raw(self, name: str) -> str:
        """Let the value leave the session, as float32, or as it is when it is a boolean."""
        value = self._values[name]
        if value.dtype is not ir.DataType.BOOL:
            value = self._as_float(name)
        if value.producer() is None:
            value = self._node("Identity", [value], dtype=value.dtype)
        return self._output(value)

    def shape(self, name: str) -> str:
        """The value's shape, int64 ``[rank]``."""
        return self._output(self._node("Shape", [self._values[name]], dtype=ir.DataType.INT64))

    def range(self, name: str, mask: str | None, *, guarded: bool) -> RangeOutputs:
        """Extremes of the whole value."""
        x = self._as_float(name)
        if not guarded:
            return RangeOutputs(
                self._reduce("ReduceMin", x),
                self._reduce("ReduceMax", x),
                self._reduce("ReduceSum", x),
            )
        ok = self._guard(name, mask)
        return RangeOutputs(
            self._reduce("ReduceMin", self._where(ok, x, np.inf)),
            self._reduce("ReduceMax", self._where(ok, x, -np.inf)),
            None,
        )

    def channel(
        self, name: str, axis: int, rank: int, mask: str | None, *, guarded: bool
    ) -> ChannelOutputs:
        """Reductions over all axes but ``axis`` (non-negative)."""
        axes = [i for i in range(rank) if i != axis]
        x = low = high = clean = self._as_float(name)
        count = None
        if guarded:
            ok = self._guard(name, mask)
            low, high = self._where(ok, x, np.inf), self._where(ok, x, -np.inf)
            clean = self._where(ok, x, 0.0)
            ones = self._node("Cast", [ok], {"to": ir.DataType.FLOAT.value})
            count = self._reduce("ReduceSum", ones, axes)
        return ChannelOutputs(
            self._reduce("ReduceMin", low, axes),
            self._reduce("ReduceMax", high, axes),
            self._reduce("ReduceSum", clean, axes),
            self._reduce("ReduceL1", clean, axes),
            self._reduce("ReduceSumSquare", clean, axes),
            count,
            self.shape(name),
        )

    def _as_float(self, name: str) -> ir.Value:
        if name not in self._floats:
            value = self._values[name]
            if value.dtype is not ir.DataType.FLOAT:
                value = self._node("Cast", [value], {"to": ir.DataType.FLOAT.value})
            self._floats[name] = value
        return self._floats[name]

    def _guard(self, name: str, mask: str | None) -> ir.Value:
        """Where the elements of the value count: bool, the value's shape."""
        if self._opset < _WHERE_SINCE:
            raise UnsupportedError(
                "CALIB-OPSET",
                f"`{name}` has a mask or elements that are not finite; leaving them out needs"
                f" opset {_WHERE_SINCE}, and the model has opset {self._opset}",
                "raise the model's opset first (the canonicalize pass does)",
            )
        key = (name, mask)
        if key not in self._guards:
            ok = self._finite(self._as_float(name))
            if mask is not None:
                ok = self._node("And", [ok, self._unmasked(mask)], dtype=ir.DataType.BOOL)
            self._guards[key] = ok
        return self._guards[key]

    def _unmasked(self, mask: str) -> ir.Value:
        if self._values[mask].dtype is ir.DataType.BOOL:
            return self._values[mask]
        value = self._as_float(mask)
        above = self._node("Greater", [value, self._scalar(MASK_THRESHOLD)], dtype=ir.DataType.BOOL)
        return self._node("And", [above, self._finite(value)], dtype=ir.DataType.BOOL)

    def _finite(self, value: ir.Value) -> ir.Value:
        size = self._node("Abs", [value])
        return self._node("Less", [size, self._scalar(np.inf)], dtype=ir.DataType.BOOL)

    def _where(self, ok: ir.Value, value: ir.Value, otherwise: float) -> ir.Value:
        return self._node("Where", [ok, value, self._scalar(otherwise)])

    def _reduce(self, op: str, value: ir.Value, axes: Sequence[int] | None = None) -> str:
        return self._output(self._reduce_node(op, value, axes, keepdims=0))

    def _reduce_node(
        self, op: str, value: ir.Value, axes: Sequence[int] | None, *, keepdims: int
    ) -> ir.Value:
        if axes is not None and not axes:
            # Reducing over no axis: every element is its own group.
            return self._elementwise(op, value)
        inputs = [value]
        attributes: dict[str, int | list[int]] = {"keepdims": keepdims}
        if axes is not None:
            if self._opset >= _AXES_INPUT_SINCE.get(op, _AXES_INPUT_SINCE_OTHERS):
                inputs.append(self._constant(np.array(axes, np.int64)))
            else:
                return self._node(op, inputs, {**attributes, "axes": list(axes)})
        return self._node(op, inputs, attributes)

    def _elementwise(self, op: str, value: ir.Value) -> ir.Value:
        if op == "ReduceL1":
            return self._node("Abs", [value])
        if op == "ReduceSumSquare":
            return self._node("Mul", [value, value])
        return self._node("Identity", [value])

    def _scalar(self, number: float) -> ir.Value:
        return self._constant(np.array(number, np.float32))

    def _constant(self, array: np.ndarray) -> ir.Value:
        key = (str(array.dtype) + str(array.shape), array.tobytes())
        if key not in self._constants:
            value = ir.Value(
                name=self._fresh(),
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.tensor(array),
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def _node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, int | list[int]] | None = None,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes or {})
        out = node.outputs[0]
        out.name = self._fresh()
        node.name = out.name
        if dtype is not None:
            out.type = ir.TensorType(dtype)
        self._graph.append(node)
        return out

    def _fresh(self) -> str:
        while True:
            self._made += 1
            name = f"observed.{self._made}"
            if name not in self._values:
                return name

    def _output(self, value: ir.Value) -> str:
        if all(value is not other for other in self._graph.outputs):
            self._graph.outputs.append(value)
        assert value.name
        return value.name


def named_values(graph: ir.Graph) -> dict[str, ir.Value]:
    """All values of the main graph by name: inputs, initializers and node outputs."""
    found = {v.name: v for v in graph.inputs if v.name}
    found.update((name, v) for name, v in graph.initializers.items())
    for node in graph:
        found.update((v.name, v) for v in node.outputs if v.name)
    return found
