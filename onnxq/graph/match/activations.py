"""Activation functions, as one operator or decomposed.

A decomposed activation is recognised by what it computes, not by how it is written: from an
anchor (Erf, Tanh, Sigmoid, HardSigmoid or Clip) the search takes the elementwise nodes with
scalar constants around it, evaluates them on a grid of numbers as a function of one input, and
compares with the reference functions below. Operand order, association, ``Div`` by sqrt(2) or
``Mul`` by its inverse, ``Pow(x, 3)`` or ``x*x*x`` therefore all match, and a wrong constant does
not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.match.values import (
    attr_float,
    attr_string,
    const_scalar,
    consumers,
    is_const,
    is_float_cast,
    is_op,
    node_input,
    node_label,
    op_domain,
    reads_type_only,
    sole_consumer,
    value_dtype,
    value_name,
)

ActivationKind = Literal[
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "hard_swish",
    "hard_sigmoid",
    "mish",
    "sigmoid",
    "tanh",
]
_Array = npt.NDArray[np.float64]

#: Where candidate functions are compared. Symmetric, so that odd and even parts both count.
_GRID: _Array = np.linspace(-6.0, 6.0, 49)
#: Largest difference on the grid from rounded constants (sqrt(2) as 1.4142 moves GELU by 1e-5).
_TOLERANCE = 5e-5
#: The same for constants that are stored in 16 bits.
_TOLERANCE_HALF = 5e-3
_MAX_BACK = 8
_MAX_CLIMB = 6


@dataclass(frozen=True)
class Activation:
    """One activation function ``output = kind(x)``; ``nodes`` is its region, the root last."""

    name: str
    kind: ActivationKind
    x: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def root(self) -> ir.Node:
        """The node that writes ``output``."""
        return self.nodes[-1]


def _erf(x: _Array) -> _Array:
    return np.array([math.erf(v) for v in x.reshape(-1)], np.float64).reshape(x.shape)


def _sigmoid(x: _Array) -> _Array:
    return 1.0 / (1.0 + np.exp(-x))


def _softplus(x: _Array) -> _Array:
    return np.logaddexp(0.0, x)


_REFERENCES: dict[ActivationKind, Callable[[_Array], _Array]] = {
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "hard_swish": lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "hard_sigmoid": lambda x: np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}

# Operators ------------------------------------------------------------------------------------

_SIMPLE: dict[tuple[str, str], ActivationKind] = {
    ("", "Relu"): "relu",
    ("", "LeakyRelu"): "leaky_relu",
    ("", "Elu"): "elu",
    ("", "HardSwish"): "hard_swish",
    ("", "Mish"): "mish",
    ("com.microsoft", "Gelu"): "gelu",
}


def _match_operator(node: ir.Node) -> Activation | str | None:
    kind = _operator_kind(node)
    if kind is None:
        return None
    if op_domain(node) == "com.microsoft" and node_input(node, 1) is not None:
        return f"{node.op_type} adds a bias inside"
    x = node.inputs[0]
    return None if x is None else Activation(node_label(node), kind, x, node.outputs[0], (node,))


def _operator_kind(node: ir.Node) -> ActivationKind | None:
    key = (op_domain(node), node.op_type)
    if key == ("", "Gelu"):
        return "gelu_tanh" if attr_string(node, "approximate", "none") == "tanh" else "gelu"
    if key in (("com.microsoft", "FastGelu"), ("com.microsoft", "BiasGelu")):
        return "gelu_tanh" if node.op_type == "FastGelu" else "gelu"
    if key in (("com.microsoft", "QuickGelu"), ("", "Swish")):
        default = 1.702 if node.op_type == "QuickGelu" else 1.0
        alpha = attr_float(node, "alpha", default)
        if alpha == 1.0:
            return "silu"
        return "quick_gelu" if abs(alpha - 1.702) < 1e-4 else None
    return _SIMPLE.get(key)


# Decomposed -----------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[_Array], _Array]] = {
    "Erf": _erf,
    "Tanh": np.tanh,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Exp": np.exp,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Sqrt": np.sqrt,
    "Identity": np.asarray,
}
_BINARY: dict[str, Callable[[_Array, _Array], _Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
}
_ANCHORS = ("Erf", "Tanh", "Sigmoid", "HardSigmoid", "Clip")


@dataclass
class _Evaluation:
    """A region as a function of ``x`` on the grid."""

    x: ir.Value
    ir_version: int | None
    nodes: dict[ir.Node, None] = field(default_factory=dict)
    tolerance: float = _TOLERANCE
    _known: dict[ir.Value, _Array | None] = field(default_factory=dict)

    def of(self, value: ir.Value | None, depth: int = 0) -> _Array | None:
        """``value`` on the grid; None when it depends on more than ``x`` and scalars."""
        if value is None or depth > _MAX_BACK + _MAX_CLIMB:
            return None
        if value is self.x:
            return _GRID
        if value not in self._known:
            self._known[value] = self._compute(value, depth)
        return self._known[value]

    def _compute(self, value: ir.Value, depth: int) -> _Array | None:
        if is_const(value, self.ir_version):
            return self._constant(value)
        node = value.producer()
        if node is None or value.index() != 0:
            return None
        sources = node.inputs[:1] if is_op(node, "CastLike") else node.inputs
        arguments = [self.of(v, depth + 1) for v in sources if v is not None]
        known = [a for a in arguments if a is not None]
        if len(known) != len(arguments):
            return None
        result = _apply(node, known, self.ir_version)
        if result is not None:
            self.nodes[node] = None
        return result

    def _constant(self, value: ir.Value) -> _Array | None:
        number = const_scalar(value, self.ir_version)
        if number is None:
            return None
        if value_dtype(value) in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            self.tolerance = _TOLERANCE_HALF
        return np.full_like(_GRID, number)


def _apply(node: ir.Node, inputs: list[_Array], ir_version: int | None) -> _Array | None:
    if op_domain(node) != "" or not inputs:
        return None
    with np.errstate(all="ignore"):
        if node.op_type in _BINARY and len(inputs) == 2:
            return _BINARY[node.op_type](inputs[0], inputs[1])
        if node.op_type in _UNARY and len(inputs) == 1:
            return _UNARY[node.op_type](inputs[0])
        if is_float_cast(node) or node.op_type == "CastLike":
            return inputs[0]
        if node.op_type == "Sum":
            return np.asarray(np.sum(inputs, axis=0), np.float64)
        if node.op_type == "HardSigmoid":
            alpha, beta = attr_float(node, "alpha", 0.2), attr_float(node, "beta", 0.5)
            return np.clip(alpha * inputs[0] + beta, 0.0, 1.0)
        if node.op_type == "Clip":
            low, high = _clip_bounds(node, ir_version)
            return None if low is None or high is None else np.clip(inputs[0], low, high)
    return None


def _clip_bounds(node: ir.Node, ir_version: int | None) -> tuple[float | None, float | None]:
    """(min, max) of a Clip from its attributes (opset < 11) or inputs; None where not constant."""
    bounds: list[float | None] = []
    for index, (name, absent) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        value = node_input(node, index)
        if value is not None:
            bounds.append(const_scalar(value, ir_version))
        else:
            bounds.append(attr_float(node, name, absent))
    return bounds[0], bounds[1]


def _candidates(anchor: ir.Node) -> list[ir.Value]:
    """The values from which the anchor's input is computed elementwise, nearest first."""
    found: dict[ir.Value, int] = {}
    queue = [(value, 0) for value in anchor.inputs[:1] if value is not None]
    while queue:
        value, depth = queue.pop(0)
        if value in found or depth > _MAX_BACK or is_const(value):
            continue
        found[value] = depth
        node = value.producer()
        if node is not None and (node.op_type in _BINARY or node.op_type in _UNARY):
            queue.extend((v, depth + 1) for v in node.inputs if v is not None)
        elif node is not None and (is_float_cast(node) or is_op(node, "Sum", "CastLike")):
            sources = node.inputs if is_op(node, "Sum") else node.inputs[:1]
            queue.extend((v, depth + 1) for v in sources if v is not None)
    return list(found)


@dataclass(frozen=True)
class _Found:
    kind: ActivationKind
    x: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def _match_decomposed(anchor: ir.Node, ir_version: int | None) -> Activation | str | None:
    best: _Found | None = None
    for x in _candidates(anchor):
        found = _climb(anchor, x, ir_version)
        if found is not None and (best is None or len(found.nodes) > len(best.nodes)):
            best = found
    if best is None or (best.kind == "tanh" and _adds_one(anchor, ir_version)):
        return _near_miss(anchor, ir_version)
    reason = _not_private(best)
    if reason is not None:
        return reason
    name = node_label(best.nodes[-1])
    return Activation(name, best.kind, best.x, best.output, best.nodes)


def _climb(anchor: ir.Node, x: ir.Value, ir_version: int | None) -> _Found | None:
    """The longest region from ``x`` through ``anchor`` downwards that is a known function."""
    evaluation = _Evaluation(x, ir_version)
    value = anchor.outputs[0]
    best: _Found | None = None
    for _ in range(_MAX_CLIMB):
        y = evaluation.of(value)
        if y is None:
            break
        kind = _kind_of(y, evaluation.tolerance)
        if kind is not None:
            best = _Found(kind, x, value, tuple(evaluation.nodes))
        readers = [n for n in consumers(value) if not reads_type_only(n, value)]
        if len(readers) != 1 or value.is_graph_output() or not readers[0].outputs:
            break
        value = readers[0].outputs[0]
    return best


def _kind_of(y: _Array, tolerance: float) -> ActivationKind | None:
    if not np.all(np.isfinite(y)):
        return None
    distance = {k: float(np.max(np.abs(y - f(_GRID)))) for k, f in _REFERENCES.items()}
    nearest = min(distance, key=lambda k: distance[k])
    return nearest if distance[nearest] <= tolerance else None


def _adds_one(anchor: ir.Node, ir_version: int | None) -> bool:
    add = sole_consumer(anchor.outputs[0], "Add", "Sum")
    return add is not None and any(const_scalar(v, ir_version) == 1 for v in add.inputs)


def _near_miss(anchor: ir.Node, ir_version: int | None) -> str | None:
    """Why an Erf or ``1 + Tanh`` is no GELU; None for anchors that need not be activations."""
    if is_op(anchor, "Erf") or (is_op(anchor, "Tanh") and _adds_one(anchor, ir_version)):
        return f"the nodes around {anchor.op_type} compute no known activation of one value"
    return None


def _not_private(found: _Found) -> str | None:
    for node in found.nodes:
        for value in node.outputs:
            if value is found.output:
                continue
            outside = [
                n
                for n in consumers(value)
                if n not in found.nodes and not reads_type_only(n, value)
            ]
            if outside or value.is_graph_output():
                who = node_label(outside[0]) if outside else "the graph's outputs"
                return f"{value_name(value)!r} inside the activation is also read by {who}"
    return None


def find_activations(
    graph: ir.Graph, ir_version: int | None = None
) -> tuple[tuple[Activation, ...], tuple[tuple[str, str, str], ...]]:
    """All activations of ``graph`` in node order, and (what, node, reason) of near misses."""
    found: list[Activation] = []
    rejected: list[tuple[str, str, str]] = []
    for node in graph:
        match = _match_operator(node)
        if match is None and is_op(node, *_ANCHORS):
            match = _match_decomposed(node, ir_version)
        if isinstance(match, str):
            rejected.append(("activation", node_label(node), match))
        elif match is not None:
            found.append(match)
    return tuple(found), tuple(rejected)
