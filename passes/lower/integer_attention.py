"""Softmax attention in integers: products of 8-bit codes, scores fine enough for the exponential.

::

    A = (Q - z) K             [B, H, S, T] int32, steps of S_q S_k times the factor of the scores
    A' = A * 2^h              h halvings of the step, where it is coarser than the exponential takes
    P = IntegerSoftmax(A' + mask),  C = P V
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir

from onnxq.errors import UnsupportedError
from onnxq.graph.match import Attention
from onnxq.graph.match.values import const_array, const_scalar, is_op, static_shape, value_name
from onnxq.passes.lower.integer_forms import Acc, Emitter, Form, Spec
from onnxq.passes.lower.integer_functions import FunctionLowering
from onnxq.passes.lower.integer_mask import MaskLowering
from onnxq.passes.lower.integer_nodes import no_integer_form, source_of
from onnxq.solvers.integer_only import exp_refinement, min_exp_scale

RangeOf = Callable[[str, bool], tuple[float, float]]
"""(value, symmetric) -> the range that codes should cover."""

_PRODUCT = 128 * 127
"""The largest product of a code of q and one of k."""

_UNKNOWN_HEAD = 1024
"""Assumed width of a head that no shape tells."""

_DEPTHS = ((1 << 24, 1 << 26), (1 << 27, 1 << 29))
"""(reach of the scores, what masking takes off): twice the reach and the 30 halvings of the
exponential, 2^21 steps at most, lie below; three such masks and the scores fit into int32."""


class AttentionLowering:
    """Lowers the attentions of one graph.

    Args:
        emitter: where nodes go.
        functions: makes the softmax.
        attentions: all of them: their masks may be shared.
        range_of: calibrated ranges.
    """

    def __init__(
        self,
        emitter: Emitter,
        functions: FunctionLowering,
        attentions: Sequence[Attention],
        range_of: RangeOf,
    ) -> None:
        self._emitter = emitter
        self._functions = functions
        self._attentions = attentions
        self._range_of = range_of

    def specs(self, attention: Attention) -> Iterator[tuple[ir.Value, Spec]]:
        """How its products read q, k and v."""
        q = self._symmetric(attention.q, signed=False)
        k = self._symmetric(attention.k, signed=True)
        # Scores finer than the exponential takes: coarser codes of q lose nothing that counts.
        least = min_exp_scale() * (1 + 1e-6) / (k.scale * scale_after(attention))
        yield attention.q, Spec(max(q.scale, least), q.zero)
        yield attention.k, k
        yield attention.v, self._symmetric(attention.v, signed=True)

    def lower(self, attention: Attention, form_of: Callable[[ir.Value, str], Form]) -> Acc:
        """The context as a sum of products.

        Raises:
            UnsupportedError: ``UNSUPPORTED-SCALE-RANGE``, scores too wide for int32;
                ``UNSUPPORTED-INTEGER-FORM``, of what is added to them.
        """
        (_, q_spec), (_, k_spec), (_, v_spec) = self.specs(attention)
        mask = self._mask(attention)
        emitter = self._emitter
        q = emitter.codes(form_of(attention.q, attention.name), q_spec)
        k = emitter.codes(form_of(attention.k, attention.name), k_spec)
        v = emitter.codes(form_of(attention.v, attention.name), v_spec)
        zero = emitter.constant(q_spec.zero_array, "zero_point")
        scores = self._product(q.value, k.value, zero)
        step = self._step(attention)
        halvings = exp_refinement(step)
        if halvings:
            factor = emitter.constant(np.array(1 << halvings, np.int32), "refine")
            made = emitter.standard("Mul", [scores, factor], dtype=ir.DataType.INT32)
            scores, step = made.outputs[0], step / (1 << halvings)
        probabilities = self._functions.softmax(scores, mask, step)
        context = self._product(probabilities.value, v.value)
        worth = np.array([probabilities.spec.scale * v_spec.scale])
        return Acc(context, worth, np.zeros(1, np.int32))

    def _product(self, *inputs: ir.Value) -> ir.Value:
        node = self._emitter.standard("MatMulInteger", inputs, dtype=ir.DataType.INT32)
        return node.outputs[0]

    def _symmetric(self, value: ir.Value, *, signed: bool) -> Spec:
        """Codes about zero for what products of two activations read."""
        lo, hi = self._range_of(value_name(source_of(value)), True)
        scale = max(-lo, hi, 1e-6) / 127
        return Spec(scale, 0, signed=True) if signed else Spec(scale, 128)

    def _step(self, attention: Attention) -> float:
        """What a step of the scores is worth, as the product gives them."""
        (_, q), (_, k), _ = self.specs(attention)
        return q.scale * k.scale * scale_after(attention)

    # Masks ----------------------------------------------------------------------------------------

    @cached_property
    def _masks(self) -> MaskLowering:
        depths = [self._depth(attention) for attention in self._attentions]
        return MaskLowering(self._emitter, -max(depths))

    def _depth(self, attention: Attention) -> int:
        """How much masking has to take off the scores."""
        step, width = self._step(attention), _head_width(attention)
        reach = width * _PRODUCT << exp_refinement(step)
        depth = next((depth for room, depth in _DEPTHS if reach <= room), None)
        if depth is None:
            raise UnsupportedError(
                "UNSUPPORTED-SCALE-RANGE",
                f"`integer-only`: attention `{attention.name}`: scores of {width} products in "
                f"steps of {step:.3g} are too coarse for the exponential, and too large for int32 "
                "in finer steps",
                "its queries and keys have outliers: calibrate with percentiles, or smooth them",
            )
        return depth

    def _mask(self, attention: Attention) -> ir.Value:
        """The sum of all masks as an int32 addend; a zero where there is none."""
        addends: list[ir.Value] = []
        for node in attention.nodes[1:]:
            if is_op(node, "Add") and node is not attention.pv_matmul:
                other = [v for v in node.inputs if v in attention.addends]
                addends += [self._masks.lower(v) for v in other]
            elif is_op(node, "Where") and node.outputs[0] is not attention.probs:
                scores_at = 1 if const_array(node.inputs[2]) is not None else 2
                addends.append(self._masks.lower_condition(node, scores_at))
        self._emitter.at(attention.pv_matmul, attention.name)
        if not addends:
            return self._emitter.constant(np.zeros(1, np.int32), "no_mask")
        total = addends[0]
        for addend in addends[1:]:
            total = self._emitter.standard("Add", [total, addend]).outputs[0]
        return total


def _head_width(attention: Attention) -> int:
    """D, which a shape of q or k tells."""
    for value, axis in ((attention.q, -1), (attention.k, -2)):
        shape = static_shape(value) or ()
        width = shape[axis] if len(shape) >= 2 else None
        if width is not None:
            return width
    return _UNKNOWN_HEAD


def scale_after(attention: Attention) -> float:
    """The factor between the product of q and k and the softmax."""
    factor = 1.0
    for node in attention.nodes[1:-1]:
        if node is attention.softmax:
            break
        if is_op(node, "Mul", "Div"):
            numbers = [c for c in map(const_scalar, node.inputs) if c is not None]
            if len(numbers) != 1 or numbers[0] <= 0:
                raise no_integer_form(node)
            factor = factor * numbers[0] if is_op(node, "Mul") else factor / numbers[0]
        elif not is_op(node, "Add", "Where", "Cast", "Identity", "Dropout"):
            raise no_integer_form(node)
    return factor
