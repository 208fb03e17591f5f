"""Activations rounded at run time, one scale a token or block, by standard operators.

A node ``com.onnxq.activation::<Format>`` with a body of standard operators stands in front of the
products that read a value; it quantizes and dequantizes at once::

    y = dequantize(quantize(x)),   x, y: [..., K] f32, groups of `size` along K

The numbers are those of the formats in :mod:`onnxq.formats`, group by group; NVFP4's scale of the
tensor is one of the token, so that a result does not depend on the batch that a token is in.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from onnxq.errors import PreconditionError, SpecError
from onnxq.formats import Format, IntFormat, MiniFloat, MxFormat, NvFp4Format, parse_format
from onnxq.formats.minifloat import FP4, FP8E4M3
from onnxq.formats.mx import INT8_FRACTION_BITS, INT8_MAX_CODE
from onnxq.graph.edit import Names, insert_after
from onnxq.graph.match import Attention, is_op
from onnxq.graph.match.values import attr_ints
from onnxq.passes.plan import ActivationPlan

DOMAIN: Final = "com.onnxq.activation"
OPSET: Final = 19
"""Oldest opset with 8-bit floats."""

_FLOAT: Final = int(onnx.TensorProto.FLOAT)
_SMALLEST: Final = float(np.finfo(np.float32).tiny)
_CASTS: Final = {
    "fp8e4m3": int(onnx.TensorProto.FLOAT8E4M3FN),
    "fp8e5m2": int(onnx.TensorProto.FLOAT8E5M2),
}


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
    return isinstance(fmt, MiniFloat) and fmt.signed and fmt.scaled and _has_rounding(fmt)


def _has_rounding(fmt: MiniFloat) -> bool:
    return str(_plain(fmt)) in _CASTS or (fmt.specials == "none" and fmt.e <= 3)


def _plain(fmt: MiniFloat) -> MiniFloat:
    return MiniFloat(fmt.e, fmt.m, fmt.bias, fmt.specials, fmt.signed)


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
                f"`qdq`: rounding activations to {plan.format} needs opset {OPSET}; "
                f"the model has {opset}",
                f"put `canonicalize{{opset={OPSET}}}` first",
            )
        fmt = activation_format(plan.format)
        size = fmt.block or channels
        name = attach_rounding(self._model, fmt)
        attributes = {"split": [channels // size, size], "clip": float(plan.clip)}
        base = self._names.fresh(f"{x.name}_{plan.format}")
        node = ir.node(name, [x], attributes, domain=DOMAIN, name=base)  # type: ignore[arg-type]
        out = node.outputs[0]
        out.name, out.type, out.shape = base, x.type, x.shape
        insert_after(x, node)
        return out


def attach_rounding(model: ir.Model, fmt: Format) -> str:
    """Add the body for ``fmt`` to a model; the operator's name."""
    name = _name(fmt)
    model.opset_imports[DOMAIN] = 1
    model.ir_version = max(model.ir_version, 8)
    function = ir.serde.deserialize_function(rounding_function(fmt))
    if function.identifier() not in model.functions:
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
    return name


def _name(fmt: Format) -> str:
    """``int4g32-asym`` -> ``Int4Asym``: groups are an attribute."""
    if isinstance(fmt, IntFormat):
        scheme = "Sym" if fmt.symmetric else "Asym"
        return f"Int{fmt.bits}{scheme}{'Narrow' if fmt.narrow else ''}"
    if isinstance(fmt, MxFormat):
        return f"Mx{fmt.element.capitalize()}{fmt.scale_rule.capitalize()}"
    if isinstance(fmt, NvFp4Format):
        return "NvFp4"
    assert isinstance(fmt, MiniFloat)
    return str(_plain(fmt)).capitalize()


@functools.cache
def rounding_function(fmt: Format) -> onnx.FunctionProto:
    """The body ``x [..., K] -> y [..., K]``; ``split`` is [K / size, size]."""
    text = [
        f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">',
        f"{_name(fmt)} <split, clip> (x) => (y) {{",
        "last = Constant <value_ints = [-1]> ()",
        "zero = Constant <value_float = 0.0> ()",
        f"tiny = Constant <value_float = {_SMALLEST!r}> ()",
        "split_ = Constant <value_ints: ints = @split> ()",
        "clip_ = Constant <value_float: float = @clip> ()",
        "whole = Shape (x)",
        "head = Shape <end = -1> (x)",
        "parts = Concat <axis = 0> (head, split_)",
        "g = Reshape <allowzero = 1> (x, parts)",
    ]
    if isinstance(fmt, IntFormat) and not fmt.symmetric:
        text += _asymmetric(fmt)
    else:
        text += ["size = Abs (g)", "amax = ReduceMax <keepdims = 1> (size, last)"]
        if isinstance(fmt, IntFormat):
            text += _symmetric(fmt)
        elif isinstance(fmt, MxFormat):
            text += _mx(fmt)
        elif isinstance(fmt, NvFp4Format):
            text += _nvfp4()
        else:
            assert isinstance(fmt, MiniFloat)
            text += _minifloat(fmt)
    text += ["y = Reshape <allowzero = 1> (restored, whole)", "}"]
    return onnx.parser.parse_function("\n".join(text))


def _number(name: str, value: float) -> str:
    return f"{name} = Constant <value_float = {float(value)!r}> ()"


def _symmetric(fmt: IntFormat) -> list[str]:
    return [
        _number("steps", fmt.qmax - fmt.zero),
        _number("low", fmt.qmin - fmt.zero),
        "reach = Mul (amax, clip_)",
        "step = Div (reach, steps)",
        "scale = Max (step, tiny)",
        "ratio = Div (g, scale)",
        "near = Round (ratio)",
        "code = Clip (near, low, steps)",
        "restored = Mul (code, scale)",
    ]


def _asymmetric(fmt: IntFormat) -> list[str]:
    return [
        _number("steps", fmt.qmax - fmt.qmin),
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
    ]


def _minifloat(fmt: MiniFloat) -> list[str]:
    return [
        _number("top", fmt.max),
        "reach = Mul (amax, clip_)",
        "step = Div (reach, top)",
        "scale = Max (step, tiny)",
        "ratio = Div (g, scale)",
        *_rounded(fmt),
        "restored = Mul (near, scale)",
    ]


def _mx(fmt: MxFormat) -> list[str]:
    """Exponents are estimated by a logarithm and then set right, for it may be off by one."""
    lines = [
        _number("two", 2.0),
        _number("one", 1.0),
        _number("ln2", float(np.log(2.0))),
        _number("reach", fmt.max_exponent),
        _number("floor", -127.0),
        "some = Max (amax, tiny)",
        "log = Log (some)",
        "log2 = Div (log, ln2)",
        "guess = Floor (log2)",
        "power = Pow (two, guess)",
        "twice = Mul (power, two)",
        "is_high = Greater (power, some)",
        "is_low = LessOrEqual (twice, some)",
        f"less = Cast <to = {_FLOAT}> (is_high)",
        f"more = Cast <to = {_FLOAT}> (is_low)",
        "down = Sub (guess, less)",
        "binade = Add (down, more)",
        "first = Sub (binade, reach)",
    ]
    exponent = "first"
    if fmt.scale_rule == "ceil":
        lines += [
            _number("top", fmt.max),
            "first_scale = Pow (two, first)",
            "covered = Mul (top, first_scale)",
            "is_over = Greater (amax, covered)",
            f"carry = Cast <to = {_FLOAT}> (is_over)",
            "second = Add (first, carry)",
        ]
        exponent = "second"
    lines += [
        f"exponent = Max ({exponent}, floor)",
        "scale = Pow (two, exponent)",
        "ratio = Div (g, scale)",
    ]
    element = fmt.float_element
    if element is not None:
        lines += _rounded(element)
    else:
        lines += [
            _number("fraction", 2.0**INT8_FRACTION_BITS),
            _number("highest", INT8_MAX_CODE),
            _number("lowest", -INT8_MAX_CODE),
            "fine = Mul (ratio, fraction)",
            "whole_steps = Round (fine)",
            "kept = Clip (whole_steps, lowest, highest)",
            "near = Div (kept, fraction)",
        ]
    return [*lines, "restored = Mul (near, scale)"]


def _nvfp4() -> list[str]:
    return [
        _number("reach", FP4.max * FP8E4M3.max),
        _number("six", FP4.max),
        "before = Constant <value_ints = [-2]> ()",
        "token_amax = ReduceMax <keepdims = 1> (amax, before)",
        "factor_ = Div (token_amax, reach)",
        "factor = Max (factor_, tiny)",
        "sixth = Div (amax, six)",
        "wide = Div (sixth, factor)",
        f"narrow = Cast <to = {_CASTS['fp8e4m3']}> (wide)",
        f"block_scale = Cast <to = {_FLOAT}> (narrow)",
        "scale = Mul (block_scale, factor)",
        "is_zero = LessOrEqual (scale, zero)",
        "one = Constant <value_float = 1.0> ()",
        "safe = Where (is_zero, one, scale)",
        "ratio = Div (g, safe)",
        *_rounded(FP4),
        "restored = Mul (near, scale)",
    ]


def _rounded(fmt: MiniFloat) -> list[str]:
    """``near``: ``ratio`` rounded to the nearest level, ties to even, saturated."""
    cast = _CASTS.get(str(_plain(fmt)))
    if cast is not None:
        return [
            _number("highest", fmt.max),
            _number("lowest", -fmt.max),
            "kept = Clip (ratio, lowest, highest)",
            f"as_float8 = Cast <to = {cast}> (kept)",
            f"near = Cast <to = {_FLOAT}> (as_float8)",
        ]
    lines = ["magnitude = Abs (ratio)", _number("gap0", fmt.smallest_subnormal)]
    lowest = int(np.log2(fmt.smallest_normal))
    count = fmt.max_exponent - lowest
    for k in range(1, count + 1):
        lines += [
            _number(f"bound{k}", 2.0 ** (lowest + k)),
            _number(f"wider{k}", fmt.smallest_subnormal * 2.0**k),
            f"is_past{k} = GreaterOrEqual (magnitude, bound{k})",
            f"gap{k} = Where (is_past{k}, wider{k}, gap{k - 1})",
        ]
    return [
        *lines,
        _number("highest", fmt.max),
        _number("lowest", -fmt.max),
        f"gaps = Div (ratio, gap{count})",
        "even = Round (gaps)",
        f"level = Mul (even, gap{count})",
        "near = Clip (level, lowest, highest)",
    ]
