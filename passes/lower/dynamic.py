"""Dynamic quantization: activation ranges are taken at run time, one a tensor.

The nodes are those that onnxruntime's graph optimizer fuses into ``DynamicQuantizeMatMul`` and
``MatMulIntegerToFloat``, bias included::

    xq, xs, xz = DynamicQuantizeLinear(x)
    y = Cast(MatMulInteger(xq, wq, xz, wz)) * (xs * ws)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxq.errors import InternalError
from onnxq.graph.edit import Names, add_initializer, insert_after, insert_before, replace_value
from onnxq.graph.match import Linear
from onnxq.passes.lower.weights import quantize_weight, take_rounded, weight_as_read
from onnxq.passes.plan import SitePlan
from onnxq.passes.weights.rounded import RoundedWeights


class DynamicLowering:
    """Lowers dynamic sites; layers that read the same value share its quantization."""

    def __init__(self, model: ir.Model, rounded: RoundedWeights) -> None:
        self._graph = model.graph
        self._names = Names(model.graph)
        self._rounded = rounded
        self._quantized: dict[ir.Value, ir.Node] = {}

    def lower(self, linear: Linear, site: SitePlan) -> str:
        """Replace the product by one on integers; a Gemm's bias becomes an Add."""
        if site.weight is None:
            raise InternalError("PLAN-WEIGHT", f"{site.site} has no weight plan")
        solved = self._rounded.get(site.site)
        if solved is None:
            array, in_axis, _ = weight_as_read(linear)
            array = array if in_axis == 0 else np.ascontiguousarray(array.T)
            weight = quantize_weight(array, site.weight, in_axis=0, out_axis=1)
        else:
            weight = take_rounded(solved, site.weight, in_axis=0)
        base = linear.name
        codes, scale, zero = (
            add_initializer(self._graph, self._names.fresh(f"{base}_weight_{what}"), data)
            for what, data in (
                ("quantized", weight.codes),
                ("scale", weight.scale),
                ("zero_point", weight.zero_point),
            )
        )
        x = linear.node.inputs[0]  # what stands there now, if the layer before was replaced
        if x is None:
            raise InternalError("STALE-MATCH", f"{site.site} reads nothing")
        dql = self._dynamic_quantize(x)
        nodes = [
            self._node("MatMulInteger", [dql.outputs[0], codes, dql.outputs[2], zero], base),
            self._node("Mul", [dql.outputs[1], scale], f"{base}_scales"),
        ]
        nodes.append(self._node("Cast", [nodes[0].outputs[0]], base, {"to": ir.DataType.FLOAT}))
        nodes.append(self._node("Mul", [nodes[2].outputs[0], nodes[1].outputs[0]], base))
        if linear.bias_add is None and linear.b is not None:
            bias = add_initializer(self._graph, self._names.fresh(f"{base}_bias"), linear.b)
            nodes.append(self._node("Add", [nodes[3].outputs[0], bias], base))
        result = nodes[-1].outputs[0]
        old = linear.node.outputs[0]
        result.type, result.shape = old.type, old.shape
        insert_before(linear.node, nodes)
        replace_value(old, result)
        self._graph.remove(linear.node, safe=True)
        return f"integer product, {site.weight.format} weight, activation quantized at run time"

    def _dynamic_quantize(self, x: ir.Value) -> ir.Node:
        if x not in self._quantized:
            name = self._names.fresh(f"{x.name}_DynamicQuantizeLinear")
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=name)
            for out, what in zip(node.outputs, ("quantized", "scale", "zero_point"), strict=True):
                out.name = self._names.fresh(f"{x.name}_{what}")
            insert_after(x, node)
            self._quantized[x] = node
        return self._quantized[x]

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        base: str,
        attributes: dict[str, int] | None = None,
    ) -> ir.Node:
        node = ir.node(op_type, inputs, attributes, name=self._names.fresh(f"{base}_{op_type}"))
        node.outputs[0].name = self._names.fresh(f"{base}_{op_type}_output")
        return node
