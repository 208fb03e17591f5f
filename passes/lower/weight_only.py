"""Weight-only quantization: packed weights, float activations.

=============================  ===============================================================
integers of 2, 4 and 8 bits    ``MatMulNBits`` where the target has it: weights ``[N, blocks,
in blocks                      bytes]``, low nibble first, unsigned codes with the middle as
                               default zero point, bias inside
integers of 4, 8 and 16 bits   the standard's (blocked) ``DequantizeLinear`` before the product
FP4 and FP8                    onnxruntime's products for CUDA where the target has them
                               (:mod:`onnxq.passes.lower.block_scaled`)
all else                       a model-local function (:mod:`onnxq.passes.lower.decode`)
=============================  ===============================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.errors import InternalError, PreconditionError
from onnxq.formats import IntFormat, parse_format
from onnxq.formats.integer import Scheme
from onnxq.formats.packing import pack_bits
from onnxq.graph.edit import Names, add_initializer, insert_before, replace_value
from onnxq.graph.match import Linear
from onnxq.graph.spill import spilled, spilled_parts
from onnxq.passes.lower.block_scaled import lower_to_block_scaled, misfit
from onnxq.passes.lower.decode import lower_to_decode
from onnxq.passes.lower.weights import (
    CHUNK,
    grid_format,
    integer_format,
    nearest_parts,
    quantize_weight,
    take_rounded,
    to_nearest,
    weight_as_read,
)
from onnxq.passes.naming import about
from onnxq.passes.plan import SitePlan, WeightPlan
from onnxq.passes.targets import Target
from onnxq.passes.weights.rounded import RoundedWeight

Array = npt.NDArray[Any]

CONTRIB = "com.microsoft"
INT8_COMPUTE = 4
"""``accuracy_level`` at which MatMulNBits rounds activations to int8 a block: its fast path."""


def lower_weight_only(
    model: ir.Model, linear: Linear, site: SitePlan, target: Target, rounded: RoundedWeight | None
) -> str:
    """Pack one layer's weight, as a solver rounded it or to nearest; returns what was done."""
    plan = site.weight
    if plan is None:
        raise InternalError("PLAN-WEIGHT", f"{site.site} has no weight plan")
    with about(site.site):
        return _lower(model, linear, plan, target, rounded)


def lower_decoded(
    model: ir.Model, linear: Linear, site: SitePlan, rounded: RoundedWeight | None
) -> str:
    """Store one layer's weight in codes that are decoded for a product in float."""
    plan = site.weight
    if plan is None:
        raise InternalError("PLAN-WEIGHT", f"{site.site} has no weight plan")
    fmt = grid_format(plan)
    with about(site.site):
        if isinstance(fmt, IntFormat) and fmt.bits in (8, 16) and not plan.block:
            return _lower_to_dequantize(model, linear, plan, rounded)  # half the time to load
        if rounded is None:
            rounded = to_nearest(_rows(linear), fmt, plan)
        return f"{plan.format} weights: {lower_to_decode(model, linear, rounded, fmt.bits)}"


def _lower(
    model: ir.Model,
    linear: Linear,
    plan: WeightPlan,
    target: Target,
    rounded: RoundedWeight | None,
) -> str:
    fmt = parse_format(plan.format)
    real_zero = rounded is not None and rounded.zero_point.dtype == np.float32
    if isinstance(fmt, IntFormat):
        form = target.form_of(fmt, plan.block, real_zero=real_zero)
        if form == "MatMulNBits":
            return _lower_to_nbits(model, linear, plan, fmt.bits, rounded)
        if form != "function":
            return _lower_to_dequantize(model, linear, plan, rounded)
        fmt = dataclasses.replace(fmt, block=0, scheme="sym" if plan.symmetric else "asym")
        form = "function"
    else:
        form = target.form_of(fmt, plan.block)
    if rounded is None:
        rounded = to_nearest(_rows(linear), fmt, plan)
    why = ""
    if form == "block-scaled":
        reason = misfit(rounded)
        if reason is None:
            return f"{plan.format}: {lower_to_block_scaled(model, linear, rounded)}"
        why = f" (not packed for CUDA: {reason})"
    what = lower_to_decode(model, linear, rounded, fmt.bits)
    return f"{plan.format}: {what}{why}"


def _rows(linear: Linear) -> npt.NDArray[np.float32]:
    """The weight as ``[N, K]``; a view of how it is stored."""
    return linear.w if linear.in_axis == 1 else linear.w.T


def _lower_to_nbits(
    model: ir.Model, linear: Linear, plan: WeightPlan, bits: int, rounded: RoundedWeight | None
) -> str:
    graph = model.graph
    names = Names(graph)
    parts: Iterable[RoundedWeight]
    if rounded is None:
        # Signed scales put the largest weight on the lowest code: up to 1 dB at 4 bits.
        scheme: Scheme = "full" if plan.symmetric else "asym"
        fmt = dataclasses.replace(integer_format(plan.format), block=0, scheme=scheme)
        parts = nearest_parts(_rows(linear), fmt, plan)
    else:
        parts = [rounded]
    base = f"{linear.name}_weight"
    # MatMulNBits reads unsigned codes: a signed format's zero becomes the middle.
    shift = 1 << (bits - 1) if integer_format(plan.format).signed else 0
    found: tuple[list[Array], list[Array]] = ([], [])

    def pack() -> Iterator[Array]:
        for part in parts:
            # The kernel subtracts zero points in float: only a scale of 0 makes a block of zeros
            # exact.
            found[0].append(np.where(_is_zero(part, plan.block), np.float32(0), part.scale))
            found[1].append(part.zero_point)
            yield _pack_blocks(part.codes, shift, plan.block, bits)

    blocks = -(-linear.in_features // plan.block)
    shape = (linear.out_features, blocks, plan.block * bits // 8)
    packed = add_initializer(
        graph, names.fresh(f"{base}_packed"), spilled_parts(pack(), np.dtype(np.uint8), shape)
    )
    scale, zeros = np.concatenate(found[0]), np.concatenate(found[1])
    scales = add_initializer(graph, names.fresh(f"{base}_scale"), spilled(scale))
    zero = None
    if zeros.dtype == np.float32:
        real = zeros.astype(np.float32) + np.float32(shift)
        zero = add_initializer(graph, names.fresh(f"{base}_zero_point"), real)
    elif not plan.symmetric:
        zero = add_initializer(
            graph,
            names.fresh(f"{base}_zero_point"),
            _pack_zero_points(zeros.astype(np.int16) + shift, bits),
        )
    bias = None
    if linear.b is not None:
        bias = add_initializer(graph, names.fresh(f"{linear.name}_bias"), linear.b)
    node = ir.Node(
        CONTRIB,
        "MatMulNBits",
        [linear.node.inputs[0], packed, scales, zero, None, bias],
        [
            ir.AttrInt64("K", linear.in_features),
            ir.AttrInt64("N", linear.out_features),
            ir.AttrInt64("bits", bits),
            ir.AttrInt64("block_size", plan.block),
            ir.AttrInt64("accuracy_level", INT8_COMPUTE),
        ],
        num_outputs=1,
        name=names.fresh(f"{linear.name}_MatMulNBits"),
    )
    out = node.outputs[0]
    out.name = names.fresh(f"{linear.name}_MatMulNBits_output")
    out.type, out.shape = linear.output.type, linear.output.shape
    insert_before(linear.node, node)
    replace_value(linear.output, out)
    if linear.bias_add is not None:
        graph.remove(linear.bias_add, safe=True)
    graph.remove(linear.node, safe=True)
    model.opset_imports.setdefault(CONTRIB, 1)
    return f"MatMulNBits, {plan.format} in blocks of {plan.block}"


def _is_zero(weight: RoundedWeight, block: int) -> npt.NDArray[np.bool_]:
    """Whether all codes of a block, ``[N, blocks]``, stand for zero."""
    rows, groups = weight.scale.shape[0], weight.scale.shape[1]
    found = np.ones((rows, groups), np.bool_)
    for group in range(groups):
        columns = weight.codes[:, group * block : (group + 1) * block]
        found[:, group] = (columns == weight.zero_point[:, group, None]).all(axis=1)
    return found


def _pack_blocks(
    codes: npt.NDArray[np.generic], shift: int, block: int, bits: int
) -> npt.NDArray[np.uint8]:
    """``[N, K]`` codes, made unsigned by ``shift``, to ``[N, blocks, block * bits / 8]`` bytes."""
    n, k = codes.shape
    blocks = -(-k // block)
    fields = 8 // bits
    packed = np.empty((n, blocks * block // fields), np.uint8)
    step = max(1, CHUNK // k)
    for start in range(0, n, step):
        part = codes[start : start + step]
        filled = np.full((len(part), blocks * block), 1 << (bits - 1), np.uint8)
        filled[:, :k] = part.astype(np.int16) + shift
        low = filled[:, 0::fields]
        for field in range(1, fields):
            low = low | (filled[:, field::fields] << np.uint8(field * bits))
        packed[start : start + step] = low
    return packed.reshape(n, blocks, -1)


def _pack_zero_points(zero: npt.NDArray[np.int16], bits: int) -> npt.NDArray[np.uint8]:
    """``[N, blocks]`` unsigned zero points to ``[N, ceil(blocks * bits / 8)]`` bytes."""
    n, blocks = zero.shape
    per_byte = 8 // bits
    width = -(-blocks // per_byte)
    padded = np.zeros((n, width * per_byte), np.int16)
    padded[:, :blocks] = zero
    return np.frombuffer(pack_bits(padded, bits), np.uint8).reshape(n, width)


def _lower_to_dequantize(
    model: ir.Model, linear: Linear, plan: WeightPlan, rounded: RoundedWeight | None
) -> str:
    """Keep the product and let it read dequantized codes."""
    graph = model.graph
    names = Names(graph)
    fmt = integer_format(plan.format)
    opset = model.opset_imports.get("", 0)
    needed = 21 if plan.block or fmt.bits not in (8,) else 13
    if opset < needed:
        raise PreconditionError(
            "PASS-OPSET",
            f"`qdq`: {plan.format} weights{' in blocks' if plan.block else ''} need opset "
            f"{needed}; the model has {opset}",
            f"put `canonicalize{{opset={needed}}}` first",
        )
    array, in_axis, out_axis = weight_as_read(linear)
    if rounded is None:
        weight = quantize_weight(array, plan, in_axis=in_axis, out_axis=out_axis)
    else:
        weight = take_rounded(rounded, plan, in_axis=in_axis)
    base = f"{linear.name}_weight"
    inputs = [
        add_initializer(graph, names.fresh(f"{base}_{what}"), data)
        for what, data in (
            ("quantized", weight.codes),
            ("scale", weight.scale),
            ("zero_point", weight.zero_point),
        )
    ]
    attributes: dict[str, int] = {} if weight.axis is None else {"axis": weight.axis}
    if plan.block:
        attributes["block_size"] = plan.block
    node = ir.node(
        "DequantizeLinear", inputs, attributes, name=names.fresh(f"{base}_DequantizeLinear")
    )
    out = node.outputs[0]
    out.name = names.fresh(f"{base}_dequantized")
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
    insert_before(linear.node, node)
    linear.node.replace_input_with(linear.weight_index, out)
    blocks = f" in blocks of {plan.block}" if plan.block else ""
    return f"DequantizeLinear, {plan.format}{blocks}"
