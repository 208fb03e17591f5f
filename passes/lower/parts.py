"""Products whose input is split by columns, each part with a range of its own or in float.

::

    y = sum over parts p of  f_p(x[.., columns_p]) W[columns_p, :]

with f_p rounding to codes or leaving floats. The integer parts share the weight's scales, so that
the split costs no weight, and layers that split one value alike share the split and the rounding.
One Gather puts the columns in the order of the parts, if they are not in it, and one Split takes
them apart. In the static form onnxruntime fuses each integer part into one integer product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.errors import InternalError, PreconditionError
from onnxq.formats import affine_params
from onnxq.graph.edit import (
    Names,
    add_initializer,
    insert_after,
    insert_before,
    replace_value,
)
from onnxq.graph.match import Linear
from onnxq.passes.lower.weights import (
    integer_format,
    quantize_weight,
    weight_as_read,
)
from onnxq.passes.plan import InputPart, SitePlan

Float = npt.NDArray[np.float32]
Columns = tuple[tuple[int, ...], ...]
"""Of each part."""
_Rounded = tuple[ir.Value, ...]
"""A part as a product reads it: floats, or codes, scale and zero point."""


class PartLowering:
    """Lowers the split sites of one model; layers that split one value alike share the split.

    Args:
        model: is changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = Names(model.graph)
        self._splits: dict[tuple[ir.Value, Columns], list[ir.Value]] = {}
        self._rounded: dict[tuple[ir.Value, str, tuple[InputPart, ...]], list[_Rounded]] = {}

    def lower(self, linear: Linear, site: SitePlan) -> str:
        """Replace the product of ``linear`` by one a part; its bias stays where it is.

        Returns:
            What was done, in words.

        Raises:
            InternalError: the parts do not cover the columns, each once.
        """
        columns = sorted(c for part in site.parts for c in part.columns)
        if columns != list(range(linear.in_features)) or site.weight is None:
            raise InternalError("PLAN-PARTS", f"{site.site}: its parts are not a partition")
        x = linear.node.inputs[1 - linear.weight_index]
        if x is None:
            raise InternalError("STALE-MATCH", f"{site.site} reads nothing")
        parts = self._parts(x, site)
        nodes: list[ir.Node] = []
        terms = self._terms(linear, site, parts, nodes)
        total = terms[0]
        for term in terms[1:]:
            total = self._op(nodes, "Add", [total, term], f"{linear.name}_sum")
        old = linear.node.outputs[0]
        total.type, total.shape = old.type, old.shape
        insert_before(linear.node, nodes)
        replace_value(old, total)
        self._graph.remove(linear.node, safe=True)
        floats = sum(len(part.columns) for part in site.parts if part.is_float)
        groups = sum(not part.is_float for part in site.parts)
        what = f"{site.weight.format} in {groups} parts of the input"
        return f"{what}, {floats} columns in float" if floats else what

    def _terms(
        self, linear: Linear, site: SitePlan, parts: list[_Rounded], nodes: list[ir.Node]
    ) -> list[ir.Value]:
        """One product a part, their nodes added to ``nodes``."""
        array, in_axis, _ = weight_as_read(linear)
        rows: Float = array if in_axis == 0 else np.ascontiguousarray(array.T)
        assert site.weight is not None
        coded = [c for part in site.parts if not part.is_float for c in part.columns]
        weight = quantize_weight(rows[coded], site.weight, in_axis=0, out_axis=1)
        dtype = integer_format(site.weight.format).numpy_dtype
        shared = self._constant("ws", weight.scale), self._constant("wz", weight.zero_point)
        place = {column: row for row, column in enumerate(coded)}
        terms = []
        for number, (part, x) in enumerate(zip(site.parts, parts, strict=True)):
            base = f"{linear.name}_part{number}"
            if part.is_float:
                exact = self._constant("w", rows[list(part.columns)])
                terms.append(self._op(nodes, "MatMul", [x[0], exact], base))
                continue
            own = weight.codes[[place[column] for column in part.columns]].astype(dtype)
            inputs = (self._constant("w", own), *shared)
            if site.mode == "static":
                axis = {} if weight.axis is None else {"axis": 1}
                decoded = self._op(nodes, "DequantizeLinear", inputs, f"{base}_weight", axis)
                terms.append(self._op(nodes, "MatMul", [x[0], decoded], base))
            else:
                terms.append(self._integer_product(nodes, x, inputs, base))
        return terms

    def _integer_product(
        self,
        nodes: list[ir.Node],
        x: _Rounded,
        weight: tuple[ir.Value, ir.Value, ir.Value],
        base: str,
    ) -> ir.Value:
        """The product of codes, whose scale is known at run time."""
        codes, scale, zero = x
        product = self._op(nodes, "MatMulInteger", [codes, weight[0], zero, weight[2]], base)
        scales = self._op(nodes, "Mul", [scale, weight[1]], f"{base}_scales")
        cast = self._op(nodes, "Cast", [product], base, {"to": ir.DataType.FLOAT})
        return self._op(nodes, "Mul", [cast, scales], base)

    def _parts(self, x: ir.Value, site: SitePlan) -> list[_Rounded]:
        """The parts of ``x`` as products read them: floats, or codes with scale and zero point."""
        key = (x, site.mode, site.parts)
        if key not in self._rounded:
            nodes: list[ir.Node] = []
            columns = self._columns(x, tuple(part.columns for part in site.parts), nodes)
            round_one = self._static if site.mode == "static" else self._dynamic
            self._rounded[key] = [
                (each,) if part.is_float else round_one(nodes, each, part)
                for part, each in zip(site.parts, columns, strict=True)
            ]
            if nodes:
                insert_after(_last_writer(columns, nodes, x), nodes)
        return self._rounded[key]

    def _columns(self, x: ir.Value, columns: Columns, nodes: list[ir.Node]) -> list[ir.Value]:
        """``x`` taken apart: its channels put in the order of the parts, then split."""
        if len(columns) == 1 and columns[0] == tuple(range(len(columns[0]))):
            return [x]
        if (x, columns) not in self._splits:
            order = [column for part in columns for column in part]
            sorted_x = x
            if order != list(range(len(order))):
                index = self._constant("columns", np.array(order, np.int32))
                sorted_x = self._op(nodes, "Gather", [x, index], f"{x.name}_sorted", {"axis": -1})
            sizes = self._constant("sizes", np.array([len(part) for part in columns], np.int64))
            split = ir.node(
                "Split",
                [sorted_x, sizes],
                {"axis": -1},
                num_outputs=len(columns),
                name=self._names.fresh(f"{x.name}_parts"),
            )
            for out in split.outputs:
                out.name = self._names.fresh("part")
            nodes.append(split)
            self._splits[x, columns] = list(split.outputs)
        return self._splits[x, columns]

    def _static(self, nodes: list[ir.Node], x: ir.Value, part: InputPart) -> _Rounded:
        fmt = integer_format(part.format)
        scale, zero = affine_params(part.lo, part.hi, fmt, symmetric=part.symmetric)
        params = [
            self._constant("scale", np.asarray(scale)),
            self._constant("zero", np.asarray(zero)),
        ]
        codes = self._op(nodes, "QuantizeLinear", [x, *params], f"{x.name}_q")
        return (self._op(nodes, "DequantizeLinear", [codes, *params], f"{x.name}_dq"),)

    def _dynamic(self, nodes: list[ir.Node], x: ir.Value, part: InputPart) -> _Rounded:
        quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
        quantize.name = self._names.fresh(f"{x.name}_q")
        for out in quantize.outputs:
            out.name = self._names.fresh("part")
        nodes.append(quantize)
        codes, scale, zero = quantize.outputs
        return codes, scale, zero

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return add_initializer(self._graph, self._names.fresh(f"parts_{name}"), array)

    def _op(
        self,
        nodes: list[ir.Node],
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        """A node more. Its output gets a short name: there are thousands of them."""
        node = ir.node(op_type, inputs, attributes, name=self._names.fresh(name))
        node.outputs[0].name = self._names.fresh("part")
        nodes.append(node)
        return node.outputs[0]


def _last_writer(columns: list[ir.Value], nodes: list[ir.Node], x: ir.Value) -> ir.Value:
    """Behind what ``nodes`` are put: a split made for another layer, or ``x``."""
    made = set(nodes)
    return next((c for c in columns if c is not x and c.producer() not in made), x)


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
