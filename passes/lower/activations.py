"""Activations rounded at run time, one scale a token or block.

A node stands in front of the products that read a value; it quantizes and dequantizes at once::

    y = dequantize(quantize(x)),   x, y: [..., K] f32, groups of `size` along K

It is ``com.onnxq::QuantizeBlock``, or for asymmetric integers a function
``com.onnxq.activation::<Format>`` of standard operators. The numbers are those of the formats in
:mod:`onnxq.formats`, group by group; NVFP4's scale of the tensor is one of the token, so that a
result does not depend on the batch that a token is in.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

from onnxq import custom_ops
from onnxq.custom_ops.block_format import block_attributes
from onnxq.errors import PreconditionError, SpecError
from onnxq.formats import Format, IntFormat, MiniFloat, MxFormat, NvFp4Format, parse_format
from onnxq.graph.edit import Names, insert_after
from onnxq.graph.match import Attention, is_op
from onnxq.graph.match.values import attr_ints
from onnxq.passes.plan import ActivationPlan

DOMAIN: Final = "com.onnxq.activation"
OP: Final = "QuantizeBlock"
OPSET: Final = 18
"""Oldest opset with all operators of the bodies."""

_SMALLEST: Final = float(np.finfo(np.float32).tiny)


def activation_format(name: str) -> Format:
    """The format called ``name``, if activations can be rounded to it at run time.

    Raises:
        SpecError: ``SPEC-FORMAT``: it is one for weights only.
    """
    fmt = parse_format(name)
    if _is_activation_format(fmt):
        return fmt
    raise SpecError(
        "SPEC-FORMAT",
        f"activations={name} cannot be computed at run time",
        "integers (int8, int4g32, uint4g32-asym), fp8e4m3, fp8e5m2, fp4, mxfp4, mxfp6e2m3, "
        "mxfp6e3m2, mxfp8e4m3, mxfp8e5m2, mxint8 (with -ceil, if wanted) and nvfp4 can",
    )


def _is_activation_format(fmt: Format) -> bool:
    if isinstance(fmt, IntFormat):
        return 2 <= fmt.bits <= 16 and fmt.scheme != "full"
    if isinstance(fmt, MxFormat):
        return fmt.scale_rule in ("floor", "ceil")
    if isinstance(fmt, NvFp4Format):
        return not fmt.four_over_six
    return isinstance(fmt, MiniFloat) and fmt.signed and fmt.scaled


def keys_and_values(attention: Attention) -> tuple[ir.Value, ir.Value] | None:
    """Keys before their transpose, and values, ``[.., S, d]`` each; None without a transpose."""
    transpose = attention.k.producer()
    if transpose is None or not is_op(transpose, "Transpose"):
        return None
    perm = attr_ints(transpose, "perm")
    keys = transpose.inputs[0]
    if keys is None or perm is None or perm[-2:] != (len(perm) - 1, len(perm) - 2):
        return None
    return keys, attention.v


def attention_readers(attention: Attention, value: ir.Value) -> list[ir.Node]:
    """The transpose of the keys, or the product with the values."""
    inside = {*attention.nodes, attention.k.producer()}
    return [node for node in value.consumers() if node in inside]


def rounded_values(x: npt.NDArray[Any], plan: ActivationPlan) -> npt.NDArray[Any]:
    """What the node gives for ``x [..., K]`` float32, in numpy; K whole blocks."""
    fmt = activation_format(plan.format)
    if isinstance(fmt, IntFormat) and not fmt.symmetric:
        return _asymmetric(x, fmt, np.float32(plan.clip))
    attributes: Any = block_attributes(fmt, clip=plan.clip)
    found: npt.NDArray[Any] = custom_ops.get(OP).reference(x, **attributes)[0]
    return found


def _asymmetric(x: npt.NDArray[Any], fmt: IntFormat, clip: np.float32) -> npt.NDArray[Any]:
    """:func:`rounding_function`, step by step."""
    groups = x.reshape(*x.shape[:-1], -1, fmt.block or x.shape[-1])
    steps = np.float32(fmt.qmax - fmt.qmin)
    lo = groups.min(axis=-1, keepdims=True, initial=0) * clip
    hi = groups.max(axis=-1, keepdims=True, initial=0) * clip
    scale = np.maximum((hi - lo) / steps, np.float32(_SMALLEST))
    point = -np.rint(lo / scale)
    code = np.clip(np.rint(groups / scale) + point, 0, steps)
    found: npt.NDArray[Any] = ((code - point) * scale).reshape(x.shape)
    return found


class ActivationRounding:
    """Puts the nodes into a model; products that read one value in one format share one."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._names = Names(model.graph)
        self._done: dict[tuple[ir.Value, ActivationPlan], ir.Value] = {}

    def read_rounded(self, node: ir.Node, index: int, channels: int, plan: ActivationPlan) -> None:
        """Let ``node`` read its input ``[..., channels]`` rounded.

        Raises:
            PreconditionError: the model's opset has not all operators of the body.
        """
        x = node.inputs[index]
        assert x is not None
        if (x, plan) not in self._done:
            self._done[x, plan] = self._round(x, channels, plan)
        node.replace_input_with(index, self._done[x, plan])

    def read_cache_rounded(self, attention: Attention, channels: int, plan: ActivationPlan) -> None:
        """Let ``attention`` read keys and values of ``channels`` a head rounded."""
        found = keys_and_values(attention)
        assert found is not None
        for value in found:
            for node in attention_readers(attention, value):
                self.read_rounded(node, list(node.inputs).index(value), channels, plan)

    def _round(self, x: ir.Value, channels: int, plan: ActivationPlan) -> ir.Value:
        opset = self._model.opset_imports.get("", 0)
        if opset < OPSET:
            raise PreconditionError(
                "PASS-OPSET",
                f"rounding activations to {plan.format} needs opset {OPSET}; the model has {opset}",
                f"put `canonicalize{{opset={OPSET}}}` first",
            )
        fmt = activation_format(plan.format)
        base = self._names.fresh(f"{x.name}_{plan.format}")
        if isinstance(fmt, IntFormat) and not fmt.symmetric:
            size = fmt.block or channels
            name = attach_rounding(self._model, fmt)
            split = {"split": [channels // size, size], "clip": float(plan.clip)}
            node = ir.node(name, [x], split, domain=DOMAIN, name=base)  # type: ignore[arg-type]
        else:
            custom_ops.attach(self._model, OP)
            attributes = block_attributes(fmt, clip=plan.clip)
            node = custom_ops.make_node(OP, [x], attributes, name=base)
        out = node.outputs[0]
        out.name, out.type, out.shape = base, x.type, x.shape
        insert_after(x, node)
        return out


def attach_rounding(model: ir.Model, fmt: IntFormat) -> str:
    """Add the body for an asymmetric format to a model; the operator's name."""
    model.opset_imports[DOMAIN] = 1
    model.ir_version = max(model.ir_version, 8)
    function = ir.serde.deserialize_function(rounding_function(fmt))
    if function.identifier() not in model.functions:
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
    return _name(fmt)


def _name(fmt: IntFormat) -> str:
    """``int4g32-asym`` -> ``Int4Asym``: groups are an attribute."""
    return f"Int{fmt.bits}Asym{'Narrow' if fmt.narrow else ''}"


@functools.cache
def rounding_function(fmt: IntFormat) -> onnx.FunctionProto:
    """The body ``x [..., K] -> y [..., K]``; ``split`` is [K / size, size]."""
    text = [
        f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">',
        f"{_name(fmt)} <split, clip> (x) => (y) {{",
        "last = Constant <value_ints = [-1]> ()",
        "zero = Constant <value_float = 0.0> ()",
        f"tiny = Constant <value_float = {_SMALLEST!r}> ()",
        f"steps = Constant <value_float = {float(fmt.qmax - fmt.qmin)!r}> ()",
        "split_ = Constant <value_ints: ints = @split> ()",
        "clip_ = Constant <value_float: float = @clip> ()",
        "whole = Shape (x)",
        "head = Shape <end = -1> (x)",
        "parts = Concat <axis = 0> (head, split_)",
        "g = Reshape <allowzero = 1> (x, parts)",
        "least = ReduceMin <keepdims = 1> (g, last)",
        "most = ReduceMax <keepdims = 1> (g, last)",
        "under = Min (least, zero)",
        "over = Max (most, zero)",
        "lo = Mul (under, clip_)",
        "hi = Mul (over, clip_)",
        "width = Sub (hi, lo)",
        "step = Div (width, steps)",
        "scale = Max (step, tiny)",
        "low_ratio = Div (lo, scale)",
        "shift = Round (low_ratio)",
        "point = Neg (shift)",
        "ratio = Div (g, scale)",
        "near = Round (ratio)",
        "moved = Add (near, point)",
        "code = Clip (moved, zero, steps)",
        "offset = Sub (code, point)",
        "restored = Mul (offset, scale)",
        "y = Reshape <allowzero = 1> (restored, whole)",
        "}",
    ]
    return onnx.parser.parse_function("\n".join(text))
