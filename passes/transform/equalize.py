"""``equalize``: even out the channel ranges of weights across neighbouring layers (CNNs).

Rewrites ``W2 f(W1 x + b1)`` to ``(W2 diag(s)) f(diag(1/s)(W1 x + b1))`` for a function f between
them that scales with its input: nothing, Relu, max and average pooling, padding with zeros. Conv
(depthwise too), MatMul and Gemm; rule for s in :mod:`onnxq.solvers.equalize`.

Relu6 does not scale. With ``clip=min`` it becomes ``Min(Relu(x), 6 / s)`` with one bound a channel,
which is exact, but no runtime fuses it into the layer before; so by default such pairs are left
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxq.graph.edit import (
    Names,
    add_initializer,
    insert_after,
    remove_dead,
    replace_value,
    set_bias,
    set_weight,
)
from onnxq.graph.match import (
    Activation,
    Linear,
    Structure,
    analyze,
    is_op,
    is_pass_through,
    sole_consumer,
)
from onnxq.graph.match.values import attr_string, const_scalar, node_input, value_dtype
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.fold_norm import FOLDED_NORMS
from onnxq.passes.transform.folding import Float64, bias64, stored64
from onnxq.solvers.equalize import equalizing_scale, sweep

_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_MAX_STEPS = 8


@dataclass(frozen=True)
class Pair:
    """Two layers and what lies between them.

    Args:
        first: writes the channels.
        second: reads them, each by itself or all together.
        clip: the Relu6 between them, if there is one.
    """

    first: Linear
    second: Linear
    clip: Activation | None

    @property
    def name(self) -> str:
        """Both layers."""
        return f"{self.first.name} -> {self.second.name}"


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalize weight ranges between layers.

    Args:
        clip: what to do with a Relu6 between two layers: ``keep`` leaves the pair alone, ``min``
            gives it one bound a channel.
    """

    name: ClassVar[str] = "equalize"
    summary: ClassVar[str] = "even out weight ranges between neighbouring layers of a CNN"
    invalidates: ClassVar = (STATISTICS, FOLDED_NORMS)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    clip: Literal["keep", "min"] = "keep"

    def candidates(self, model: ir.Model) -> list[str]:
        """Pairs of layers."""
        return [pair.name for pair in find_pairs(analyze(model), PassReport())]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Sweep over all pairs until their ranges agree, then write the weights once."""
        report = PassReport()
        pairs = []
        for pair in find_pairs(analyze(model), report):
            if pair.clip is not None and self.clip == "keep":
                report.skip(pair.name, "Relu6 does not scale, and clip=keep")
            elif ctx.budget.take(pair.name):
                pairs.append(pair)
        state = _State()
        sweeps = sweep(pairs, state.step)
        for pair in pairs:
            total = state.totals.get(pair.first.name)
            if total is not None and not np.allclose(total, 1.0, rtol=1e-6):
                spread = float(total.max() / total.min())
                report.change(pair.name, "equalized", f"scales differ by a factor of {spread:.3g}")
            else:
                report.skip(pair.name, "the ranges are equal already")
        if report.changed:
            state.write()
            _bound_channels(model, pairs, state)
            remove_dead(model.graph)
            report.note(f"{sweeps} sweeps")
        return report


def find_pairs(structure: Structure, report: PassReport) -> list[Pair]:
    """Layers whose output only one other layer reads, through functions that scale."""
    found = []
    for first in structure.linears:
        pair = _follow(structure, first)
        if isinstance(pair, str):
            report.skip(first.name, pair)
        elif pair is not None:
            found.append(pair)
    return found


def _follow(structure: Structure, first: Linear) -> Pair | str | None:
    """The pair that begins with ``first``; a reason; None if no single layer follows."""
    value, clip = first.output, None
    for _ in range(_MAX_STEPS):
        if structure.is_output(value):
            return None
        node = sole_consumer(value)
        if node is None:
            activation = _activation_on(structure, value)
            return None if activation is None else f"{activation.kind} does not scale"
        second = structure.linear_at(node)
        if second is not None and second.x is value:
            return _fitting(first, second, clip)
        activation = _activation_on(structure, value)
        if activation is not None and activation.kind == "relu6" and clip is None:
            value, clip = activation.output, activation
        elif activation is not None and activation.kind in ("relu", "leaky_relu"):
            value = activation.output
        elif activation is not None:
            return f"{activation.kind} does not scale"
        elif _scales(node, value):
            value = node.outputs[0]
        else:
            return None
    return None


def _activation_on(structure: Structure, value: ir.Value) -> Activation | None:
    return next((a for a in structure.activations if a.x is value), None)


def _scales(node: ir.Node, value: ir.Value) -> bool:
    """Whether ``node`` keeps channels apart and scales with its input."""
    if node.inputs[0] is not value:
        return False
    if is_pass_through(node) or is_op(node, *_POOLS):
        return True
    if not is_op(node, "Pad") or attr_string(node, "mode", "constant") not in (
        "constant",
        "reflect",
        "edge",
    ):
        return False
    fill = node_input(node, 2)
    return fill is None or const_scalar(fill) == 0


def _fitting(first: Linear, second: Linear, clip: Activation | None) -> Pair | str:
    if first.is_weight_shared or second.is_weight_shared:
        return "a weight is shared with another reader"
    if (first.kind == "conv") != (second.kind == "conv"):
        return f"{second.name} reads other channels than {first.name} writes"
    if second.groups > 1 and not _is_plain_depthwise(second):
        return f"{second.name} has {second.groups} groups"
    if first.out_features != second.in_features:
        return f"{second.name} reads {second.in_features} channels of {first.out_features}"
    return Pair(first, second, clip)


def _is_plain_depthwise(linear: Linear) -> bool:
    return linear.is_depthwise and linear.out_features == linear.groups


class _State:
    """Weights in float64 while they are swept."""

    def __init__(self) -> None:
        self._layers: dict[str, Linear] = {}
        self._weights: dict[str, Float64] = {}
        self._biases: dict[str, Float64] = {}
        self.totals: dict[str, Float64] = {}

    def _weight(self, linear: Linear) -> Float64:
        if linear.name not in self._weights:
            self._layers[linear.name] = linear
            self._weights[linear.name] = stored64(linear.weight)
            bias = bias64(linear)
            if bias is not None:
                self._biases[linear.name] = bias
        return self._weights[linear.name]

    def step(self, pair: Pair) -> Float64:
        """Equalize one pair; the scale that was applied."""
        first, second = pair.first, pair.second
        w1, w2 = self._weight(first), self._weight(second)
        in_axis = second.out_axis if second.groups > 1 else second.in_axis
        scale = equalizing_scale(_ranges(w1, first.out_axis), _ranges(w2, in_axis))
        self._weights[first.name] = w1 / _along(scale, first.out_axis, w1.ndim)
        self._weights[second.name] = w2 * _along(scale, in_axis, w2.ndim)
        if first.name in self._biases:
            self._biases[first.name] = self._biases[first.name] / scale
        self.totals[first.name] = self.totals.get(first.name, np.ones_like(scale)) * scale
        return scale

    def write(self) -> None:
        """Put weights and biases into the graph."""
        for name, linear in self._layers.items():
            set_weight(linear, self._weights[name])
            if name in self._biases:
                set_bias(linear, self._biases[name])


def _ranges(weight: Float64, axis: int) -> Float64:
    moved = np.moveaxis(np.abs(weight), axis, 0)
    return np.asarray(moved.reshape(len(moved), -1).max(axis=1), np.float64)


def _along(scale: Float64, axis: int, rank: int) -> Float64:
    return scale.reshape([-1 if i == axis else 1 for i in range(rank)])


def _bound_channels(model: ir.Model, pairs: list[Pair], state: _State) -> None:
    """Give each Relu6 one bound a channel."""
    names = Names(model.graph)
    for pair in pairs:
        if pair.clip is None:
            continue
        linear = pair.first
        bound = 6.0 / state.totals[linear.name]
        trailing = len(linear.shape) - 2 if linear.kind == "conv" else 0
        dtype = (value_dtype(linear.weight) or ir.DataType.FLOAT).numpy()
        array = bound.reshape(-1, *[1] * trailing).astype(dtype)
        base = names.fresh(f"{pair.clip.name}_channelwise")
        limit = add_initializer(model.graph, names.fresh(f"{base}_bound"), array)
        relu = ir.node("Relu", [pair.clip.x], name=names.fresh(f"{base}_Relu"))
        least = ir.node("Min", [relu.outputs[0], limit], name=names.fresh(f"{base}_Min"))
        old = pair.clip.output
        for node in (relu, least):
            out = node.outputs[0]
            out.name, out.type, out.shape = names.fresh(f"{node.name}_output"), old.type, old.shape
        insert_after(pair.clip.nodes[-1], [relu, least])
        replace_value(old, least.outputs[0])
