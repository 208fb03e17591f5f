"""Integer operators for the functions between the products, with constants from their scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxq.graph.match import Activation, Norm
from onnxq.passes.lower.integer_forms import Codes, Emitter, Form, Spec, Wide
from onnxq.solvers.integer_only import (
    dyadic,
    erf_constants,
    exp_constants,
    min_erf_scale,
    min_exp_scale,
)

_TABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
_SQRT2 = 1.4142  # as I-BERT's code has it


@dataclass(frozen=True)
class Options:
    """What the pass can be told; see :class:`onnxq.passes.lower.integer_only.IntegerOnly`."""

    polynomial: int
    softmax_bits: int
    softmax_rounding: int
    residual_bits: int


class FunctionLowering:
    """Emits functions.

    Args:
        emitter: where nodes go.
        options: degrees and widths.
    """

    def __init__(self, emitter: Emitter, options: Options) -> None:
        self._emitter = emitter
        self._options = options

    @property
    def degree(self) -> int:
        """Of the polynomials."""
        return self._options.polynomial

    def embedding(self, indices: ir.Value, table: np.ndarray, amax: float) -> Wide:
        """Rows of 8 bits with a scale each, brought to one scale."""
        emitter = self._emitter
        row = np.maximum(np.abs(table).max(axis=1).astype(np.float64), 1e-12) / 127
        codes = np.rint(table / row[:, None]).astype(np.int8)
        scale = emitter.wide_scale(amax)
        multiplier, shift = common_shift(row / scale)
        if indices.dtype != ir.DataType.INT64:
            to = {"to": int(ir.DataType.INT64)}
            indices = emitter.standard("Cast", [indices], to).outputs[0]
        inputs = [
            indices,
            emitter.constant(codes, "table"),
            emitter.constant(multiplier, "multiplier"),
        ]
        attributes = {"shift": shift, **emitter.wide_limits}
        value = emitter.own("IntegerEmbedding", inputs, attributes, ir.DataType.INT16, scale)
        return Wide(value, scale)

    def add(self, left: Form, right: Wide, amax: float) -> Wide:
        """The sum at a scale that reaches ``amax``."""
        emitter = self._emitter
        scale = emitter.wide_scale(amax)
        factors = emitter.factors(right.scale / scale)
        inputs = [*emitter.linear_inputs(left, scale), right.value, *factors]
        value = emitter.own("IntegerAdd", inputs, emitter.wide_limits, ir.DataType.INT16, scale)
        return Wide(value, scale)

    def norm(self, norm: Norm, x: Wide, amax: float) -> Wide:
        """LayerNorm or RMSNorm; gamma and beta at the scale of the output."""
        emitter = self._emitter
        scale = emitter.wide_scale(amax)
        features = norm.features
        ratio = norm.g.astype(np.float64) * math.sqrt(features) / 2.0**30 / scale
        multiplier, shift = common_shift(ratio)
        inputs = [x.value, emitter.constant(multiplier, "multiplier")]
        if norm.kind == "layernorm":
            beta = np.zeros(features) if norm.b is None else norm.b.astype(np.float64)
            # Beyond the range of y it makes no difference how far.
            steps = np.clip(beta / scale, -(2.0**16), 2.0**16)
            room = min(shift, 61 - 17)
            if room < shift:
                multiplier, shift = np.rint(ratio * 2.0**room).astype(np.int32), room
                inputs[1] = emitter.constant(multiplier, "multiplier")
            inputs.append(emitter.constant(np.rint(steps * 2.0**shift).astype(np.int64), "beta"))
        attributes = {
            "shift": 0,
            "epsilon": min(round(norm.epsilon * features / x.scale**2), 1 << 60),
            "out_shift": shift,
            **emitter.wide_limits,
        }
        op_type = "IntegerLayerNorm" if norm.kind == "layernorm" else "IntegerRmsNorm"
        value = emitter.own(op_type, inputs, attributes, ir.DataType.INT16, scale)
        return Wide(value, scale)

    def softmax(self, scores: ir.Value, mask: ir.Value, scale: float) -> Codes:
        """Probabilities in steps of 2^-bits."""
        bits = self._options.softmax_bits
        attributes = {
            **exp_constants(scale, self.degree).attributes(),
            "bits": bits,
            "rounding": self._options.softmax_rounding,
        }
        spec = Spec(2.0**-bits, 0)
        value = self._emitter.own(
            "IntegerSoftmax", [scores, mask], attributes, ir.DataType.UINT8, spec.scale
        )
        return Codes(value, spec)

    def activation(
        self, match: Activation, form: Form, amax: float, out: Spec | float
    ) -> Codes | Wide | None:
        """The activation function; None if it has no integer form.

        Args:
            match: what to compute.
            form: of its input.
            amax: the input's largest magnitude.
            out: how the readers want it in 8 bits, or the largest magnitude of a wide output.
        """
        if match.kind in ("gelu", "gelu_tanh"):
            return self._gelu(form, amax, out)
        if match.kind in ("silu", "quick_gelu"):
            return self._silu(form, amax, out, 1.702 if match.kind == "quick_gelu" else 1.0)
        if match.kind == "relu":
            return self._relu(form, out)
        if match.kind in _TABLES:
            return self._table(match.kind, form, amax, out)
        return None

    def _relu(self, form: Form, out: Spec | float) -> Codes | Wide:
        if isinstance(out, Spec):
            return self._emitter.codes(form, out, low=out.zero)
        emitter = self._emitter
        scale = emitter.wide_scale(out)
        zero = emitter.constant(np.array(0, np.int16), "zero_point")
        inputs = [*emitter.linear_inputs(form, scale), zero]
        attributes = {**emitter.wide_limits, "low": 0}
        return Wide(emitter.own("Requantize", inputs, attributes, ir.DataType.INT16, scale), scale)

    def _gelu(self, form: Form, amax: float, out: Spec | float) -> Codes | Wide:
        least = min_erf_scale(self.degree) * _SQRT2 * (1 + 1e-9)
        scale = max(amax / 32767, least)
        constants = erf_constants(scale / _SQRT2, self.degree)
        attributes = {
            **constants.attributes(),
            "one": constants.one,
            **self._output(scale * constants.scale / 2, out),
        }
        return self._linear_function("IntegerGelu", form, scale, attributes, out)

    def _silu(self, form: Form, amax: float, out: Spec | float, slope: float) -> Codes | Wide:
        # x sigmoid(slope x) is SiLU of slope x, over slope.
        scale = max(amax * slope / 32767, min_exp_scale() * (1 + 1e-6))
        constants = exp_constants(scale, self.degree).attributes()
        constants["exp_multiplier"] = constants.pop("multiplier")
        constants["exp_shift"] = constants.pop("shift")
        attributes = {**constants, **self._output(scale * 2.0**-15 / slope, out)}
        return self._linear_function("IntegerSilu", form, scale / slope, attributes, out)

    def _linear_function(
        self, op_type: str, form: Form, scale: float, attributes: dict[str, int], out: Spec | float
    ) -> Codes | Wide:
        emitter = self._emitter
        array = out.zero_array if isinstance(out, Spec) else np.array(0, np.int16)
        inputs = [*emitter.linear_inputs(form, scale), emitter.constant(array, "zero_point")]
        if not isinstance(out, Spec):
            worth = emitter.wide_scale(out)
            return Wide(emitter.own(op_type, inputs, attributes, ir.DataType.INT16, worth), worth)
        dtype = ir.DataType.INT8 if out.signed else ir.DataType.UINT8
        return Codes(emitter.own(op_type, inputs, attributes, dtype, out.scale), out)

    def _output(self, ratio: float, out: Spec | float) -> dict[str, int]:
        """The attributes that bring a product worth ``ratio`` a step to the output."""
        step = self._emitter.wide_scale(out) if not isinstance(out, Spec) else out.scale
        multiplier, shift = dyadic(ratio / step)
        limits = self._emitter.wide_limits
        if isinstance(out, Spec):
            limits = dict(zip(("low", "high"), out.limits, strict=True))
        return {"out_multiplier": int(multiplier), "out_shift": int(shift), **limits}

    def _table(self, kind: str, form: Form, amax: float, out: Spec | float) -> Codes | Wide:
        """A function of 8 bits is a table of 256 codes."""
        emitter = self._emitter
        spec = Spec(max(amax, 1e-6) / 127, 128)
        x = emitter.codes(form, spec)
        exact = _TABLES[kind]((np.arange(256) - spec.zero) * spec.scale)
        if isinstance(out, Spec):
            codes = np.clip(np.rint(exact / out.scale) + out.zero, *out.limits)
            table = emitter.constant(codes.astype(out.zero_array.dtype), "table")
        else:
            wide = emitter.wide_scale(out)
            codes = np.clip(np.rint(exact / wide), -emitter.limit, emitter.limit)
            table = emitter.constant(codes.astype(np.int16), "table")
        to = {"to": int(ir.DataType.INT32)}
        index = emitter.standard("Cast", [x.value], to).outputs[0]
        value = emitter.standard("Gather", [table, index], {"axis": 0}).outputs[0]
        value.type = table.type
        return Codes(value, out) if isinstance(out, Spec) else Wide(value, wide)


def common_shift(ratio: np.ndarray) -> tuple[np.ndarray, int]:
    """Multipliers ``[N]`` over one power of two; the largest has 31 bits."""
    _, shift = dyadic(np.abs(ratio).max())
    multiplier = np.clip(np.rint(ratio * 2.0 ** int(shift)), -(2**31) + 1, 2**31 - 1)
    return multiplier.astype(np.int32), int(shift)
