"""LayerNorm and RMSNorm over the last axis, as one operator or decomposed.

::

    layernorm   y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * gamma + beta
    rmsnorm     y = x / sqrt(mean(x^2) + eps) * gamma

The decomposed search starts at the node that takes the root of ``mean(square) + eps``, walks up
to ``x`` and down to the last of ``* gamma`` and ``+ beta``. Squares may be ``Pow(d, 2)`` or
``Mul(d, d)``; the division ``Div(d, std)``, ``Mul(d, Reciprocal(std))``, ``Mul(d, Div(1, std))``
or ``Mul(d, Pow(., -0.5))``; operands of Mul and Add may stand in either order; float Casts may
stand anywhere. Every value inside the region must be private to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.match.values import (
    as_float32,
    attr_float,
    attr_int,
    attr_ints,
    const_ints,
    const_scalar,
    const_shape,
    const_tensor,
    consumers,
    is_const,
    is_float_cast,
    is_op,
    node_input,
    node_label,
    op_domain,
    other_input,
    producer,
    rank,
    sole_consumer,
    value_name,
)

NormKind = Literal["layernorm", "rmsnorm"]


@dataclass(frozen=True)
class Norm:
    """One normalisation with a learned scale.

    Attributes:
        name: of its last node.
        kind: ``layernorm`` subtracts the mean, ``rmsnorm`` does not.
        spelling: the operator's type, or ``decomposed``.
        x: what is normalised, ``[..., D]``. For Skip operators the first addend.
        gamma: ``[D]`` (leading ones allowed), constant.
        beta: ``[D]`` constant, or None.
        epsilon: added under the root.
        axis: -1, or the operator's own ``axis`` attribute where it names the last axis.
        output: the value after gamma and beta.
        nodes: all nodes of the region in graph order; the one that writes ``output`` is last.
        skip: the second addend of a Skip operator: it normalises ``x + skip``.
        sum_output: where a Skip operator also writes ``x + skip``.
    """

    name: str
    kind: NormKind
    spelling: str
    x: ir.Value
    gamma: ir.Value
    beta: ir.Value | None
    epsilon: float
    axis: int
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    skip: ir.Value | None = None
    sum_output: ir.Value | None = None

    @property
    def root(self) -> ir.Node:
        """The node that writes ``output``."""
        return self.nodes[-1]

    @property
    def features(self) -> int:
        """D, the number of channels."""
        return int(np.prod(_stored_shape(self.gamma)))

    @property
    def g(self) -> npt.NDArray[np.float32]:
        """Gamma as ``[D]`` float32."""
        return _flat(self.gamma)

    @property
    def b(self) -> npt.NDArray[np.float32] | None:
        """Beta as ``[D]`` float32; None without beta."""
        return None if self.beta is None else _flat(self.beta)


def _stored_shape(value: ir.Value) -> tuple[int, ...]:
    tensor = const_tensor(value) or value.const_value
    assert tensor is not None
    return tuple(int(d) for d in tensor.shape.numpy())


def _flat(value: ir.Value) -> npt.NDArray[np.float32]:
    tensor = const_tensor(value) or value.const_value
    if tensor is None:
        raise ValueError(f"{value_name(value)!r} is no longer constant; match again")
    return as_float32(tensor.numpy()).reshape(-1)


# Operators ------------------------------------------------------------------------------------

#: (domain, type) -> (kind, index of gamma, of beta or -1, of skip or -1, output of the sum or -1)
_OPERATORS: dict[tuple[str, str], tuple[NormKind, int, int, int, int]] = {
    ("", "LayerNormalization"): ("layernorm", 1, 2, -1, -1),
    ("com.microsoft", "LayerNormalization"): ("layernorm", 1, 2, -1, -1),
    ("", "RMSNormalization"): ("rmsnorm", 1, -1, -1, -1),
    ("", "SimplifiedLayerNormalization"): ("rmsnorm", 1, -1, -1, -1),
    ("com.microsoft", "SimplifiedLayerNormalization"): ("rmsnorm", 1, -1, -1, -1),
    ("com.microsoft", "SkipLayerNormalization"): ("layernorm", 2, 3, 1, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): ("rmsnorm", 2, -1, 1, 3),
}
#: Input of the Skip operators that is added to the sum before it is normalised.
_SKIP_BIAS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}


def match_norm_operator(node: ir.Node, ir_version: int | None = None) -> Norm | str | None:
    """The norm that is one operator; a reason for a near miss; None for other operators."""
    key = (op_domain(node), node.op_type)
    if key not in _OPERATORS:
        return None
    kind, gamma_at, beta_at, skip_at, sum_at = _OPERATORS[key]
    x, gamma = node_input(node, 0), node_input(node, gamma_at)
    beta = None if beta_at < 0 else node_input(node, beta_at)
    shape = const_shape(gamma, ir_version)
    if x is None or gamma is None or shape is None:
        return "gamma is not constant"
    if beta is not None and not is_const(beta, ir_version):
        return "beta is not constant"
    if any(d != 1 for d in shape[:-1]):
        return f"gamma has shape {list(shape)}: several axes are normalised together"
    axis = attr_int(node, "axis", -1)
    x_rank = rank(x)
    is_last = axis == -1 or (x_rank is not None and axis == x_rank - 1)
    if skip_at < 0 and not is_last and not (x_rank is None and len(shape) == 1):
        return f"axis {axis} is not the last axis"
    bias_at = _SKIP_BIAS.get(node.op_type)
    if bias_at is not None and node_input(node, bias_at) is not None:
        return "the operator adds a bias to the sum before it normalises"
    sum_output = node.outputs[sum_at] if 0 < sum_at < len(node.outputs) else None
    if sum_output is not None and not sum_output.name:
        sum_output = None
    default = 1e-12 if skip_at > 0 else 1e-5
    return Norm(
        name=node_label(node),
        kind=kind,
        spelling=node.op_type,
        x=x,
        gamma=gamma,
        beta=beta,
        epsilon=attr_float(node, "epsilon", default),
        axis=axis if is_last else -1,
        output=node.outputs[0],
        nodes=(node,),
        skip=None if skip_at < 0 else node_input(node, skip_at),
        sum_output=sum_output,
    )


# Decomposed -----------------------------------------------------------------------------------


class _RejectError(Exception):
    """A near miss; the text is the reason."""


@dataclass
class _Region:
    """What one walk has found; nodes in the order in which it met them."""

    ir_version: int | None
    nodes: dict[ir.Node, None]

    def add(self, *nodes: ir.Node) -> None:
        self.nodes.update(dict.fromkeys(nodes))

    def back_through_casts(self, value: ir.Value) -> ir.Value:
        """The value before float Casts, which join the region."""
        while is_float_cast(node := value.producer()):
            assert node is not None
            source = node.inputs[0]
            if source is None:
                return value
            self.add(node)
            value = source
        return value

    def scalar(self, value: ir.Value | None) -> float | None:
        return const_scalar(value, self.ir_version)


def match_norm_decomposed(node: ir.Node, ir_version: int | None = None) -> Norm | str | None:
    """The decomposed norm whose root is taken by ``node`` (a Sqrt, or a Pow by 0.5 or -0.5).

    Returns:
        the match; a reason if the node takes the root of ``mean(square) + eps``, but the rest
        is not a norm that can be treated; None for all other nodes.
    """
    region = _Region(ir_version, {})
    power = _root_power(node, ir_version)
    if power is None or node.inputs[0] is None:
        return None
    radicand = _match_radicand(node.inputs[0], region)
    if radicand is None:
        return None
    deviation, epsilon = radicand
    region.add(node)
    try:
        return _match_rest(node, power, deviation, epsilon, region)
    except _RejectError as reason:
        return str(reason)


def _root_power(node: ir.Node, ir_version: int | None) -> float | None:
    """0.5 for a square root, -0.5 for its inverse, None for other nodes."""
    if is_op(node, "Sqrt"):
        return 0.5
    if is_op(node, "Pow"):
        exponent = const_scalar(node_input(node, 1), ir_version)
        return exponent if exponent in (0.5, -0.5) else None
    return None


def _match_radicand(value: ir.Value, region: _Region) -> tuple[ir.Value, float] | None:
    """``mean(d * d) + eps`` -> (d, eps), where the mean runs over some axes."""
    add = producer(value, "Add")
    if add is None:
        return None
    for mean_at in (0, 1):
        epsilon = region.scalar(node_input(add, 1 - mean_at))
        mean = producer(node_input(add, mean_at), "ReduceMean")
        if epsilon is None or mean is None:
            continue
        squared = mean.inputs[0]
        square = producer(squared, "Pow", "Mul")
        if square is None:
            continue
        base = square.inputs[0]
        is_square = (
            node_input(square, 1) is base
            if is_op(square, "Mul")
            else region.scalar(node_input(square, 1)) == 2
        )
        if base is None or not is_square:
            continue
        region.add(square, mean, add)
        return base, epsilon
    return None


def _match_rest(
    root: ir.Node, power: float, deviation: ir.Value, epsilon: float, region: _Region
) -> Norm:
    mean = next(node for node in region.nodes if is_op(node, "ReduceMean"))
    inner = region.back_through_casts(deviation)
    subtract = producer(inner, "Sub")
    x, subtract_mean = inner, None
    if subtract is not None:
        subtract_mean = _mean_of(subtract)
    if subtract is not None and subtract_mean is not None:
        assert subtract.inputs[0] is not None
        region.add(subtract_mean, subtract)
        x = region.back_through_casts(subtract.inputs[0])
    is_centred = subtract_mean is not None
    scaled, numerator = _match_division(root, power, region)
    _check_numerator(numerator, deviation, is_centred, x, region)
    output, gamma, beta = _match_affine(scaled, is_centred, region)
    features = _features(gamma, region.ir_version)
    for reduce in (mean, subtract_mean):
        if reduce is not None:
            _check_axes(reduce, x, features, region.ir_version)
    x = _release_shared_casts(x, region)
    _check_private(output, region)
    ordered = _graph_order(region)
    return Norm(
        name=node_label(ordered[-1]),
        kind="layernorm" if is_centred else "rmsnorm",
        spelling="decomposed",
        x=x,
        gamma=gamma,
        beta=beta,
        epsilon=epsilon,
        axis=-1,
        output=output,
        nodes=ordered,
    )


def _mean_of(subtract: ir.Node) -> ir.Node | None:
    """The ReduceMean in ``x - ReduceMean(x)``."""
    x, mean_value = subtract.inputs[0], node_input(subtract, 1)
    mean = producer(mean_value, "ReduceMean")
    if x is None or mean is None or mean.inputs[0] is None:
        return None
    return mean if _behind_casts(mean.inputs[0]) is _behind_casts(x) else None


def _behind_casts(value: ir.Value) -> ir.Value:
    while is_float_cast(node := value.producer()):
        assert node is not None
        if node.inputs[0] is None:
            return value
        value = node.inputs[0]
    return value


def _match_division(root: ir.Node, power: float, region: _Region) -> tuple[ir.Value, ir.Value]:
    """From the root down to ``numerator / std``: (the quotient, the numerator)."""
    value = root.outputs[0]
    inverse = power < 0
    for _ in range(4):
        node = sole_consumer(value)
        if node is None:
            raise _RejectError(f"{value_name(value)!r} (the deviation) is read more than once")
        if is_float_cast(node):
            region.add(node)
            value = node.outputs[0]
        elif not inverse and _is_reciprocal(node, value, region):
            region.add(node)
            value, inverse = node.outputs[0], True
        elif not inverse and is_op(node, "Div") and node_input(node, 1) is value:
            region.add(node)
            assert node.inputs[0] is not None
            return node.outputs[0], node.inputs[0]
        elif inverse and is_op(node, "Mul"):
            numerator = other_input(node, value)
            if numerator is None or is_const(numerator, region.ir_version):
                raise _RejectError("gamma multiplies 1/std before x does")
            region.add(node)
            return node.outputs[0], numerator
        else:
            break
    reader = node.op_type if node is not None else "nothing"
    raise _RejectError(f"the deviation is read by {reader}, not by a division")


def _is_reciprocal(node: ir.Node, value: ir.Value, region: _Region) -> bool:
    """Whether ``node`` computes ``1 / value``."""
    if is_op(node, "Div"):
        return node_input(node, 1) is value and region.scalar(node.inputs[0]) == 1
    return is_op(node, "Reciprocal")


def _check_numerator(
    numerator: ir.Value, deviation: ir.Value, is_centred: bool, x: ir.Value, region: _Region
) -> None:
    """The numerator must be the deviation, or a second copy of ``x - mean(x)``."""
    if _behind_casts(numerator) is _behind_casts(deviation):
        region.back_through_casts(numerator)
        return
    again = producer(_behind_casts(numerator), "Sub")
    if is_centred and again is not None and again.inputs[0] is not None:
        mean = _mean_of(again)
        if mean is not None and _behind_casts(again.inputs[0]) is _behind_casts(x):
            region.back_through_casts(numerator)
            region.back_through_casts(again.inputs[0])
            region.add(mean, again)
            return
    what = "x - mean(x)" if is_centred else "x"
    raise _RejectError(f"the numerator {value_name(numerator)!r} is not {what} of the same x")


def _match_affine(
    scaled: ir.Value, has_beta: bool, region: _Region
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """``scaled * gamma [+ beta]`` -> (output, gamma, beta); an RMSNorm has no beta."""
    multiply = _next_through_casts(scaled, region)
    if not is_op(multiply, "Mul"):
        raise _RejectError("no gamma: the normalised value is not multiplied by a constant")
    assert multiply is not None
    gamma = _constant_operand(multiply, region.ir_version)
    if gamma is None:
        offset = _offset_gamma(multiply, region)
        raise _RejectError(
            "gamma is written as 1 + weight (Gemma); fold the constants first"
            if offset
            else "no gamma: the normalised value is multiplied by an activation"
        )
    region.add(multiply)
    output = multiply.outputs[0]
    add = sole_consumer(output, "Add") if has_beta else None
    beta = None if add is None else _constant_operand(add, region.ir_version)
    if add is None or beta is None:
        return output, gamma, None
    if _features(beta, region.ir_version) != _features(gamma, region.ir_version):
        return output, gamma, None
    region.add(add)
    return add.outputs[0], gamma, beta


def _next_through_casts(value: ir.Value, region: _Region) -> ir.Node | None:
    """The only reader of ``value`` behind float Casts, which join the region."""
    node = sole_consumer(value)
    while node is not None and is_float_cast(node):
        region.add(node)
        node = sole_consumer(node.outputs[0])
    return node


def _constant_operand(node: ir.Node, ir_version: int | None) -> ir.Value | None:
    """The constant one of two operands, behind a float Cast if there is one."""
    for value in node.inputs[:2]:
        if value is not None and is_const(_behind_casts(value), ir_version):
            return _behind_casts(value)
    return None


def _offset_gamma(multiply: ir.Node, region: _Region) -> bool:
    """Whether an operand is ``1 + constant``."""
    for value in multiply.inputs[:2]:
        add = None if value is None else producer(_behind_casts(value), "Add")
        if add is not None and any(region.scalar(v) == 1 for v in add.inputs):
            return _constant_operand(add, region.ir_version) is not None
    return False


def _features(vector: ir.Value, ir_version: int | None) -> int:
    """D of a constant of shape ``[1, ..., D]``."""
    shape = const_shape(vector, ir_version)
    if not shape or any(d != 1 for d in shape[:-1]):
        raise _RejectError(f"gamma or beta {value_name(vector)!r} is not one number a channel")
    return shape[-1]


def _check_axes(reduce: ir.Node, x: ir.Value, features: int, ir_version: int | None) -> None:
    """The mean must run over exactly the last axis, and keep it."""
    axes = attr_ints(reduce, "axes")
    if axes is None:
        axes = const_ints(node_input(reduce, 1), ir_version)
    if axes is None or len(axes) != 1:
        raise _RejectError("the mean does not run over exactly one known axis")
    x_rank = rank(x)
    if axes[0] != -1 and (x_rank is None or axes[0] != x_rank - 1):
        where = "the rank is unknown" if x_rank is None else f"the rank is {x_rank}"
        raise _RejectError(f"the mean runs over axis {axes[0]}, not the last ({where})")
    if not attr_int(reduce, "keepdims", 1):
        raise _RejectError("the mean drops the axis (keepdims=0)")
    known = None if x.shape is None else x.shape[-1]
    if isinstance(known, int) and known != features:
        raise _RejectError(f"gamma has {features} elements, x has {known} channels")


def _release_shared_casts(x: ir.Value, region: _Region) -> ir.Value:
    """Leave a leading Cast outside the region when others read it too; the new ``x``."""
    for cast in [n for n in region.nodes if is_float_cast(n) and n.inputs[0] is x]:
        if any(reader not in region.nodes for reader in consumers(cast.outputs[0])):
            del region.nodes[cast]
            readers = [n for n in region.nodes if x in n.inputs]
            return x if readers else cast.outputs[0]
    return x


def _check_private(output: ir.Value, region: _Region) -> None:
    for node in region.nodes:
        for value in node.outputs:
            if value is output:
                continue
            outside = [n for n in consumers(value) if n not in region.nodes]
            if outside or value.is_graph_output():
                who = node_label(outside[0]) if outside else "the graph's outputs"
                raise _RejectError(f"{value_name(value)!r} inside the norm is also read by {who}")


def _graph_order(region: _Region) -> tuple[ir.Node, ...]:
    """The region's nodes with every writer before its readers."""
    pending = dict(region.nodes)
    ordered: list[ir.Node] = []
    while pending:
        ready = [
            node
            for node in pending
            if not any(v is not None and v.producer() in pending for v in node.inputs)
        ]
        ordered.extend(ready)
        for node in ready:
            del pending[node]
    return tuple(ordered)


def find_norms(
    graph: ir.Graph, ir_version: int | None = None
) -> tuple[tuple[Norm, ...], tuple[tuple[str, str, str], ...]]:
    """All norms of ``graph`` in node order, and (what, node, reason) of near misses."""
    found: list[Norm] = []
    rejected: list[tuple[str, str, str]] = []
    for node in graph:
        match = match_norm_operator(node, ir_version)
        if match is None:
            match = match_norm_decomposed(node, ir_version)
        if isinstance(match, str):
            rejected.append(("norm", node_label(node), match))
        elif match is not None:
            found.append(match)
    return tuple(found), tuple(rejected)
