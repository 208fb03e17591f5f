"""``assign``: which value gets which format, and why; the graph is left alone.

The decisions follow what onnxruntime computes in integers and what that costs in accuracy:

- *linear layers* (MatMul, Gemm, Conv with a constant weight) are quantized: they hold the weights
  and most of the time;
- *embedding tables* are stored in 8 bits, one scale a row;
- around Conv, onnxruntime's integer kernels write integers, so outputs of convolutions and the
  adds and poolings between them are quantized too (:mod:`onnxq.passes.decide.integer_regions`);
- *everything between the linear layers of a transformer stays float*: onnxruntime has no integer
  kernel for LayerNorm and GELU, a mask constant would set the range of the softmax input, and
  integer residual adds cost accuracy and gain nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxq.calibration.requests import StatRequest
from onnxq.errors import PreconditionError, SpecError, UnsupportedError
from onnxq.formats import IntFormat, MxFormat, NvFp4Format, parse_format
from onnxq.formats.parse import MAX_BLOCK
from onnxq.graph.match import Attention, FusedAttention, Linear, Structure, analyze, is_op
from onnxq.graph.match.values import value_dtype
from onnxq.passes.contract import Context, Key, Pass, PassReport
from onnxq.passes.decide.calibrate import RANGE_RULE
from onnxq.passes.decide.explain import explain_floats, explain_rejected, explain_subgraphs
from onnxq.passes.decide.integer_regions import (
    IntegerOp,
    find_integer_ops,
    known_bounds,
    output_of_conv,
)
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.lower.activations import activation_format, keys_and_values
from onnxq.passes.plan import (
    ANY_WEIGHT,
    CACHE,
    ActivationPlan,
    Mode,
    QuantPlan,
    SitePlan,
    ValuePlan,
    WeightPlan,
)
from onnxq.passes.sites import site_names
from onnxq.passes.targets import DEFAULT_BLOCK, NBITS, Target, opset_of

SMALL_TABLE = 65_536
"""Embedding tables below this many bytes stay float: nothing to gain."""

ONNX_BITS = (2, 4, 8, 16)
"""Widths of the integers that QuantizeLinear writes, and saturates to."""


@dataclass(frozen=True)
class Assign(Pass):
    """Decide formats for weights, activations and embedding tables.

    Args:
        mode: ``static`` (ranges from calibration), ``dynamic`` (one range a tensor, taken at run
            time), ``per-token`` (one range a token or block, taken at run time) or
            ``weight-only`` (activations stay float).
        weights: format of weights: ``int8``, ``int4``, ...; in modes ``weight-only`` and
            ``per-token`` any format (``nvfp4``, ``mxfp4``, ``nf4``, ...), else an integer one.
            ``auto``: 8 bits, as the target takes them.
        activations: format of activations, or ``auto``: what the target is fast with, and int8 in
            mode ``per-token``. There it may be any that can be computed at run time, with its
            block: ``int4``, ``int4g32``, ``fp8e4m3``, ``mxfp4``, ``nvfp4``; else an integer one.
        cache: in mode ``per-token``, format of keys and values, one scale a token and head (or
            block of it), or ``float``. Rounds what attention reads in graphs without a cache too.
        clip: in mode ``per-token``, share of a token's largest magnitude that integer and float
            codes reach.
        block: elements along the reduction axis that share a weight scale; 0: one scale an
            output channel; none: the target's block for integers of up to 4 bits (32 on the CPU),
            else 0.
        weight_scales: one scale an output ``channel``, or one a ``tensor``, as some hardware wants.
        weight_method: how weight ranges are chosen.
        symmetric_weights: zero point in the middle of the weights' codes.
        embeddings: format of embedding tables, or ``float``.
    """

    name: ClassVar[str] = "assign"
    summary: ClassVar[str] = "decide which layer and value gets which format, and why"
    uses: ClassVar = (STATISTICS, RANGE_RULE)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0

    mode: Mode = "static"
    weights: str = "auto"
    activations: str = "auto"
    cache: str = "float"
    clip: float = 1.0
    block: int | None = None
    weight_scales: Literal["channel", "tensor"] = "channel"
    weight_method: Literal["minmax", "mse"] = "minmax"
    symmetric_weights: bool = True
    embeddings: str = "int8"

    def __post_init__(self) -> None:
        weights = "int8" if self.weights == "auto" else self.weights
        fmt = parse_format(weights)
        if self.mode not in ANY_WEIGHT:
            fmt = _integer_format(weights)
        if fmt.block and self.block not in (None, 0, fmt.block):
            raise SpecError(
                "SPEC-COMBINATION",
                f"weights={self.weights} has blocks of {fmt.block}, not {self.block}",
                "leave block out",
            )
        self._check_activations()
        if self.embeddings != "float":
            _integer_format(self.embeddings)
        if self.block and (not 16 <= self.block <= MAX_BLOCK or self.block & (self.block - 1)):
            raise SpecError(
                "SPEC-RANGE",
                f"block={self.block} is not a power of two from 16 to {MAX_BLOCK}",
                "use block=32, or block=0 for one scale a channel",
            )
        if self.mode not in ANY_WEIGHT and (self.block or fmt.block):
            raise SpecError(
                "SPEC-COMBINATION",
                f"mode={self.mode} has one scale a channel; "
                f"block={self.block or fmt.block} does not go with it",
                "use mode=weight-only or mode=per-token, or leave block out",
            )
        if self.weight_scales == "tensor" and (self.mode in ANY_WEIGHT or self.block):
            raise SpecError(
                "SPEC-COMBINATION",
                f"weight-scales=tensor is for mode=static and mode=dynamic, not mode={self.mode}",
                "leave weight-scales out",
            )
        if self.mode == "dynamic" and fmt.bits != 8:
            raise SpecError(
                "SPEC-COMBINATION",
                f"mode=dynamic multiplies 8-bit integers; weights={self.weights} are not",
                "use weights=int8, mode=per-token or mode=weight-only",
            )
        signed = isinstance(fmt, IntFormat) and fmt.signed
        if self.mode not in ANY_WEIGHT and not self.symmetric_weights and signed:
            raise SpecError(
                "SPEC-COMBINATION",
                f"weights={weights} have zero point 0: runtimes expect that of signed weights",
                "use weights=uint8 with symmetric-weights=false",
            )

    def opset_needed(self, target: Target) -> int:
        """That of Q/DQ on the types chosen, or of the form in which the target stores weights."""
        fmt = parse_format(self.weights_on(target))
        if self.mode == "weight-only":
            block = target.blocks_for(fmt, 0) if self.block is None else self.block or fmt.block
            return opset_of(target.form_of(fmt, block or 0), fmt)
        if self.mode == "per-token":
            return opset_of("function", fmt)
        if self.mode == "dynamic" or target.contrib_qdq:
            return 13
        activations = target.activation if self.activations == "auto" else self.activations
        widths = {_integer_format(str(fmt)).bits, _integer_format(activations).bits}
        return 25 if min(widths) <= 2 else 21 if widths != {8} else 13

    def weights_on(self, target: Target) -> str:
        """The format of weights that ``auto`` stands for."""
        if self.weights != "auto":
            return self.weights
        return target.weight if self.mode == "static" else "int8"

    def _check_activations(self) -> None:
        if self.mode == "per-token":
            fmt = activation_format(self._activation.format)
            if self.cache != "float":
                activation_format(self.cache)
            if not 0.0 < self.clip <= 1.0:
                raise SpecError("SPEC-RANGE", f"clip={self.clip} is not above 0 and up to 1")
            if self.clip != 1.0 and isinstance(fmt, MxFormat | NvFp4Format):
                raise SpecError(
                    "SPEC-COMBINATION",
                    f"the scales of {fmt} follow their own rule, not clip={self.clip}",
                    "leave clip out",
                )
            return
        if self.cache != "float":
            raise SpecError(
                "SPEC-COMBINATION",
                f"cache={self.cache} is for mode=per-token, not mode={self.mode}",
                "leave cache out",
            )
        if self.clip != 1.0:
            raise SpecError(
                "SPEC-COMBINATION",
                f"clip={self.clip} is for mode=per-token, not mode={self.mode}",
                "choose static ranges with `calibrate{method=mse}`",
            )
        if self.activations == "auto":
            return
        if _integer_format(self.activations).bits not in ONNX_BITS:
            raise SpecError(
                "SPEC-FORMAT",
                f"activations={self.activations} has no type in ONNX, which clamps its codes",
                f"use an integer format of {', '.join(map(str, ONNX_BITS))} bits",
            )

    @property
    def _activation(self) -> ActivationPlan:
        name = "int8" if self.activations == "auto" else self.activations
        return ActivationPlan(name, self.clip)

    def needs(self) -> tuple[Key[Any], ...]:
        """Static mode takes ranges from statistics."""
        return (STATISTICS, RANGE_RULE) if self.mode == "static" else ()

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """Ranges of the values that static mode quantizes."""
        if self.mode != "static":
            return []
        structure = analyze(model)
        names = [str(linear.x.name) for linear in structure.linears]
        for linear in structure.linears:
            if linear.kind == "conv":
                names.append(str(output_of_conv(linear).name))
        for op in find_integer_ops(structure):
            names.append(str(op.output.name))
        return [StatRequest(name, "range") for name in dict.fromkeys(names)]

    def candidates(self, model: ir.Model) -> list[str]:
        """Linear layers and embeddings of the main graph."""
        structure = analyze(model)
        return [x.name for x in structure.linears] + [x.name for x in structure.embeddings]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Write the plan."""
        if self.mode == "dynamic" and not ctx.target.dynamic_quant:
            raise UnsupportedError(
                "TARGET-DYNAMIC",
                f"target `{ctx.target.name}` does not run DynamicQuantizeLinear",
                "use mode=static or mode=weight-only",
            )
        self._check_target(model, ctx.target)
        report = PassReport()
        structure = analyze(model)
        plan = QuantPlan()
        for linear in structure.linears:
            self._assign_linear(model, linear, plan, ctx.target)
        self._assign_embeddings(structure, plan, ctx.target)
        if self.cache != "float":
            attentions: list[Attention | FusedAttention] = [
                *structure.attentions,
                *structure.fused_attentions,
            ]
            for attention in attentions:
                self._assign_cache(structure, attention, plan)
        if self.mode == "static":
            for op in find_integer_ops(structure):
                self._assign_op(op, plan)
            self._assign_ranges(plan, structure, ctx)
        for site in plan.sites.values():
            weight = "" if site.weight is None else f" {site.weight.format}"
            report.change(site.site, f"{site.kind}{weight} {site.mode}", site.why)
        for name, reason in plan.floats.items():
            report.skip(name, reason)
        explain_floats(structure, plan, report)
        explain_rejected(structure, report)
        explain_subgraphs(model, report)
        ctx.artifacts.put(PLAN, plan)
        return report

    def _check_target(self, model: ir.Model, target: Target) -> None:
        """Refuse, before any work, what the target or the model's opset does not take."""
        weights = self.weights_on(target)
        if self.mode == "per-token" and "function" not in target.forms:
            raise UnsupportedError(
                "TARGET-DYNAMIC",
                f"target `{target.name}` does not run the functions that round activations",
                "use mode=static or mode=weight-only",
            )
        if self.mode == "static":
            activations = target.activation if self.activations == "auto" else self.activations
            target.check_static(weights, activations)
        opset, needed = model.opset_imports.get("", 0), self.opset_needed(target)
        # Q/DQ by channel below opset 13 is a reason to leave layers in float, not an error.
        # What rounds tokens says itself what it needs: packed, it is less than decoded.
        if opset < needed and needed > 13 and self.mode != "per-token":
            raise PreconditionError(
                "PASS-OPSET",
                f"`assign`: {weights} weights for target `{target.name}` need opset {needed}; "
                f"the model has {opset}",
                f"put `canonicalize{{opset={needed}}}` first",
            )

    def _assign_linear(
        self, model: ir.Model, linear: Linear, plan: QuantPlan, target: Target
    ) -> None:
        reason = self._reason_for_float(model, linear)
        block = self._block_of(linear, target)
        if reason is None and block is None:
            wanted = " or ".join(map(str, sorted(target.blocks)))
            reason = (
                f"its {linear.in_features} inputs are no multiple of {wanted}, "
                f"in which target `{target.name}` takes blocks"
            )
        if reason is not None:
            plan.leave_float(linear.name, reason)
            return
        static = self.mode == "static"
        output = str(output_of_conv(linear).name) if static and linear.kind == "conv" else ""
        per_channel = self.weight_scales == "channel" and (
            target.per_channel_matmul or linear.kind == "conv"
        )
        plan.add(
            SitePlan(
                linear.name,
                linear.kind,
                self.mode,
                inputs=(str(linear.x.name),) if static else (),
                output=output,
                weight=WeightPlan(
                    self.weights_on(target),
                    self.symmetric_weights,
                    per_channel,
                    block or 0,
                    self.weight_method,
                ),
                activation=self._activation if self.mode == "per-token" else None,
                by=self.name,
                why=f"weight of {linear.in_features} x {linear.out_features}",
            )
        )

    def _block_of(self, linear: Linear, target: Target) -> int | None:
        """Elements that share a scale; 0: one scale a channel; None: no block fits."""
        fmt = parse_format(self.weights_on(target))
        if self.mode not in ANY_WEIGHT or linear.kind == "conv":
            return 0
        if self.block is None and self.mode == "weight-only":
            return target.blocks_for(fmt, linear.in_features)
        block = self.block or fmt.block
        fits = not (target.whole_blocks and block and linear.in_features % block)
        return block if fits else None

    def _reason_for_float(self, model: ir.Model, linear: Linear) -> str | None:
        dtype = _element_type(linear)
        if dtype != ir.DataType.FLOAT:
            return f"activations are {dtype}; only float32 layers are quantized"
        if linear.alpha != 1.0 or linear.beta != 1.0:
            return "Gemm with alpha or beta other than 1"
        if self.mode == "dynamic" and linear.kind == "conv":
            return (
                "dynamic mode: onnxruntime's integer Conv at run-time scales is slower than float"
            )
        if self.mode == "weight-only" and linear.kind == "conv":
            return "weight-only mode: Conv has no kernel on packed weights"
        if self.mode == "per-token":
            if linear.kind == "conv":
                return "per-token mode: the rows of a Conv are no tokens"
            size = activation_format(self._activation.format).block
            if size and linear.in_features % size:
                return f"its {linear.in_features} inputs are not divided by blocks of {size}"
        if self.mode == "static" and model.opset_imports.get("", 0) < 13:
            return "per-channel DequantizeLinear needs opset 13; put `canonicalize` first"
        return None

    def _assign_embeddings(self, structure: Structure, plan: QuantPlan, target: Target) -> None:
        names = site_names(structure.graph)
        for embedding in structure.embeddings:
            name = names[embedding.node]
            tensor = embedding.table.const_value
            if self.embeddings == "float":
                plan.leave_float(name, "embeddings=float")
            elif tensor is None or tensor.dtype != ir.DataType.FLOAT:
                plan.leave_float(name, "the table is not float32")
            elif tensor.nbytes < SMALL_TABLE:
                plan.leave_float(name, f"a table of {tensor.nbytes:,} bytes: too small")
            else:
                plan.add(
                    SitePlan(
                        name,
                        "embedding",
                        "weight-only",
                        weight=_table_plan(self.embeddings, name, tensor.numpy().shape[1], target),
                        by=self.name,
                        why=f"table of {tensor.nbytes:,} bytes",
                    )
                )

    def _assign_cache(
        self, structure: Structure, attention: Attention | FusedAttention, plan: QuantPlan
    ) -> None:
        name = attention.name + CACHE
        found = None if isinstance(attention, FusedAttention) else keys_and_values(attention)
        size = activation_format(self.cache).block
        way = structure.v_to_o(attention)
        if found is None:
            plan.leave_float(name, "keys are not transposed right before the product")
        elif isinstance(way, str):
            plan.leave_float(name, f"the size of its heads is not known: {way}")
        elif size and way.head_dim % size:
            plan.leave_float(name, f"heads of {way.head_dim} are not divided by blocks of {size}")
        else:
            plan.add(
                SitePlan(
                    name,
                    "cache",
                    "per-token",
                    inputs=tuple(str(value.name) for value in found),
                    activation=ActivationPlan(self.cache),
                    by=self.name,
                    why=f"heads of {way.head_dim}",
                )
            )

    def _assign_op(self, op: IntegerOp, plan: QuantPlan) -> None:
        quantized = {site.output for site in plan.sites.values() if site.output}
        missing = [v for v in op.inputs if str(v.name) not in quantized]
        if missing:
            plan.leave_float(op.name, f"its input {missing[0].name} is float")
            return
        plan.add(
            SitePlan(
                op.name,
                "op",
                "static",
                inputs=tuple(str(v.name) for v in op.inputs),
                output=str(op.output.name),
                by=self.name,
                why="between integer kernels",
            )
        )

    def _assign_ranges(self, plan: QuantPlan, structure: Structure, ctx: Context) -> None:
        rule = ctx.artifacts.get(RANGE_RULE)
        statistics = ctx.artifacts.get(STATISTICS)
        name = ctx.target.activation if self.activations == "auto" else self.activations
        fmt = _integer_format(name)
        symmetric = fmt.signed
        shares = {
            str(op.output.name): str(op.inputs[0].name)
            for op in find_integer_ops(structure)
            if op.keeps_codes
        }
        written = {str(out.name): out for node in structure.graph for out in node.outputs}
        for value in sorted(plan.used_values()):
            lo, hi = rule.range_of(statistics, value, fmt, symmetric=symmetric)
            least, most = known_bounds(written.get(value))
            lo, hi = max(lo, least), min(hi, most)
            plan.values[value] = ValuePlan(
                name, lo, hi, symmetric, rule.method, same_as=shares.get(value)
            )


def _table_plan(name: str, site: str, width: int, target: Target) -> WeightPlan:
    """An embedding table in ``name``: 8 bits by rows, or blocks of GatherBlockQuantized.

    Raises:
        UnsupportedError: ``TARGET-EMBEDDING``.
    """
    fmt = _integer_format(name)
    block = fmt.block or (0 if fmt.bits == 8 else DEFAULT_BLOCK)
    if not block and fmt.signed:
        return (
            WeightPlan("uint8", per_channel=False)
            if target.embedding == "codes"
            else WeightPlan(name)
        )
    packs = fmt.bits in NBITS and fmt.symmetric and width % (block or 1) == 0
    if not packs or not block or not target.has("GatherBlockQuantized"):
        raise UnsupportedError(
            "TARGET-EMBEDDING",
            f"{site}: no operator of target `{target.name}` reads a table of rows of {width} in "
            f"{name}: GatherBlockQuantized, where a target has it, takes int2, int4 and int8 in "
            "blocks that divide the row",
            "use embeddings=int8, one scale a row, or embeddings=float",
        )
    return WeightPlan(str(dataclasses.replace(fmt, block=0)), block=block)


def _element_type(linear: Linear) -> ir.DataType | None:
    """The type that the layer computes in; without shape inference, that of its weight."""
    if linear.x.dtype is not None or any(is_op(n, "Cast") for n in linear.weight_path):
        return linear.x.dtype
    return value_dtype(linear.weight) or linear.weight.dtype


def _integer_format(name: str) -> IntFormat:
    fmt = parse_format(name)
    if not isinstance(fmt, IntFormat):
        raise SpecError("SPEC-FORMAT", f"`{name}` is not an integer format")
    return fmt
