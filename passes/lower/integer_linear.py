"""Linear layers in integers: uint8 by int8 codes, int32 sums, the zero point in an int32 bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxq.errors import PreconditionError
from onnxq.formats import affine_params
from onnxq.graph.match import Linear
from onnxq.passes.lower.integer_forms import Acc, Emitter, Form, Spec
from onnxq.passes.lower.integer_nodes import no_integer_form
from onnxq.passes.lower.weights import integer_format, quantize_weight, take_rounded, weight_as_read
from onnxq.passes.plan import QuantPlan, SitePlan
from onnxq.passes.weights.rounded import RoundedWeights

MAX_BIAS = 1 << 29
"""A bias beyond would leave no room for the products; its column gets a coarser scale."""


class LinearLowering:
    """Lowers the linear layers of one graph as its plan says.

    Args:
        emitter: where nodes go.
        plan: of the layers.
        rounded: weights that solvers rounded.
    """

    def __init__(self, emitter: Emitter, plan: QuantPlan, rounded: RoundedWeights) -> None:
        self._emitter = emitter
        self._plan = plan
        self._rounded = rounded

    def spec(self, linear: Linear) -> Spec:
        """How a layer reads its input; uint8 codes whatever the plan says of the sign."""
        name = str(linear.x.name)
        planned = self._plan.values.get(name)
        site = self._plan.sites.get(linear.name)
        if planned is None or site is None or site.mode != "static":
            why = self._plan.floats.get(linear.name, "no static plan")
            raise PreconditionError(
                "PASS-INTEGER-PLAN",
                f"`integer-only`: layer `{linear.name}` is not planned in integers: {why}",
                "put `assign{mode=static}` before, and leave no layer in float",
            )
        if planned.same_as is not None:
            planned = self._plan.values[planned.same_as]
        fmt = integer_format(planned.format)
        if fmt.bits != 8:
            raise PreconditionError(
                "PASS-INTEGER-PLAN",
                f"`integer-only`: layer `{linear.name}` reads {planned.format}, not 8 bits",
                "put `assign{activations=uint8}` before",
            )
        scale, zero = affine_params(planned.lo, planned.hi, fmt, symmetric=planned.symmetric)
        return Spec(float(scale), int(zero) + (128 if fmt.signed else 0))

    def lower(self, linear: Linear, x: Form) -> Acc:
        """The product of the codes of ``x`` and the layer's weight.

        Raises:
            PreconditionError: ``PASS-INTEGER-PLAN``, the weight has zero points or too many bits.
            UnsupportedError: ``UNSUPPORTED-INTEGER-FORM``, a convolution, or a plan in blocks.
        """
        site = self._plan.sites[linear.name]
        if site.weight is None or site.weight.block or linear.kind == "conv":
            raise no_integer_form(linear.node)
        spec = self.spec(linear)
        read = self._emitter.codes(x, spec)
        codes, scale = self._weight(linear, site)
        bias = np.zeros(codes.shape[1]) if linear.b is None else linear.b.astype(np.float64)
        codes, scale, offset = with_room_for_bias(codes, scale, bias, spec)
        weight = self._emitter.constant(np.ascontiguousarray(codes, np.int8), "weight")
        node = self._emitter.standard(
            "MatMulInteger", [read.value, weight], dtype=ir.DataType.INT32
        )
        return Acc(node.outputs[0], scale * spec.scale, offset)

    def _weight(self, linear: Linear, site: SitePlan) -> tuple[np.ndarray, np.ndarray]:
        """Codes ``[K, N]`` int64 within ±127, and scales ``[N]``."""
        planned = site.weight
        assert planned is not None
        array, in_axis, out_axis = weight_as_read(linear)
        solved = self._rounded.get(site.site)
        if solved is None:
            weight = quantize_weight(array, planned, in_axis=in_axis, out_axis=out_axis)
        else:
            weight = take_rounded(solved, planned, in_axis=in_axis)
        if weight.zero_point.any() or integer_format(planned.format).bits > 8:
            raise PreconditionError(
                "PASS-INTEGER-PLAN",
                f"`integer-only`: the weight of `{linear.name}` is {planned.format}"
                + (" with zero points" if weight.zero_point.any() else ""),
                "plan symmetric weights of at most 8 bits",
            )
        codes = np.clip(weight.codes.astype(np.int64), -127, 127)
        codes = codes.T if in_axis == 1 else codes
        return codes, np.broadcast_to(weight.scale.astype(np.float64), codes.shape[1]).copy()


def with_room_for_bias(
    codes: np.ndarray, scale: np.ndarray, bias: np.ndarray, spec: Spec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bias at the scale of the products, the input's zero point taken off.

    A column of tiny weights has so fine a scale that its bias would not fit into 32 bits; its codes
    are made coarser.

    Args:
        codes: ``[K, N]`` int64.
        scale: ``[N]`` of the columns.
        bias: ``[N]``.
        spec: of the input.

    Returns:
        codes, scale and the bias ``[N]`` int32.
    """
    least = np.abs(bias) / (spec.scale * MAX_BIAS)
    coarser = np.maximum(scale, least)
    moved = coarser > scale
    if moved.any():
        codes = codes.copy()
        codes[:, moved] = np.rint(codes[:, moved] * (scale / coarser)[moved]).astype(np.int64)
    offset = np.rint(bias / (coarser * spec.scale)).astype(np.int64) - spec.zero * codes.sum(axis=0)
    return codes, coarser, offset.astype(np.int32)
