"""Static quantization: Q/DQ pairs on activations, integer weights behind DequantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxq.errors import InternalError, PreconditionError
from onnxq.formats import IntFormat, affine_params
from onnxq.graph.edit import Names, add_initializer, insert_after, insert_before, replace_value
from onnxq.graph.match import Linear
from onnxq.passes.lower.weights import (
    QuantizedWeight,
    integer_format,
    quantize_weight,
    take_rounded,
    weight_as_read,
)
from onnxq.passes.plan import QuantPlan, SitePlan
from onnxq.passes.targets import Target
from onnxq.passes.weights.rounded import RoundedWeights

CONTRIB = "com.microsoft"
INT32_MAX = 2**31 - 1


class StaticLowering:
    """Lowers the static sites of one plan; activations get one Q/DQ pair each, made once."""

    def __init__(
        self, model: ir.Model, plan: QuantPlan, rounded: RoundedWeights, target: Target
    ) -> None:
        self._model = model
        self._target = target
        self._graph = model.graph
        self._plan = plan
        self._rounded = rounded
        self._names = Names(model.graph)
        self._values = {
            v.name: v for v in (*self._graph.inputs, *(o for n in self._graph for o in n.outputs))
        }
        self._params: dict[str, tuple[ir.Value, ir.Value, float]] = {}
        self._dequantized: dict[str, ir.Value] = {}
        self._written: list[str] = []

    def lower_linear(self, linear: Linear, site: SitePlan) -> str:
        """Let a linear layer read dequantized codes on both sides."""
        if site.weight is None:
            raise InternalError("PLAN-WEIGHT", f"{site.site} has no weight plan")
        self._note_output(site)
        name = site.inputs[0]
        array, in_axis, out_axis = weight_as_read(linear)
        solved = self._rounded.get(site.site)
        if solved is None:
            weight = quantize_weight(array, site.weight, in_axis=in_axis, out_axis=out_axis)
        else:
            weight = take_rounded(solved, site.weight, in_axis=in_axis)
        linear.node.replace_input_with(0, self._dequantized_activation(name))
        linear.node.replace_input_with(
            linear.weight_index, self._dequantize_weight(linear, weight, site.weight.format)
        )
        granularity = "per channel" if site.weight.per_channel else "per tensor"
        what = f"Q/DQ, {site.weight.format} {granularity}"
        if integer_format(site.weight.format).bits not in (2, 4, 8, 16):
            what += ", each code in a byte"
        if linear.kind != "gemm" or linear.bias is None or linear.bias_add is not None:
            return what
        if self._quantize_bias(linear, weight, self._params[name][2]):
            return what
        return f"{what}; the bias stays float, it does not fit into int32"

    def lower_op(self, node: ir.Node, site: SitePlan) -> str:
        """Let an operator without weights read dequantized codes."""
        self._note_output(site)
        for index, read in enumerate(node.inputs):
            if read is not None and read.name in site.inputs:
                node.replace_input_with(index, self._dequantized_activation(str(read.name)))
        return "Q/DQ"

    def _note_output(self, site: SitePlan) -> None:
        if site.output:
            self._written.append(site.output)

    def finish(self) -> None:
        """Quantize what integer kernels write: then all readers see the codes."""
        for name in self._written:
            value = self._values[name]
            dequantized = self._dequantized_activation(name)
            quantize = self._quantize_node(dequantized)
            replace_value(value, dequantized, except_nodes=[quantize])

    @staticmethod
    def _quantize_node(dequantized: ir.Value) -> ir.Node:
        dequantize = dequantized.producer()
        codes = dequantize.inputs[0] if dequantize is not None else None
        node = codes.producer() if codes is not None else None
        if node is None:
            raise InternalError("QDQ-PAIR", f"{dequantized.name} has no QuantizeLinear")
        return node

    def _dequantized_activation(self, name: str) -> ir.Value:
        """The value behind the Q/DQ pair of activation ``name``, made on first use."""
        if name in self._dequantized:
            return self._dequantized[name]
        value = self._values[name]
        scale, zero, _ = self._activation_params(name)
        domain = self._domain(integer_format(self._plan.values[name].format), "activations")
        quantize = ir.node(
            "QuantizeLinear",
            [value, scale, zero],
            domain=domain,
            name=self._names.fresh(f"{name}_QuantizeLinear"),
        )
        quantize.outputs[0].name = self._names.fresh(f"{name}_quantized")
        dequantize = ir.node(
            "DequantizeLinear",
            [quantize.outputs[0], scale, zero],
            domain=domain,
            name=self._names.fresh(f"{name}_DequantizeLinear"),
        )
        out = dequantize.outputs[0]
        out.name = self._names.fresh(f"{name}_dequantized")
        out.type, out.shape = value.type, value.shape
        insert_after(value, [quantize, dequantize])
        self._dequantized[name] = out
        return out

    def _domain(self, fmt: IntFormat, what: str) -> str:
        """The domain of Q/DQ in ``fmt``.

        The standard's operators learnt 4 and 16 bits in opset 21, 2 bits in 25; those of
        onnxruntime had 4 and 16 before, and some targets read them.

        Raises:
            PreconditionError: ``PASS-OPSET``: neither will do.
        """
        opset = self._model.opset_imports.get("", 0)
        if np.dtype(fmt.numpy_dtype) in (np.int8, np.uint8):
            return ""
        needed = 25 if fmt.bits <= 2 else 21
        if opset < needed and self._target.contrib_qdq and fmt.bits in (4, 16):
            self._graph.opset_imports.setdefault(CONTRIB, 1)
            return CONTRIB
        if opset < needed:
            raise PreconditionError(
                "PASS-OPSET",
                f"`qdq`: {fmt} {what} need opset {needed}; the model has {opset}",
                f"put `canonicalize{{opset={needed}}}` first",
            )
        return ""

    def _activation_params(self, name: str) -> tuple[ir.Value, ir.Value, float]:
        """Scale and zero point of an activation as constants, and the scale as a number."""
        if name in self._params:
            return self._params[name]
        planned = self._plan.values[name]
        if planned.same_as is not None:
            self._params[name] = self._activation_params(planned.same_as)
            return self._params[name]
        fmt = integer_format(planned.format)
        scale, zero = affine_params(planned.lo, planned.hi, fmt, symmetric=planned.symmetric)
        found = (
            add_initializer(self._graph, self._names.fresh(f"{name}_scale"), np.asarray(scale)),
            add_initializer(self._graph, self._names.fresh(f"{name}_zero_point"), np.asarray(zero)),
            float(scale),
        )
        self._params[name] = found
        return found

    def _dequantize_weight(
        self, linear: Linear, weight: QuantizedWeight, fmt_name: str
    ) -> ir.Value:
        base = f"{linear.name}_weight"
        fmt = integer_format(fmt_name)
        domain = self._domain(fmt, "weights")
        codes = weight.codes.astype(fmt.numpy_dtype)
        inputs = [
            add_initializer(self._graph, self._names.fresh(f"{base}_quantized"), codes),
            add_initializer(self._graph, self._names.fresh(f"{base}_scale"), weight.scale),
        ]
        # Zero is the default, but onnxruntime's QGemm is only fused when it is spelled out.
        if linear.kind == "gemm" or weight.zero_point.any():
            zero = self._names.fresh(f"{base}_zero_point")
            inputs.append(add_initializer(self._graph, zero, weight.zero_point))
        attributes = {} if weight.axis is None else {"axis": weight.axis}
        return self._dequantize(linear, inputs, attributes, base, domain)

    def _quantize_bias(self, linear: Linear, weight: QuantizedWeight, activation: float) -> bool:
        """The bias in int32 at the scale of the accumulator, as onnxruntime's QGemm takes it.

        A Conv's bias stays float: onnxruntime rounds it by itself when it fuses.

        Returns:
            whether it fits; a channel of tiny weights has too fine a scale, and then the bias
            stays float and so does the product.
        """
        bias = linear.b
        if bias is None or linear.bias is None:
            return True
        # Of the weight's rank: QNN takes a bias by channel over a weight by tensor for something
        # else, and computes nonsense.
        scale = np.asarray(weight.scale * np.float32(activation), np.float32)
        codes = np.rint(bias.astype(np.float64) / scale)
        if (np.abs(codes) > INT32_MAX).any():
            return False
        base = f"{linear.name}_bias"
        inputs = [
            add_initializer(
                self._graph, self._names.fresh(f"{base}_quantized"), codes.astype(np.int32)
            ),
            add_initializer(self._graph, self._names.fresh(f"{base}_scale"), scale),
        ]
        attributes = {"axis": 0} if scale.ndim else {}
        index = next(i for i, v in enumerate(linear.node.inputs) if v is linear.bias)
        linear.node.replace_input_with(index, self._dequantize(linear, inputs, attributes, base))
        return True

    def _dequantize(
        self,
        linear: Linear,
        inputs: list[ir.Value],
        attributes: dict[str, int],
        base: str,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(
            "DequantizeLinear",
            inputs,
            attributes,
            domain=domain,
            name=self._names.fresh(f"{base}_DequantizeLinear"),
        )
        out = node.outputs[0]
        out.name = self._names.fresh(f"{base}_dequantized")
        out.type = ir.TensorType(ir.DataType.FLOAT)
        out.shape = inputs[0].shape
        insert_before(linear.node, node)
        return out
