"""Products whose input is split by columns, each part with a range of its own or in float.

::

    y = sum over parts p of  f_p(x[.., columns_p]) W[columns_p, :]

with f_p rounding to codes or leaving floats. The integer parts share the weight's scales, so that
the split costs no weight. Columns that lie side by side are taken by Slice, others by Gather. In
the static form onnxruntime fuses each integer part into one integer product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.errors import InternalError, PreconditionError
from onnxq.formats import affine_params
from onnxq.graph.edit import Names, add_initializer, insert_before, replace_value
from onnxq.graph.match import Linear
from onnxq.passes.lower.weights import (
    QuantizedWeight,
    integer_format,
    quantize_weight,
    weight_as_read,
)
from onnxq.passes.plan import InputPart, SitePlan

Float = npt.NDArray[np.float32]


def lower_parts(model: ir.Model, linear: Linear, site: SitePlan) -> str:
    """Replace the product of ``linear`` by one a part; its bias stays where it is.

    Raises:
        InternalError: the parts do not cover the columns, each once.
    """
    return _PartLowering(model, linear, site).run()


class _PartLowering:
    def __init__(self, model: ir.Model, linear: Linear, site: SitePlan) -> None:
        columns = sorted(c for part in site.parts for c in part.columns)
        if columns != list(range(linear.in_features)) or site.weight is None:
            raise InternalError("PLAN-PARTS", f"{site.site}: its parts are not a partition")
        self._graph = model.graph
        self._names = Names(model.graph)
        self._linear, self._site = linear, site
        self._nodes: list[ir.Node] = []
        self._shared: tuple[ir.Value, ir.Value] | None = None
        x = linear.node.inputs[1 - linear.weight_index]
        if x is None:
            raise InternalError("STALE-MATCH", f"{site.site} reads nothing")
        self._x = x
        array, in_axis, _ = weight_as_read(linear)
        self._weight: Float = array if in_axis == 0 else np.ascontiguousarray(array.T)

    def run(self) -> str:
        """Insert the products and their sum; what was done, in words."""
        linear, weight_plan = self._linear, self._site.weight
        assert weight_plan is not None
        coded = [c for part in self._site.parts if not part.is_float for c in part.columns]
        weight = quantize_weight(self._weight[coded], weight_plan, in_axis=0, out_axis=1)
        place = {column: row for row, column in enumerate(coded)}
        terms = []
        for number, part in enumerate(self._site.parts):
            base = f"{linear.name}_part{number}"
            x = self._columns(part.columns, base)
            if part.is_float:
                rows = self._constant(f"{base}_weight", self._weight[list(part.columns)])
                terms.append(self._op("MatMul", [x, rows], base))
                continue
            rows_of = [place[column] for column in part.columns]
            multiply = self._static if self._site.mode == "static" else self._dynamic
            terms.append(multiply(x, part, weight, rows_of, base))
        total = terms[0]
        for number, term in enumerate(terms[1:]):
            total = self._op("Add", [total, term], f"{linear.name}_sum{number}")
        old = linear.node.outputs[0]
        total.type, total.shape = old.type, old.shape
        insert_before(linear.node, self._nodes)
        replace_value(old, total)
        self._graph.remove(linear.node, safe=True)
        floats = sum(len(part.columns) for part in self._site.parts if part.is_float)
        groups = sum(not part.is_float for part in self._site.parts)
        what = f"{weight_plan.format} in {groups} parts of the input"
        return f"{what}, {floats} columns in float" if floats else what

    def _columns(self, columns: Sequence[int], base: str) -> ir.Value:
        first, last = columns[0], columns[-1]
        if len(columns) == self._linear.in_features and list(columns) == list(range(len(columns))):
            return self._x
        if list(columns) == list(range(first, last + 1)):
            bounds = [
                self._constant(f"{base}_{name}", np.array([value], np.int64))
                for name, value in (("begin", first), ("end", last + 1), ("axis", -1))
            ]
            return self._op("Slice", [self._x, *bounds], base)
        indices = self._constant(f"{base}_columns", np.array(columns, np.int64))
        return self._op("Gather", [self._x, indices], base, {"axis": -1})

    def _static(
        self, x: ir.Value, part: InputPart, weight: QuantizedWeight, rows: list[int], base: str
    ) -> ir.Value:
        fmt = integer_format(part.format)
        scale, zero = affine_params(part.lo, part.hi, fmt, symmetric=part.symmetric)
        params = [
            self._constant(f"{base}_scale", np.asarray(scale)),
            self._constant(f"{base}_zero_point", np.asarray(zero)),
        ]
        codes = self._op("QuantizeLinear", [x, *params], base)
        exact = self._op("DequantizeLinear", [codes, *params], base)
        inputs = self._weight_inputs(weight, rows, base)
        axis = {} if weight.axis is None else {"axis": 1}
        decoded = self._op("DequantizeLinear", inputs, f"{base}_weight", axis)
        return self._op("MatMul", [exact, decoded], base)

    def _dynamic(
        self, x: ir.Value, part: InputPart, weight: QuantizedWeight, rows: list[int], base: str
    ) -> ir.Value:
        quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
        quantize.name = self._names.fresh(f"{base}_DynamicQuantizeLinear")
        for out, what in zip(quantize.outputs, ("quantized", "scale", "zero_point"), strict=True):
            out.name = self._names.fresh(f"{base}_{what}")
        self._nodes.append(quantize)
        codes, scale, zero = self._weight_inputs(weight, rows, base)
        integers = [quantize.outputs[0], codes, quantize.outputs[2], zero]
        product = self._op("MatMulInteger", integers, base)
        scales = self._op("Mul", [quantize.outputs[1], scale], f"{base}_scales")
        cast = self._op("Cast", [product], base, {"to": ir.DataType.FLOAT})
        return self._op("Mul", [cast, scales], base)

    def _weight_inputs(
        self, weight: QuantizedWeight, rows: list[int], base: str
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes of some rows, with the scales and zero points of all."""
        fmt = integer_format(self._site.weight.format) if self._site.weight else None
        dtype = weight.codes.dtype if fmt is None else fmt.numpy_dtype
        return (
            self._constant(f"{base}_weight_quantized", weight.codes[rows].astype(dtype)),
            *self._scales(weight),
        )

    def _scales(self, weight: QuantizedWeight) -> tuple[ir.Value, ir.Value]:
        """Scales and zero points of the weight, stored once for all parts."""
        if self._shared is None:
            base = f"{self._linear.name}_weight"
            self._shared = (
                self._constant(f"{base}_scale", weight.scale),
                self._constant(f"{base}_zero_point", weight.zero_point),
            )
        return self._shared

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return add_initializer(self._graph, self._names.fresh(name), array)

    def _op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        base: str,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=self._names.fresh(f"{base}_{op_type}"))
        node.outputs[0].name = self._names.fresh(f"{base}_{op_type}_output")
        self._nodes.append(node)
        return node.outputs[0]


def refuse_rounded(site: SitePlan) -> None:
    """A solver's codes stand for the whole weight, at scales that the parts do not have.

    Raises:
        PreconditionError: always.
    """
    raise PreconditionError(
        "PASS-PARTS",
        f"`qdq`: {site.site} is split into parts, and a solver rounded it whole",
        "leave the solver out for it (layers=...), or the pass that split it",
    )
