"""Rewrites a float transformer, match by match, into integer operators.

The walk follows the graph's order. Each float value that a match writes gets an integer form; what
only moves data is repeated on that form; masks are built again on integers; what remains and reads
a float has no integer form, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxq.errors import UnsupportedError
from onnxq.graph.edit import replace_value
from onnxq.graph.match import (
    Activation,
    Attention,
    Embedding,
    Linear,
    Norm,
    Structure,
)
from onnxq.graph.match.values import (
    const_array,
    is_op,
    last_dim,
    node_label,
    static_shape,
    value_name,
)
from onnxq.passes.lower.integer_attention import AttentionLowering, RangeOf
from onnxq.passes.lower.integer_forms import Acc, Codes, Emitter, Form, Spec, Wide
from onnxq.passes.lower.integer_functions import FunctionLowering, Options
from onnxq.passes.lower.integer_linear import LinearLowering
from onnxq.passes.lower.integer_nodes import MOVES, no_integer_form, source_of
from onnxq.passes.plan import QuantPlan
from onnxq.passes.weights.rounded import RoundedWeights


@dataclass(frozen=True)
class Done:
    """One match that was lowered, for the report."""

    site: str
    what: str


class IntegerLowering:
    """Lowers one graph.

    Args:
        model: edited in place.
        structure: its matches.
        plan: of the linear layers.
        rounded: weights that solvers rounded.
        range_of: calibrated ranges.
        options: of the pass.
    """

    def __init__(
        self,
        model: ir.Model,
        structure: Structure,
        plan: QuantPlan,
        rounded: RoundedWeights,
        range_of: RangeOf,
        options: Options,
    ) -> None:
        self._graph = model.graph
        self._structure = structure
        self._range_of = range_of
        self._emitter = Emitter(model, options.residual_bits)
        self._functions = FunctionLowering(self._emitter, options)
        self._linears = LinearLowering(self._emitter, plan, rounded)
        self._attentions = AttentionLowering(
            self._emitter, self._functions, structure.attentions, range_of
        )
        self._forms: dict[ir.Value, Form] = {}
        self._roots: dict[ir.Node, Linear | Norm | Activation | Attention | Embedding] = {}
        self._inner: set[ir.Node] = set()
        self._wanted: dict[ir.Value, dict[Spec, None]] = {}
        self._collect()

    # Before the walk ------------------------------------------------------------------------------

    def _collect(self) -> None:
        found = self._structure
        for linear in found.linears:
            self._roots[linear.bias_add or linear.node] = linear
            self._inner.add(linear.node)
            self._want(linear.x, self._linears.spec(linear))
        for norm in found.norms:
            self._roots[norm.root] = norm
            self._inner.update(norm.nodes)
        for activation in found.activations:
            self._roots[activation.root] = activation
            self._inner.update(activation.nodes)
        for attention in found.attentions:
            self._roots[attention.pv_matmul] = attention
            self._inner.update(attention.nodes)
            for value, spec in self._attentions.specs(attention):
                self._want(value, spec)
        for embedding in found.embeddings:
            self._roots[embedding.node] = embedding

    def _want(self, value: ir.Value, spec: Spec) -> None:
        """``value`` will be read as ``spec`` says: so should be what it was moved from."""
        self._wanted.setdefault(source_of(value), {})[spec] = None

    # The walk -------------------------------------------------------------------------------------

    def run(self) -> Iterator[Done]:
        """Lower everything; afterwards no output of the graph hangs on a float but at its end."""
        for node in list(self._graph):
            match = self._roots.get(node)
            if match is not None:
                with naming(match.name):
                    yield from self._lower(node, match)
            elif node not in self._inner:
                with naming(node_label(node)):
                    yield from self._other(node)
        for output in list(self._graph.outputs):
            if output in self._forms:
                self._dequantize(output)

    def _lower(
        self, node: ir.Node, match: Linear | Norm | Activation | Attention | Embedding
    ) -> Iterator[Done]:
        self._emitter.at(node, match.name)
        if isinstance(match, Embedding):
            amax = float(np.abs(_table(match)).max())
            self._forms[match.output] = self._functions.embedding(
                match.indices, _table(match), amax
            )
            yield Done(match.name, "IntegerEmbedding, int8 rows")
        elif isinstance(match, Linear):
            yield self._linear(match)
        elif isinstance(match, Norm):
            yield self._norm(match)
        elif isinstance(match, Activation):
            yield self._activation(match)
        else:
            yield self._attention(match)

    def _other(self, node: ir.Node) -> Iterator[Done]:
        """A node of no match: it moves data, adds, scales, or has no integer form."""
        read = [v for v in node.inputs if v is not None and v in self._forms]
        if not read:
            return
        label = node_label(node)
        self._emitter.at(node, label)
        if is_op(node, "Shape", "Size"):
            node.replace_input_with(0, self._forms[read[0]].value)
        elif is_op(node, *MOVES) and node.inputs[0] is read[0] and len(read) == 1:
            self._move(node, read[0])
        elif is_op(node, "Add") and len(node.inputs) == 2:
            yield self._add(node)
        elif is_op(node, "Mul", "Div") and self._scale(node):
            pass
        else:
            raise no_integer_form(node)

    def _form(self, value: ir.Value, reader: str) -> Form:
        """The integer form of ``value``; a float input of the graph is quantized here."""
        if value in self._forms:
            return self._forms[value]
        wanted = list(self._wanted.get(value, {}))
        if value.is_graph_input() and value.dtype == ir.DataType.FLOAT and wanted:
            spec = wanted[0]
            scale = self._emitter.constant(np.array(spec.scale, np.float32), "scale")
            zero = self._emitter.constant(spec.zero_array, "zero_point")
            node = self._emitter.standard("QuantizeLinear", [value, scale, zero])
            self._forms[value] = Codes(node.outputs[0], spec)
            return self._forms[value]
        raise UnsupportedError(
            "UNSUPPORTED-INTEGER-FORM",
            f"`{reader}` reads `{value_name(value)}`, which has no integer form",
            "leave out `integer-only`, or export the model without that input",
        )

    # Matches --------------------------------------------------------------------------------------

    def _linear(self, linear: Linear) -> Done:
        form = self._form(linear.x, linear.name)
        self._forms[linear.output] = self._linears.lower(linear, form)
        return Done(linear.name, "MatMulInteger, uint8 by int8")

    def _norm(self, norm: Norm) -> Done:
        if norm.skip is not None:
            raise no_integer_form(norm.root)
        form = self._form(norm.x, norm.name)
        wide = self._wide(norm.x, form)
        self._forms[norm.output] = self._functions.norm(norm, wide, self._reach(norm.output))
        return Done(norm.name, "integer " + norm.kind)

    def _activation(self, activation: Activation) -> Done:
        form = self._form(activation.x, activation.name)
        made = self._functions.activation(
            activation, form, self._reach(activation.x), self._output_spec(activation.output)
        )
        if made is None:
            raise no_integer_form(activation.root, activation.kind)
        self._forms[activation.output] = made
        return Done(activation.name, f"integer {activation.kind}, degree {self._functions.degree}")

    def _attention(self, attention: Attention) -> Done:
        self._forms[attention.context] = self._attentions.lower(attention, self._form)
        return Done(attention.name, f"IntegerSoftmax, degree {self._functions.degree}")

    # Other nodes ----------------------------------------------------------------------------------

    def _move(self, node: ir.Node, value: ir.Value) -> None:
        form = self._forms[value]
        if isinstance(form, Acc):
            # Per-column scales do not survive a move; the readers say what they want instead.
            wanted = list(self._wanted.get(value, {}))
            if len(wanted) == 1:
                form = self._emitter.codes(form, wanted[0])
            else:
                form = self._wide(value, form)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        inputs = [form.value, *node.inputs[1:]]
        made = self._emitter.standard(
            node.op_type, inputs, attributes, dtype=form.value.dtype, outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, made.outputs, strict=True):
            if isinstance(form, Wide):
                self._forms[old] = Wide(new, form.scale)
            else:
                assert isinstance(form, Codes)
                self._forms[old] = Codes(new, form.spec)

    def _add(self, node: ir.Node) -> Done:
        first, second = node.inputs[0], node.inputs[1]
        assert first is not None
        assert second is not None
        output = node.outputs[0]
        amax = self._reach(output)
        forms = [self._addend(v, node) for v in (first, second)]
        sum_is_second = not isinstance(forms[0], Acc) and isinstance(forms[1], Acc)
        if sum_is_second or (_repeats(first) and not _repeats(second)):
            forms.reverse()
            first, second = second, first
        left, right = forms
        if not _repeats_rows(second, output):
            raise no_integer_form(node)
        wide = self._wide(second, right)
        self._forms[output] = self._functions.add(left, wide, amax)
        return Done(node_label(node), "IntegerAdd")

    def _addend(self, value: ir.Value, node: ir.Node) -> Form:
        array = const_array(value)
        if array is None:
            return self._form(value, node_label(node))
        wide = np.asarray(array, np.float64)
        scale = max(float(np.abs(wide).max(initial=0.0)), 1e-6) / 32767
        codes = np.asarray(np.rint(wide / scale), np.int16)
        columns = last_dim(node.outputs[0])
        if codes.shape[-1:] != (columns,):
            if columns is None or codes.shape[-1:] not in ((), (1,)):
                raise no_integer_form(node)
            codes = np.broadcast_to(codes, (*codes.shape[:-1], columns)).copy()
        return Wide(self._emitter.constant(codes, "addend"), scale)

    def _scale(self, node: ir.Node) -> bool:
        """A product with constants, one a column, changes only what a step is worth."""
        for at in (0, 1) if is_op(node, "Mul") else (0,):
            factor, value = const_array(node.inputs[1 - at]), node.inputs[at]
            if factor is None or value is None or value not in self._forms:
                continue
            columns = np.asarray(factor, np.float64)
            if columns.ndim > 1 and columns.shape[-1] != columns.size:
                return False
            columns = columns.reshape(-1)
            if columns.size > 1 and last_dim(value) not in (None, columns.size):
                return False
            if is_op(node, "Div"):
                columns = 1 / columns
            form = scaled(self._forms[value], columns)
            if form is None:
                return False
            self._forms[node.outputs[0]] = form
            return True
        return False

    def _dequantize(self, output: ir.Value) -> None:
        """From integers to the float output, the only float of the graph."""
        writer = output.producer()
        assert writer is not None
        self._emitter.at(writer, value_name(output))
        form = self._forms[output]
        value, zero = form.value, None
        if isinstance(form, Codes):
            scale = np.array(form.spec.scale, np.float32)
            zero = self._emitter.constant(form.spec.zero_array, "zero_point")
        elif isinstance(form, Wide):
            scale = np.array(form.scale, np.float32)
            to = {"to": int(ir.DataType.INT32)}
            value = self._emitter.standard("Cast", [value], to).outputs[0]
        else:
            scale = form.scale.astype(np.float32)
            scale = scale.reshape(()) if scale.size == 1 else scale
            if form.value.dtype != ir.DataType.INT32:
                to = {"to": int(ir.DataType.INT32)}
                value = self._emitter.standard("Cast", [value], to).outputs[0]
            if form.bias.any():
                bias = self._emitter.constant(form.bias, "bias")
                value = self._emitter.standard("Add", [value, bias]).outputs[0]
        inputs = [value, self._emitter.constant(scale, "scale"), *([] if zero is None else [zero])]
        attributes = {"axis": -1} if scale.ndim else {}
        node = self._emitter.standard("DequantizeLinear", inputs, attributes)
        node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
        replace_value(output, node.outputs[0])

    # Ranges ---------------------------------------------------------------------------------------

    def _wide(self, value: ir.Value, form: Form) -> Wide:
        """The form of ``value`` in 16 bits."""
        return form if isinstance(form, Wide) else self._emitter.wide(form, self._reach(value))

    def _reach(self, value: ir.Value) -> float:
        """The calibrated magnitude."""
        lo, hi = self._range_of(value_name(value), True)
        return max(-lo, hi)

    def _output_spec(self, output: ir.Value) -> Spec | float:
        """How the readers of an activation want it; its largest magnitude if they differ."""
        wanted = list(self._wanted.get(output, {}))
        return wanted[0] if len(wanted) == 1 else self._reach(output)


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Says of a scale that is out of range which layer it belongs to."""
    try:
        yield
    except UnsupportedError as error:
        if error.code != "UNSUPPORTED-SCALE-RANGE" or layer in error.cause:
            raise
        raise UnsupportedError(
            error.code,
            f"`integer-only`: layer `{layer}`: {error.cause}",
            "its calibrated range is next to nothing, or enormous: look at the calibration data, "
            "or quantize with `qdq`",
        ) from error


def scaled(form: Form, factor: np.ndarray) -> Form | None:
    """``form`` with steps worth ``factor`` times as much; a number, or one for each column."""
    if not (np.isfinite(factor).all() and (factor != 0).all()):
        return None
    if factor.size == 1 and factor[0] > 0:
        number = float(factor[0])
        if isinstance(form, Wide):
            return Wide(form.value, form.scale * number)
        if isinstance(form, Codes):
            spec = form.spec
            return Codes(form.value, Spec(spec.scale * number, spec.zero, spec.signed))
    if isinstance(form, Acc):
        return Acc(form.value, form.scale * factor, form.bias)
    if isinstance(form, Wide):
        return Acc(form.value, form.scale * factor, np.zeros(1, np.int32))
    return None


def _table(embedding: Embedding) -> np.ndarray:
    array = const_array(embedding.table)
    assert array is not None
    return np.asarray(array, np.float32)


def _repeats_rows(value: ir.Value, total: ir.Value) -> bool:
    """Whether broadcasting ``value`` to ``total`` repeats it as a whole, as far as shapes tell."""
    own, whole = static_shape(value), static_shape(total)
    if own is None or whole is None:
        return True
    axes = list(zip(own, whole[len(whole) - len(own) :], strict=True))
    while axes and axes[0][0] == 1:
        axes.pop(0)
    return all(extent != 1 or wanted == 1 for extent, wanted in axes)


def _repeats(value: ir.Value) -> bool:
    """Whether the rows of ``value`` are the same for every sample: a table of positions."""
    node = value.producer()
    if node is None:
        return True
    return is_op(node, "Gather") and node.inputs[1] is not None and not _is_fed(node.inputs[1])


def _is_fed(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_graph_input() or (node is not None and is_op(node, "Cast"))
