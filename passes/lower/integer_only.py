"""``integer-only``: a transformer in which every tensor between input and output is an integer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.errors import PreconditionError, SpecError
from onnxq.graph.edit import remove_dead
from onnxq.graph.match import Structure, analyze
from onnxq.graph.match.values import is_op, value_name
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.decide.calibrate import RANGE_RULE
from onnxq.passes.keys import PLAN, ROUNDED, STATISTICS
from onnxq.passes.lower.integer_functions import Options
from onnxq.passes.lower.integer_graph import IntegerLowering
from onnxq.passes.lower.integer_nodes import no_integer_form, refuse_decoder, source_of
from onnxq.passes.lower.qdq import forget_shapes
from onnxq.passes.lower.weights import integer_format
from onnxq.passes.weights.rounded import RoundedWeights


@dataclass(frozen=True)
class IntegerOnly(Pass):
    """Perform a static plan in integers alone (I-BERT).

    Args:
        polynomial: degree of the polynomials of exp and erf; 2 is I-BERT's.
        softmax_bits: of the probabilities, 4 to 8.
        softmax_rounding: ``nearest``, or ``down`` as I-BERT does.
        residual_bits: of sums and norms, 8 or 16.
    """

    name: ClassVar[str] = "integer-only"
    summary: ClassVar[str] = "perform the plan in integers alone, non-linearities included"
    requires: ClassVar = (PLAN, STATISTICS, RANGE_RULE)
    uses: ClassVar = (ROUNDED,)
    invalidates: ClassVar = (PLAN, ROUNDED, STATISTICS)
    tolerance: ClassVar[float | None] = None

    polynomial: int = 2
    softmax_bits: int = 8
    softmax_rounding: Literal["nearest", "down"] = "nearest"
    residual_bits: int = 16

    def __post_init__(self) -> None:
        if self.polynomial not in (2, 3, 4):
            raise SpecError("SPEC-RANGE", f"polynomial={self.polynomial} is not 2, 3 or 4")
        if not 4 <= self.softmax_bits <= 8:
            raise SpecError("SPEC-RANGE", f"softmax-bits={self.softmax_bits} is not from 4 to 8")
        if self.residual_bits not in (8, 16):
            raise SpecError("SPEC-RANGE", f"residual-bits={self.residual_bits} is not 8 or 16")

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Ranges of all that becomes an integer between the products."""
        return [StatRequest(name, "range") for name in _ranged(analyze(model))]

    def candidates(self, model: ir.Model) -> list[str]:
        """All matches of the main graph."""
        found = analyze(model)
        groups = (found.linears, found.norms, found.activations, found.attentions, found.embeddings)
        return [match.name for group in groups for match in group]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Lower the graph from its inputs to its outputs, or refuse and say where."""
        report = PassReport()
        structure = analyze(model)
        _refuse_what_cannot_be(structure)
        statistics, rule = ctx.artifacts.get(STATISTICS), ctx.artifacts.get(RANGE_RULE)

        def range_of(value: str, symmetric: bool) -> tuple[float, float]:
            kind = "range" if rule.method in ("minmax", "moving-average") else "histogram"
            if not any(r.value == value and r.kind == kind for r in statistics):
                raise PreconditionError(
                    "PASS-INTEGER-CALIBRATION",
                    f"`integer-only`: no range was calibrated for `{value}`",
                    "put `calibrate` right before, with calibration data",
                )
            fmt = integer_format("int16" if symmetric else "uint8")
            return rule.range_of(statistics, value, fmt, symmetric=symmetric)

        options = Options(
            self.polynomial,
            self.softmax_bits,
            int(self.softmax_rounding == "nearest"),
            self.residual_bits,
        )
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else RoundedWeights()
        plan = ctx.artifacts.get(PLAN)
        lowering = IntegerLowering(model, structure, plan, rounded, range_of, options)
        for done in lowering.run():
            report.change(done.site, done.what)
        remove_dead(model.graph)
        forget_shapes(model)
        return report


def _ranged(structure: Structure) -> list[str]:
    """Names of the values whose range is needed; linear inputs are the plan's."""
    values: list[ir.Value] = []
    for norm in structure.norms:
        values += [norm.x, norm.output]
    for activation in structure.activations:
        values += [activation.x, activation.output]
    for attention in structure.attentions:
        values += [source_of(v) for v in (attention.q, attention.k, attention.v)]
        values.append(attention.context)
    for linear in structure.linears:
        values += [linear.output, source_of(linear.x)]
    values += [node.outputs[0] for node in structure.graph if is_op(node, "Add")]
    floats = (ir.DataType.FLOAT, None)
    names = [value_name(v) for v in values if v.dtype in floats and v.const_value is None]
    return list(dict.fromkeys(names))


def _refuse_what_cannot_be(structure: Structure) -> None:
    refuse_decoder(structure.graph)
    if structure.fused_attentions:
        raise no_integer_form(structure.fused_attentions[0].node)
    for node in structure.graph:
        if any(True for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH):
            raise no_integer_form(node)
