"""``pack``: perform the plan's linear layers with our own packed product, ``QuantMatMul``.

One node a layer, bias inside, with the operator's body in the model: with onnxq's kernels it is the
fastest form on the CPU, without them any onnxruntime runs the body. What the operator cannot take
stays in the plan, for ``qdq`` behind this pass.

=============  ==================================================================================
mode           activations
=============  ==================================================================================
weight-only    as ``activations`` says: rounded to INT8, one scale a token or group, or float
dynamic        rounded to INT8, one scale a token
per-token      rounded to INT8 inside of the product, one scale a token, or a group where their
               groups are the weight's; to other formats by ``QuantizeBlock`` in front of it
static         none: their ranges are fixed, ``qdq`` performs them
=============  ==================================================================================

With ``outliers`` the product is ``DynamicQuantMatMul``: columns of activations that reach so far
stay float (LLM.int8()). Where the target multiplies FP8, E4M3 on both sides is
``DynamicFloat8MatMul``: a scale a token and a channel, or blocks of 128 on both sides.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeGuard

import numpy as np
import onnx_ir as ir

from onnxq import custom_ops
from onnxq.custom_ops.packed_weight import (
    PackedWeight,
    ScaleType,
    integer_levels,
    pack_table,
    takes_int8,
)
from onnxq.errors import InternalError, SpecError, UnsupportedError
from onnxq.graph.edit import (
    Names,
    add_initializer,
    insert_after,
    insert_before,
    remove_dead,
    replace_value,
)
from onnxq.graph.match import Linear, analyze
from onnxq.graph.match.values import value_dtype
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.lower.activations import ActivationRounding
from onnxq.passes.lower.float8 import float8_weight
from onnxq.passes.lower.qdq import forget_shapes
from onnxq.passes.lower.rotations import quantize_rotations
from onnxq.passes.lower.weights import grid_format, rows_of, to_nearest
from onnxq.passes.plan import ActivationPlan, SitePlan
from onnxq.passes.targets import Target
from onnxq.passes.weights.rounded import RoundedWeight, RoundedWeights

OP = "QuantMatMul"
OUTLIER_OP = "DynamicQuantMatMul"
FLOAT8_OP = "DynamicFloat8MatMul"
INT8_TOKENS = ActivationPlan("int8")
"""What the product itself rounds activations to."""


@dataclass(frozen=True)
class Pack(Pass):
    """Replace planned linear layers by ``com.onnxq::QuantMatMul``.

    Args:
        activations: what weight-only layers do with their activations: ``int8`` rounds each token
            to INT8 inside of the kernel, which is much faster; ``int8-group`` gives each group of
            the weight's columns a scale of its own, which is more accurate and nearly as fast;
            ``float`` keeps them. Formats whose levels are no multiples of one number (NF4, FP8)
            keep them in any case.
        scales: how scales are stored. ``float16`` rounds them, by less than 0.05 %, ``bfloat16`` by
            less than 0.4 %, of any range. ``integer`` (Integer Scale, arXiv 2405.14597) is for
            4-bit integers with INT8 activations: groups are summed in integers.
        fuse_rotations: rotate (``online-hadamard``) and quantize in one operator where the products
            behind a rotation take INT8 activations.
        outliers: with INT8 activations, columns that hold a magnitude from this on, in any token of
            a call, stay float; 0 for none. LLM.int8() uses 6.
    """

    name: ClassVar[str] = "pack"
    summary: ClassVar[str] = "perform planned linear layers with the packed product QuantMatMul"
    requires: ClassVar = (PLAN,)
    uses: ClassVar = (ROUNDED,)
    provides: ClassVar = (PLAN,)
    invalidates: ClassVar = (STATISTICS,)
    tolerance: ClassVar[float | None] = None

    activations: Literal["int8", "int8-group", "float"] = "int8"
    scales: Literal["float16", "bfloat16", "float32", "integer"] = "float16"
    outliers: float = 0.0
    fuse_rotations: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.outliers < math.inf:
            raise SpecError("SPEC-RANGE", f"outliers={self.outliers} is no magnitude", "try 6")
        if self.outliers and self.activations == "int8-group":
            raise SpecError(
                "SPEC-COMBINATION",
                "outliers are taken out of rows with one scale, activations=int8-group has more",
                "use one of the two",
            )
        if self.scales == "integer" and self.activations == "int8-group":
            raise SpecError(
                "SPEC-COMBINATION",
                "scales=integer sums groups in integers, activations=int8-group scales each",
                "use one of the two",
            )

    def candidates(self, model: ir.Model) -> list[str]:
        """Linear layers of the main graph."""
        return [linear.name for linear in analyze(model).linears]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Pack every site that the operator takes, and take it off the plan."""
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else RoundedWeights()
        linears = {linear.name: linear for linear in analyze(model).linears}
        left = dataclasses.replace(plan, sites=dict(plan.sites))
        rounding = ActivationRounding(model)
        products = []
        for site in plan.sites.values():
            linear = linears.get(site.site)
            reason = _reason_against(site, linear)
            if reason is None and linear is not None:
                try:
                    op, packed = self._product(linear, site, rounded.get(site.site), ctx.target)
                except UnsupportedError as error:
                    reason = error.cause
                else:
                    if op != FLOAT8_OP and _needs_rounding(site.activation, packed):
                        rounding.read_rounded(
                            linear.node,
                            1 - linear.weight_index,
                            linear.in_features,
                            site.activation,
                        )
                    node = _replace(model, linear, op, packed, self.outliers)
                    if value_dtype(linear.weight) == ir.DataType.FLOAT:
                        products.append(node)
                    del left.sites[site.site]
                    report.change(site.site, _describe(site, op, packed, self.outliers))
                    continue
            report.skip(site.site, f"{reason}; left in the plan for `qdq`")
        if self.fuse_rotations:
            plain = [node for node in products if node.op_type == OP]
            for name in quantize_rotations(model, plain):
                report.change(name, "HadamardQuantize: rotates and quantizes in one pass")
        if ctx.target.float16_products:
            for node in products:
                if node.graph is not None:  # not fused
                    _take_float16(model.graph, node)
        if report.changed:
            remove_dead(model.graph)
            forget_shapes(model)
        ctx.artifacts.put(PLAN, left)
        return report

    def _product(
        self, linear: Linear, site: SitePlan, rounded: RoundedWeight | None, target: Target
    ) -> tuple[str, PackedWeight]:
        """Which of the products it is, and its inputs."""
        float8 = float8_weight(linear, site, rounded) if target.float8_products else None
        if float8 is not None:
            return FLOAT8_OP, float8
        packed = self._packed(linear, site, rounded)
        outliers = packed.attributes["int8_activations"] and self.outliers
        return OUTLIER_OP if outliers else OP, packed

    def _packed(
        self, linear: Linear, site: SitePlan, rounded: RoundedWeight | None
    ) -> PackedWeight:
        plan = site.weight
        if plan is None:
            raise InternalError("PLAN-WEIGHT", f"{site.site} has no weight plan")
        fmt = grid_format(plan)
        if rounded is None:
            rounded = to_nearest(rows_of(linear), fmt, plan)
        codes, levels, zero = rounded.codes.astype(np.int32), rounded.levels, None
        if levels is None:
            levels, shift = integer_levels(fmt.bits, signed=rounded.codes.dtype.kind == "i")
            codes, zero = codes + shift, rounded.zero_point
            if (zero != np.rint(zero)).any():
                raise UnsupportedError(
                    "UNSUPPORTED-PACK", "zero points that are no integers", "use `qdq`"
                )
        elif levels.ndim != 1:
            raise UnsupportedError(
                "UNSUPPORTED-PACK", "a codebook for each group", "use `qdq`, or one codebook"
            )
        own: ScaleType = "int16" if self.scales == "integer" else self.scales
        return pack_table(
            codes,
            levels,
            rounded.scale,
            group=rounded.group,
            zero_point=zero,
            factor=rounded.factor,
            scale_type=own if rounded.scale_type == "float32" else rounded.scale_type,
            int8_activations=self._rounds_inside(site, levels, rounded.group),
            bias=linear.b,
        )

    def _rounds_inside(self, site: SitePlan, levels: np.ndarray, group: int) -> int:
        """Whether the product rounds activations to INT8: 0 no, 1 each row, 2 each group."""
        if site.activation is not None:
            by_group = site.activation == ActivationPlan(f"int8g{group}") and takes_int8(levels)
            return 2 * by_group or int(site.activation == INT8_TOKENS)
        if site.mode == "dynamic":
            return 1
        wanted = {"float": 0, "int8": 1, "int8-group": 2}[self.activations]
        return wanted * takes_int8(levels)


def _reason_against(site: SitePlan, linear: Linear | None) -> str | None:
    if linear is None or linear.kind == "conv" or site.kind in ("embedding", "op"):
        return "no matrix product with a constant weight"
    if site.mode == "static":
        return "its activations have fixed ranges"
    return None


def _needs_rounding(
    activation: ActivationPlan | None, packed: PackedWeight
) -> TypeGuard[ActivationPlan]:
    """Whether activations are rounded to what the product does not round to by itself."""
    return activation is not None and not packed.attributes["int8_activations"]


def _replace(
    model: ir.Model,
    linear: Linear,
    op: str,
    packed: PackedWeight,
    outliers: float,
) -> ir.Node:
    """Put the packed product in the layer's place."""
    graph = model.graph
    inputs, attributes = dict(packed.inputs), dict(packed.attributes)
    if op == OUTLIER_OP:
        del inputs["order"]
        inputs["outliers"] = np.zeros(0, np.int64)
        attributes["threshold"] = outliers
    custom_ops.attach(model, op)
    names = Names(graph)
    x = linear.node.inputs[1 - linear.weight_index]  # as earlier replacements left it
    constants = [
        add_initializer(graph, names.fresh(f"{linear.name}_{name}"), array)
        for name, array in inputs.items()
    ]
    node = custom_ops.make_node(
        op, [x, *constants], attributes, name=names.fresh(f"{linear.name}_{op}")
    )
    out = node.outputs[0]
    out.name = names.fresh(f"{linear.name}_{op}_output")
    out.type, out.shape = linear.output.type, linear.output.shape
    insert_before(linear.node, node)
    replace_value(linear.output, out)
    if linear.bias_add is not None:
        graph.remove(linear.bias_add, safe=True)
    graph.remove(linear.node, safe=True)
    return node


def _take_float16(graph: ir.Graph, node: ir.Node) -> None:
    """Casts around a product."""
    names, (x, out) = Names(graph), (node.inputs[0], node.outputs[0])
    assert x is not None
    narrow = _cast(x, ir.DataType.FLOAT16, names.fresh(f"{node.name}_narrow"))
    insert_before(node, narrow)
    node.replace_input_with(0, narrow.outputs[0])
    wide = _cast(out, ir.DataType.FLOAT, names.fresh(f"{node.name}_wide"))
    insert_after(node, wide)
    replace_value(out, wide.outputs[0], except_nodes=[wide])
    out.type = ir.TensorType(ir.DataType.FLOAT16)


def _cast(x: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [x], {"to": to}, name=name)
    node.outputs[0].name = f"{name}_output"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), x.shape
    return node


def _describe(site: SitePlan, op: str, packed: PackedWeight, outliers: float) -> str:
    if op == FLOAT8_OP:
        by = "blocks of 128" if packed.attributes["block"] else "one scale a channel and a token"
        return f"{op}, fp8e4m3 on both sides, {by}"
    fmt = site.weight.format if site.weight is not None else ""
    group = int(packed.attributes["group"])
    by = "one scale a channel" if group == packed.attributes["K"] else f"groups of {group}"
    activations = "float" if site.activation is None else site.activation.format
    if packed.attributes["int8_activations"]:
        activations = "int8" if packed.attributes["int8_activations"] == 1 else "int8 by group"
        if outliers:
            activations = f"int8, outliers from {outliers:g} on float, other"
    return f"{op}, {fmt} in {by}, {activations} activations"
