"""``qdq``: perform the plan in operators that onnxruntime and other runtimes know.

=============  ==================================================================================
mode           what stands in the graph afterwards
=============  ==================================================================================
static         ``QuantizeLinear -> DequantizeLinear`` on planned activations, weights as integers
               behind ``DequantizeLinear``; onnxruntime fuses them into integer kernels
dynamic        ``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul``; onnxruntime fuses them
per-token      a function that rounds activations token by token, or block by block, in front of a
               float product; weights decoded
weight-only    ``MatMulNBits`` where the target has it, else a blocked ``DequantizeLinear``
embeddings     ``Gather`` of integer rows and of their scales, ``Cast``, ``Mul``, or between Q/DQ
               where the target wants it
=============  ==================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxq.graph.edit import remove_dead
from onnxq.graph.match import analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.lower.activations import ActivationRounding
from onnxq.passes.lower.dynamic import DynamicLowering
from onnxq.passes.lower.embedding import lower_embedding
from onnxq.passes.lower.parts import PartLowering, refuse_rounded
from onnxq.passes.lower.static import StaticLowering
from onnxq.passes.lower.weight_only import lower_decoded, lower_weight_only
from onnxq.passes.plan import CACHE
from onnxq.passes.sites import site_names
from onnxq.passes.weights.rounded import RoundedWeights


@dataclass(frozen=True)
class Qdq(Pass):
    """Insert quantize and dequantize nodes, integer products and packed weights."""

    name: ClassVar[str] = "qdq"
    summary: ClassVar[str] = "perform the plan: Q/DQ nodes, integer products, packed weights"
    requires: ClassVar = (PLAN,)
    uses: ClassVar = (ROUNDED,)
    invalidates: ClassVar = (PLAN, ROUNDED, STATISTICS)
    tolerance: ClassVar[float | None] = None

    def candidates(self, model: ir.Model) -> list[str]:
        """Linear layers and embeddings of the main graph."""
        structure = analyze(model)
        return [x.name for x in structure.linears] + [x.name for x in structure.embeddings]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Lower every site of the plan, in graph order."""
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        structure = analyze(model)
        linears = {linear.name: linear for linear in structure.linears}
        names = site_names(model.graph)
        embeddings = {names[embedding.node]: embedding for embedding in structure.embeddings}
        nodes = {name: node for node, name in names.items()}
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else RoundedWeights()
        heads = {
            attention.name + CACHE: (attention, way.head_dim)
            for attention in structure.attentions
            if not isinstance(way := structure.v_to_o(attention), str)
        }
        static = StaticLowering(model, plan, rounded, ctx.target)
        dynamic = DynamicLowering(model, rounded)
        activations = ActivationRounding(model)
        parts = PartLowering(model)
        for site in plan.sites.values():
            if not ctx.budget.take(site.site):
                continue
            linear = linears.get(site.site)
            if site.kind == "embedding":
                what = lower_embedding(model.graph, embeddings[site.site], site, ctx.target)
            elif site.kind == "cache" and site.activation is not None:
                activations.read_cache_rounded(*heads[site.site], site.activation)
                what = f"keys and values in {site.activation.format}, a scale a token and head"
            elif linear is None:
                what = static.lower_op(nodes[site.site], site)
            elif site.parts:
                if rounded.get(site.site) is not None:
                    refuse_rounded(site)
                what = parts.lower(linear, site)
            elif site.mode == "static":
                what = static.lower_linear(linear, site)
            elif site.mode == "dynamic":
                what = dynamic.lower(linear, site)
            elif site.activation is not None:
                activations.read_rounded(
                    linear.node, 1 - linear.weight_index, linear.in_features, site.activation
                )
                what = f"{site.activation.format} activations a token, "
                what += lower_decoded(model, linear, site, rounded.get(site.site))
            else:
                what = lower_weight_only(model, linear, site, ctx.target, rounded.get(site.site))
            report.change(site.site, what)
        static.finish()
        remove_dead(model.graph)
        forget_shapes(model)
        return report


def forget_shapes(model: ir.Model) -> None:
    """Drop the shapes that earlier passes inferred for inner values.

    Where onnxruntime (1.31) reads that both operands of a residual add have one shape, it fuses
    the add and the LayerNormalization behind it into SkipLayerNormalization, whose CPU kernel takes
    six times as long as the two. It infers what its kernels need by itself.
    """
    for graph in model.graphs():
        kept = {*graph.inputs, *graph.outputs}
        for node in graph:
            for value in node.outputs:
                if value not in kept:
                    value.shape = None
                    value.type = None
