"""Proves of a model that it computes in integers alone, and that no accumulator can overflow.

Every value gets an interval, from its type or from what its writer can make of its inputs; sums of
products with constant weights column by column, exactly. A sum that could leave int32, a float
anywhere but at the two ends, and an operator of unknown meaning are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.custom_ops.integer_bounds import (
    Interval,
    combined,
    erf_range,
    exp_range,
    interval,
    of_constant,
)
from onnxq.custom_ops.integer_report import IntegerReport, Row
from onnxq.custom_ops.registry import DOMAIN, get
from onnxq.errors import PreconditionError
from onnxq.graph.match.values import (
    attr_int,
    const_array,
    is_op,
    node_label,
    op_domain,
    static_shape,
    value_name,
)

Array = np.ndarray[Any, Any]

INT32 = (-(2**31), 2**31 - 1)
SCALE_KEY = "onnxq.scale"
"""Node metadata: what a step of the first output is worth."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
_MOVES = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Slice", "Gather",
    "Expand", "Split", "Tile", "Dropout",
)  # fmt: skip
_SHAPE_OPS = ("Shape", "Size", "Range", "ConstantOfShape", "Constant", "NonZero")
_BOOLEAN = (
    "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Xor",
)  # fmt: skip


_LIMITS = {
    "ln2": (1, 1 << 16),
    "bound": (1, 1 << 15),
    "erf_shift": (0, 31),
    **dict.fromkeys(("multiplier", "exp_multiplier"), (1, INT32[1])),
    **dict.fromkeys(("shift", "exp_shift"), (14, 46)),
    **{f"s{i}": (0, 31) for i in range(4)},
}
"""What the operators with a polynomial take, where it is less than int32."""


def check_integer_only(model: ir.Model, *, max_extent: int | None = None) -> IntegerReport:
    """Prove that ``model`` is integer-only, or say what it is that is not.

    Args:
        model: is not changed.
        max_extent: the largest extent of a dynamic axis, for sums of products over one.

    Raises:
        PreconditionError: ``CHECK-INTEGER-FLOAT``, a float between the first quantize and the last
            dequantize; ``CHECK-INTEGER-OVERFLOW``, a sum can leave int32;
            ``CHECK-INTEGER-EXTENT``, a bound hangs on a dynamic extent, and ``max_extent`` is not
            given; ``CHECK-INTEGER-OPERATOR``, an operator whose integers are not known.
    """
    return _Prover(model, max_extent).run()


class _Prover:
    def __init__(self, model: ir.Model, max_extent: int | None) -> None:
        self._graph = model.graph
        self._max_extent = max_extent
        self._intervals: dict[ir.Value, Interval] = {}
        self._dtypes: dict[ir.Value, ir.DataType | None] = {}
        self._report = IntegerReport()
        self._own: Mapping[str, Callable[[ir.Node], tuple[Interval, int | None]]] = {
            "Requantize": lambda n: (self._limits(n), self._biased(n)),
            "IntegerGelu": self._gelu,
            "IntegerSilu": self._silu,
            "IntegerAdd": lambda n: (self._limits(n), self._biased(n)),
            "IntegerEmbedding": lambda n: (self._limits(n), None),
            "IntegerLayerNorm": lambda n: (self._limits(n), None),
            "IntegerRmsNorm": lambda n: (self._limits(n), None),
            "IntegerExp": lambda n: (self._exp(n), None),
            "IntegerErf": lambda n: (self._erf(n), None),
            "IntegerSqrt": lambda _: (interval(0, (1 << 31) - 1), None),
            "IntegerSoftmax": self._softmax,
        }

    def run(self) -> IntegerReport:
        for value in self._graph.inputs:
            self._dtypes[value] = value.dtype
        for node in self._graph:
            self._visit(node)
        for output in self._graph.outputs:
            writer = output.producer()
            is_float = self._dtype(output) in _FLOATS
            if is_float and not is_op(writer, "DequantizeLinear"):
                raise _float(writer, output)
        if not any(row.op == "MatMulInteger" or row.op in self._own for row in self._report.rows):
            raise PreconditionError(
                "CHECK-INTEGER-OPERATOR",
                "the model has no integer product and none of our integer operators",
                "make it with `onnxq run --passes ibert`",
            )
        return self._report

    # Types and constants --------------------------------------------------------------------------

    def _dtype(self, value: ir.Value | None) -> ir.DataType | None:
        if value is None:
            return None
        if value in self._dtypes:
            return self._dtypes[value]
        if value.const_value is not None:
            return value.const_value.dtype
        return value.dtype

    def _range(self, value: ir.Value | None) -> Interval:
        """What ``value`` can hold; of constants column by column."""
        assert value is not None
        if value not in self._intervals:
            array = const_array(value)
            dtype = self._dtype(value)
            if array is not None and array.dtype.kind in "iub" and array.size:
                self._intervals[value] = of_constant(array)
            elif dtype == ir.DataType.BOOL:
                self._intervals[value] = interval(0, 1)
            elif dtype is not None and dtype.is_integer():
                info = np.iinfo(dtype.numpy())
                self._intervals[value] = interval(int(info.min), int(info.max))
            else:
                raise _unknown(value.producer(), f"nothing is known of `{value_name(value)}`")
        return self._intervals[value]

    # The walk -------------------------------------------------------------------------------------

    def _visit(self, node: ir.Node) -> None:
        floats = [v for v in node.inputs if v is not None and self._dtype(v) in _FLOATS]
        if is_op(node, "QuantizeLinear"):
            if not node.inputs[0] or not node.inputs[0].is_graph_input():
                raise _float(node, node.inputs[0])
            self._report.quantize += 1
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            self._write(node, self._dtype(zero) or ir.DataType.UINT8)
        elif is_op(node, "DequantizeLinear"):
            if not node.outputs[0].is_graph_output() or node.outputs[0].uses():
                raise _float(node, node.outputs[0])
            self._report.dequantize += 1
            self._dtypes[node.outputs[0]] = ir.DataType.FLOAT
        elif floats:
            raise _float(node, floats[0])
        elif op_domain(node) == DOMAIN and node.op_type in self._own:
            made, accumulator = self._own[node.op_type](node)
            self._write(node, self._dtype_of_own(node), made)
            self._record(node, accumulator)
        elif is_op(node, "MatMulInteger"):
            made = self._product(node)
            self._write(node, ir.DataType.INT32, made)
            self._record(node, max(map(abs, made.extremes)))
        elif op_domain(node) == "":
            self._standard(node)
        else:
            raise _unknown(node, "it is none of the operators that are known to be integer")

    def _write(self, node: ir.Node, dtype: ir.DataType, made: Interval | None = None) -> None:
        for output in node.outputs:
            self._dtypes[output] = dtype
            if made is not None:
                self._intervals[output] = made

    def _record(self, node: ir.Node, accumulator: int | None) -> None:
        output = node.outputs[0]
        dtype = self._dtypes[output]
        lo, hi = self._range(output).extremes
        scale = node.metadata_props.get(SCALE_KEY)
        self._report.rows.append(
            Row(
                node_label(node),
                node.op_type,
                "" if dtype is None else dtype.name.lower(),
                None if scale is None else float(scale),
                lo,
                hi,
                accumulator,
            )
        )
        if accumulator is not None:
            _within_int32(node, "its sum", accumulator)

    def _dtype_of_own(self, node: ir.Node) -> ir.DataType:
        typed = {"Requantize": 4, "IntegerGelu": 4, "IntegerSilu": 4}.get(node.op_type)
        if typed is not None:
            return self._dtype(node.inputs[typed]) or ir.DataType.INT8
        fixed = {"IntegerSoftmax": ir.DataType.UINT8, "IntegerSqrt": ir.DataType.INT64}
        if node.op_type in ("IntegerExp", "IntegerErf"):
            return ir.DataType.INT32
        return fixed.get(node.op_type, ir.DataType.INT16)

    def _standard(self, node: ir.Node) -> None:
        if is_op(node, "Cast"):
            self._cast(node)
        elif is_op(node, *_MOVES):
            self._move(node)
        elif is_op(node, *_BOOLEAN):
            self._write(node, ir.DataType.BOOL)
        elif is_op(node, *_SHAPE_OPS):
            array = const_array(node.outputs[0])
            floats = array is not None and array.dtype.kind == "f"
            self._write(node, ir.DataType.FLOAT if floats else ir.DataType.INT64)
        elif is_op(node, "Add", "Sub", "Mul", "Where", "Concat", "Min", "Max", "Div", "Mod"):
            self._arithmetic(node)
        else:
            raise _unknown(node, "it is none of the operators that are known to be integer")

    def _cast(self, node: ir.Node) -> None:
        dtype = ir.DataType(attr_int(node, "to", 0))
        if dtype in _FLOATS:
            raise _float(node, node.outputs[0])
        source = self._range(node.inputs[0])
        if dtype == ir.DataType.BOOL:
            self._write(node, dtype)
            return
        info = np.iinfo(dtype.numpy())
        lo, hi = source.extremes
        fits = lo >= info.min and hi <= info.max
        self._write(node, dtype, source if fits else None)

    def _move(self, node: ir.Node) -> None:
        source = node.inputs[0]
        dtype = self._dtype(source)
        if dtype is None:
            raise _unknown(node, "the type of its input is not known")
        self._write(node, dtype, interval(*self._range(source).extremes))

    def _arithmetic(self, node: ir.Node) -> None:
        values = [v for v in node.inputs if v is not None]
        values = values[1:] if is_op(node, "Where") else values
        dtype = next((d for d in map(self._dtype, values) if d is not None), None)
        if dtype is None:
            raise _unknown(node, "the types of its inputs are not known")
        if dtype in (ir.DataType.INT64, ir.DataType.BOOL):  # shapes and conditions
            self._write(node, dtype)
            return
        ranges = [self._range(v).extremes for v in values]
        lo, hi = combined(node.op_type, ranges)
        info = np.iinfo(dtype.numpy())
        if dtype != ir.DataType.INT32 and (lo < info.min or hi > info.max):
            raise PreconditionError(
                "CHECK-INTEGER-OVERFLOW",
                f"{node.op_type} `{node_label(node)}`: it can reach from {lo:,} to {hi:,}, beyond "
                f"{dtype.name.lower()}",
                "compute it in int32",
            )
        self._write(node, dtype, interval(lo, hi))
        if is_op(node, "Add", "Sub", "Mul") and dtype == ir.DataType.INT32:
            self._record(node, max(abs(lo), abs(hi)))

    # Products and biases --------------------------------------------------------------------------

    def _product(self, node: ir.Node) -> Interval:
        """The columns' bounds: exact for constant weights, K times the largest product if not."""
        left = self._shifted(node, 0, 2)
        weight = const_array(node.inputs[1])
        if weight is not None and weight.ndim == 2:
            zero = const_array(node.inputs[3]) if len(node.inputs) > 3 else None
            wide = weight.astype(np.int64) - (0 if zero is None else zero.astype(np.int64))
            positive = np.maximum(wide, 0).sum(axis=0).astype(object)
            negative = np.minimum(wide, 0).sum(axis=0).astype(object)
            lo, hi = left
            return Interval(positive * lo + negative * hi, positive * hi + negative * lo)
        right = self._shifted(node, 1, 3)
        products = [a * b for a in left for b in right]
        extent = self._extent(node)
        return interval(min(0, extent * min(products)), max(0, extent * max(products)))

    def _shifted(self, node: ir.Node, at: int, zero_at: int) -> tuple[int, int]:
        lo, hi = self._range(node.inputs[at]).extremes
        zero = node.inputs[zero_at] if len(node.inputs) > zero_at else None
        if zero is None:
            return lo, hi
        least, most = self._range(zero).extremes
        return lo - most, hi - least

    def _extent(self, node: ir.Node) -> int:
        """K of a product of two activations."""
        known = []
        for value, axis in ((node.inputs[0], -1), (node.inputs[1], -2)):
            shape = static_shape(value)
            if shape is not None and len(shape) >= 2 and shape[axis] is not None:
                known.append(int(shape[axis] or 0))
        if known:
            return min(known)
        if self._max_extent is None:
            raise PreconditionError(
                "CHECK-INTEGER-EXTENT",
                f"MatMulInteger `{node_label(node)}` sums over a dynamic axis: no bound without "
                "its extent",
                "give the largest one (the longest sequence, say) with --max-extent",
            )
        return self._max_extent

    def _biased(self, node: ir.Node) -> int:
        """The largest magnitude of x + bias."""
        x, bias = self._range(node.inputs[0]), self._range(node.inputs[1])
        if x.lo.size != bias.lo.size and 1 not in (x.lo.size, bias.lo.size):
            (x_lo, x_hi), (b_lo, b_hi) = x.extremes, bias.extremes
            x, bias = interval(x_lo, x_hi), interval(b_lo, b_hi)
        lo, hi = x.lo + bias.lo, x.hi + bias.hi
        return max(abs(int(lo.min())), abs(int(hi.max())))

    def _limits(self, node: ir.Node) -> Interval:
        return interval(attr_int(node, "low", 0), attr_int(node, "high", 0))

    def _exp(self, node: ir.Node, prefix: str = "") -> Interval:
        lo, hi, reach = exp_range(_integers(node), prefix)
        _within_int32(node, "its polynomial", reach)
        return interval(lo, hi)

    def _erf(self, node: ir.Node) -> Interval:
        lo, hi, reach = erf_range(_integers(node))
        _within_int32(node, "its polynomial", reach)
        return interval(lo, hi)

    def _gelu(self, node: ir.Node) -> tuple[Interval, int]:
        largest = max(map(abs, self._erf(node).extremes)) + abs(attr_int(node, "one", 0))
        _within_int32(node, "its product with erf", 32767 * largest)
        return self._limits(node), self._biased(node)

    def _silu(self, node: ir.Node) -> tuple[Interval, int]:
        self._exp(node, "exp_")
        return self._limits(node), self._biased(node)

    def _softmax(self, node: ir.Node) -> tuple[Interval, int]:
        self._exp(node)
        x, mask = (self._range(v).extremes for v in node.inputs[:2])
        reach = max(abs(x[0] + mask[0]), abs(x[1] + mask[1]))
        return interval(0, (1 << attr_int(node, "bits", 8)) - 1), reach


def _integers(node: ir.Node) -> dict[str, int]:
    """The node's attributes, as its operator takes them."""
    made = {}
    for attribute in get(node.op_type).attributes:
        given = node.attributes.get(attribute.name)
        least, most = _LIMITS.get(attribute.name, INT32)
        if given is None or given.type != ir.AttributeType.INT:
            raise _unknown(node, f"its attribute {attribute.name} is missing")
        made[attribute.name] = given.as_int()
        if not least <= made[attribute.name] <= most:
            why = f"{attribute.name} = {made[attribute.name]} is not from {least} to {most}"
            raise _unknown(node, why)
    return made


def _within_int32(node: ir.Node, what: str, reach: int) -> None:
    if reach > INT32[1]:
        raise PreconditionError(
            "CHECK-INTEGER-OVERFLOW",
            f"{node.op_type} `{node_label(node)}`: {what} can reach {reach:,}, beyond int32's "
            f"{INT32[1]:,}",
            "quantize the layer with fewer bits, or bound the extents with --max-extent",
        )


def _float(node: ir.Node | None, value: ir.Value | None) -> PreconditionError:
    where = "the graph's end" if node is None else f"{node.op_type} `{node_label(node)}`"
    return PreconditionError(
        "CHECK-INTEGER-FLOAT",
        f"`{value_name(value)}` at {where} is a float between the first quantize and the last "
        "dequantize",
        "the model is not integer-only; make it with `onnxq run --passes ibert`",
    )


def _unknown(node: ir.Node | None, why: str) -> PreconditionError:
    where = "an input" if node is None else f"{node.op_type} `{node_label(node)}`"
    return PreconditionError(
        "CHECK-INTEGER-OPERATOR",
        f"{where} cannot be judged: {why}",
        "only standard integer operators and those of com.onnxq can be proved",
    )
