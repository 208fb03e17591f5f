"""The integer forms of a float value, and the nodes that bring one form into another.

A value of the float graph has one form of its own and others made from it on demand:

=========  ===================  ==================================================================
form       type                 meaning
=========  ===================  ==================================================================
Acc        int32                x ~ (q + bias) * scale, a scale and a bias for each column or all
Wide       int16                x ~ q * scale
Codes      uint8 or int8        x ~ (q - zero) * scale
=========  ===================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq import custom_ops
from onnxq.custom_ops.integer_check import SCALE_KEY
from onnxq.graph.edit import Names, add_initializer, insert_before
from onnxq.solvers.integer_only import dyadic

Array = npt.NDArray[np.generic]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spec:
    """How a value is coded in 8 bits: ``x ~ (q - zero) * scale``.

    Args:
        scale: worth of a step.
        zero: the code of 0.
        signed: int8 instead of uint8.
    """

    scale: float
    zero: int
    signed: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest code."""
        return (-127, 127) if self.signed else (0, 255)

    @property
    def zero_array(self) -> Array:
        """The zero point as the operators take it."""
        return np.array(self.zero, np.int8 if self.signed else np.uint8)


@dataclass(frozen=True)
class Acc:
    """A sum of products: ``x ~ (q + bias) * scale``; scale and bias ``[N]`` or ``[1]``."""

    value: ir.Value
    scale: Float64
    bias: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Wide:
    """16 bits, or 8 stored in 16: ``x ~ q * scale``."""

    value: ir.Value
    scale: float


@dataclass(frozen=True)
class Codes:
    """8 bits: ``x ~ (q - zero) * scale``."""

    value: ir.Value
    spec: Spec


Form = Acc | Wide | Codes


class Emitter:
    """Makes integer nodes in front of the node that is being replaced.

    Args:
        model: edited in place.
        bits: of the values between operators that are not read by a product, 8 or 16.
    """

    def __init__(self, model: ir.Model, bits: int) -> None:
        self.model = model
        self.graph = model.graph
        self.names = Names(model.graph)
        self.limit = (1 << (bits - 1)) - 1
        self.anchor: ir.Node | None = None
        self.label = ""
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._made: dict[tuple[ir.Value, object], Form] = {}

    def at(self, node: ir.Node, label: str) -> None:
        """What is made from now on goes in front of ``node`` and is named after ``label``."""
        self.anchor, self.label = node, label

    def constant(self, array: Array, what: str) -> ir.Value:
        """An initializer; equal small ones are shared."""
        key = (str(array.dtype), array.tobytes(), array.shape)
        if array.size > 64 or key not in self._constants:
            name = self.names.fresh(f"{self.label}/{what}")
            made = add_initializer(self.graph, name, array)
            if array.size > 64:
                return made
            self._constants[key] = made
        return self._constants[key]

    def standard(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        dtype: ir.DataType | None = None,
        outputs: int = 1,
    ) -> ir.Node:
        """A node of the default domain."""
        node = ir.node(op_type, inputs, attributes or {}, num_outputs=outputs)  # type: ignore[arg-type]
        return self._insert(node, dtype)

    def own(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, int],
        dtype: ir.DataType,
        scale: float,
    ) -> ir.Value:
        """A node of one of our operators; the worth of a step is written beside it."""
        custom_ops.attach(self.model, op_type)
        node = custom_ops.make_node(op_type, inputs, attributes)
        node.metadata_props[SCALE_KEY] = repr(float(scale))
        return self._insert(node, dtype).outputs[0]

    def _insert(self, node: ir.Node, dtype: ir.DataType | None) -> ir.Node:
        assert self.anchor is not None
        node.name = self.names.fresh(f"{self.label}/{node.op_type}")
        for output in node.outputs:
            output.name = self.names.fresh(f"{node.name}_output")
            output.type = None if dtype is None else ir.TensorType(dtype)
        insert_before(self.anchor, node)
        return node

    # From one form to another ---------------------------------------------------------------------

    def factors(self, ratio: npt.ArrayLike) -> list[ir.Value]:
        """Dyadic multiplier and shift as constants ``[N]`` or ``[1]``."""
        multiplier, shift = one_shift(np.atleast_1d(np.asarray(ratio, np.float64)))
        return [self.constant(multiplier, "multiplier"), self.constant(shift, "shift")]

    def linear_inputs(self, form: Form, scale: float) -> list[ir.Value]:
        """x, bias, multiplier, shift: what brings ``form`` to steps of ``scale``."""
        if isinstance(form, Codes):
            wide = self.standard("Cast", [form.value], {"to": int(ir.DataType.INT32)})
            wide.outputs[0].type = ir.TensorType(ir.DataType.INT32)
            form = Acc(
                wide.outputs[0],
                np.array([form.spec.scale]),
                np.array([-form.spec.zero], np.int32),
            )
        if isinstance(form, Wide):
            form = Acc(form.value, np.array([form.scale]), np.zeros(1, np.int32))
        bias = self.constant(form.bias, "bias")
        return [form.value, bias, *self.factors(form.scale / scale)]

    def codes(self, form: Form, spec: Spec, *, low: int | None = None) -> Codes:
        """``form`` in 8 bits as ``spec`` says, with ``low`` for the least code if given."""
        if isinstance(form, Codes) and form.spec == spec and low is None:
            return form
        key = (form.value, (spec, low, _worth(form)))
        if key not in self._made:
            least, most = spec.limits
            attributes = {"low": least if low is None else low, "high": most}
            zero = self.constant(spec.zero_array, "zero_point")
            inputs = [*self.linear_inputs(form, spec.scale), zero]
            dtype = ir.DataType.INT8 if spec.signed else ir.DataType.UINT8
            value = self.own("Requantize", inputs, attributes, dtype, spec.scale)
            self._made[key] = Codes(value, spec)
        made = self._made[key]
        assert isinstance(made, Codes)
        return made

    def wide(self, form: Form, amax: float) -> Wide:
        """``form`` in 16 bits (or what ``bits`` says), for values up to ``amax``."""
        if isinstance(form, Wide):
            return form
        scale = self.wide_scale(amax)
        key = (form.value, ("wide", scale, _worth(form)))
        if key not in self._made:
            zero = self.constant(np.array(0, np.int16), "zero_point")
            inputs = [*self.linear_inputs(form, scale), zero]
            value = self.own("Requantize", inputs, self.wide_limits, ir.DataType.INT16, scale)
            self._made[key] = Wide(value, scale)
        made = self._made[key]
        assert isinstance(made, Wide)
        return made

    def wide_scale(self, amax: float) -> float:
        """The step of a wide value that reaches ``amax``."""
        return max(amax, 1e-6) / self.limit

    @property
    def wide_limits(self) -> dict[str, int]:
        """The attributes low and high of operators that write wide values."""
        return {"low": -self.limit, "high": self.limit}


def one_shift(ratio: Float64) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Dyadic factors over one power of two where every mantissa keeps 24 bits: kernels like it."""
    multiplier, shift = dyadic(ratio)
    least = int(shift.min())
    if int(shift.max()) - least > 6:
        return multiplier, shift
    common = np.clip(np.rint(ratio * 2.0**least), -(2.0**31) + 1, 2.0**31 - 1)
    return np.asarray(common, np.int32), np.array([least], np.int32)


def _worth(form: Form) -> object:
    """What tells forms of one value apart that differ in scale only."""
    if isinstance(form, Acc):
        return form.scale.tobytes(), form.bias.tobytes()
    return form.scale if isinstance(form, Wide) else form.spec
