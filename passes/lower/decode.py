"""Weights in any format, decoded by standard operators in a model-local function.

Codes of b bits are cut into planes of 8, 4, 2 and 1 bits (6 = 4 + 2), so that bytes are full::

    code   = plane_0 + plane_1 << bits of plane_0 + ...
    weight = levels[code] * scale        or (code - zero) * scale for integers

``[N, K]`` weights are stored as ``N * G`` rows of ``group`` codes, the last group of a channel
filled up. Scales keep the format's own type: float32, E4M3, or E8M0 as bytes. onnxruntime folds the
whole function when it loads a model: the file is small, the speed that of a float model.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
from ml_dtypes import float8_e4m3fn

from onnxq.errors import PreconditionError
from onnxq.formats.packing import pack_bits
from onnxq.graph.edit import Names, add_initializer, insert_before
from onnxq.graph.match import Linear
from onnxq.passes.lower.weights import weight_as_read
from onnxq.passes.weights.rounded import RoundedWeight

DOMAIN = "com.onnxq.decode"
OPSET = 19
"""Oldest opset with the bit operations and the 8-bit floats that a body needs."""

_FLOAT, _INT32 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.INT32)


def planes_of(bits: int) -> list[int]:
    """Widths that add up to ``bits`` (1 to 8, or 16), the lowest bits first."""
    if bits == 16:
        return [8, 8]
    return [width for width in (8, 4, 2, 1) if bits & width]


def lower_to_decode(model: ir.Model, linear: Linear, weight: RoundedWeight, bits: int) -> str:
    """Let ``linear`` read a weight that a function decodes; returns what was done.

    Raises:
        PreconditionError: the model's opset has not all operators that the function needs.
    """
    opset = model.opset_imports.get("", 0)
    if opset < OPSET:
        raise PreconditionError(
            "PASS-OPSET",
            f"`qdq`: {linear.name}: decoding weights of this format needs opset {OPSET}; "
            f"the model has {opset}",
            f"put `canonicalize{{opset={OPSET}}}` first",
        )
    graph = model.graph
    names = Names(graph)
    base = f"{linear.name}_weight"
    rows, columns = weight.codes.shape
    groups = weight.scale.shape[1]
    padded = np.zeros((rows, groups * weight.group), np.int32)
    low = int(weight.codes.min(initial=0)) if weight.levels is None else 0
    low = -(1 << (bits - 1)) if low < 0 else 0
    padded[:, :columns] = weight.codes.astype(np.int32) - low
    inputs = [
        add_initializer(graph, names.fresh(f"{base}_plane{number}"), plane)
        for number, plane in enumerate(_planes(padded, bits))
    ]
    inputs.append(add_initializer(graph, names.fresh(f"{base}_scale"), _stored_scale(weight)))
    if weight.levels is None:
        kind = "integer"
        zero = (weight.zero_point.astype(np.float32) - low).reshape(-1, 1)
        if (zero == zero.flat[0]).all():
            zero = zero[:1]
        elif float(zero.min()) >= 0 and (zero == np.rint(zero)).all() and zero.max() < 256:
            zero = zero.astype(np.uint8)
        inputs.append(add_initializer(graph, names.fresh(f"{base}_zero_point"), zero))
    else:
        kind = "table" if weight.levels.ndim == 1 else "books"
        levels = _stored_levels(weight.levels)
        inputs.append(add_initializer(graph, names.fresh(f"{base}_levels"), levels))
    name = f"Decode{bits}{kind.capitalize()}{weight.scale_type.capitalize()}"
    _attach(model, name, bits, kind, weight.scale_type)
    _, in_axis, _ = weight_as_read(linear)
    attributes: dict[str, int | float | list[int]] = {
        "count": padded.size,
        "grouped": [rows * groups, weight.group],
        "wide": [rows, groups * weight.group],
        "columns": [columns],
        "perm": [0, 1] if in_axis == 1 else [1, 0],
        "factor": float(np.float32(weight.factor)),
    }
    node = ir.node(name, inputs, attributes, domain=DOMAIN, name=names.fresh(f"{base}_{name}"))
    out = node.outputs[0]
    out.name = names.fresh(f"{base}_decoded")
    shape = (rows, columns) if in_axis == 1 else (columns, rows)
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    insert_before(linear.node, node)
    linear.node.replace_input_with(linear.weight_index, out)
    return f"codes of {bits} bits in groups of {weight.group}, decoded by standard operators"


def _planes(codes: npt.NDArray[np.int32], bits: int) -> list[npt.NDArray[np.uint8]]:
    found, done = [], 0
    for width in planes_of(bits):
        part = (codes >> done) & ((1 << width) - 1)
        found.append(np.frombuffer(pack_bits(part, width), np.uint8))
        done += width
    return found


def _stored_scale(weight: RoundedWeight) -> npt.NDArray[np.generic]:
    """``[N * G, 1]`` in the narrowest type of the format."""
    column = weight.scale.reshape(-1, 1)
    if weight.scale_type == "e8m0":
        return np.asarray(np.frexp(column)[1] - 1 + 127, np.uint8)
    return column.astype(float8_e4m3fn) if weight.scale_type == "e4m3" else column


def _stored_levels(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    """Codebooks come as float16 and stay so; a common table is small anyway."""
    half = levels.astype(np.float16)
    exact = bool((half.astype(np.float32) == levels).all())
    return half if levels.ndim == 2 and exact else levels


def _attach(model: ir.Model, name: str, bits: int, kind: str, scale_type: str) -> None:
    model.opset_imports[DOMAIN] = 1
    model.ir_version = max(model.ir_version, 8)
    function = ir.serde.deserialize_function(_function(name, bits, kind, scale_type))
    if function.identifier() not in model.functions:
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function


@functools.cache
def _function(name: str, bits: int, kind: str, scale_type: str) -> onnx.FunctionProto:
    """The body; see the module's text for what it computes."""
    planes = planes_of(bits)
    parts = [f"plane{number}" for number in range(len(planes))]
    third = "zero" if kind == "integer" else "levels"
    text = [
        f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">',
        f"{name} <count, grouped, wide, columns, perm, factor> "
        f"({', '.join(parts)}, scale, {third}) => (weight) {{",
        "minus = Constant <value_ints = [-1]> ()",
        "one = Constant <value_ints = [1]> ()",
        "start = Constant <value_ints = [0]> ()",
        "end_0 = Constant <value_int: int = @count> ()",
        "end = Reshape (end_0, one)",
    ]
    done = 0
    for part, width in zip(parts, planes, strict=True):
        shifts = ", ".join(str(s) for s in range(0, 8, width))
        text += [
            f"{part}_s0 = Constant <value_ints = [{shifts}]> ()",
            f"{part}_s = Cast <to = {int(onnx.TensorProto.UINT8)}> ({part}_s0)",
            f"{part}_m0 = Constant <value_int = {(1 << width) - 1}> ()",
            f"{part}_m = Cast <to = {int(onnx.TensorProto.UINT8)}> ({part}_m0)",
            f"{part}_c = Unsqueeze ({part}, one)",
            f'{part}_f = BitShift <direction = "RIGHT"> ({part}_c, {part}_s)',
            f"{part}_a = BitwiseAnd ({part}_f, {part}_m)",
            f"{part}_w = Cast <to = {_INT32}> ({part}_a)",
            f"{part}_r = Reshape ({part}_w, minus)",
            f"{part}_k = Slice ({part}_r, start, end)",
        ]
        if done:
            text += [
                f"{part}_p0 = Constant <value_int = {1 << done}> ()",
                f"{part}_p = Cast <to = {_INT32}> ({part}_p0)",
                f"{part}_u = Mul ({part}_k, {part}_p)",
                f"sum{done + width} = Add (sum{done}, {part}_u)",
            ]
        else:
            text.append(f"sum{width} = Identity ({part}_k)")
        done += width
    text += [
        "rows = Constant <value_ints: ints = @grouped> ()",
        f"code = Reshape (sum{done}, rows)",
        *_decoded(kind),
        *_scaled(scale_type),
        "factor_ = Constant <value_float: float = @factor> ()",
        "steps = Mul (number, factor_)",
        "long = Mul (plain, steps)",
        "whole = Constant <value_ints: ints = @wide> ()",
        "filled = Reshape (long, whole)",
        "last = Constant <value_ints: ints = @columns> ()",
        "exact = Slice (filled, start, last, one)",
        "weight = Transpose <perm: ints = @perm> (exact)",
        "}",
    ]
    return onnx.parser.parse_function("\n".join(text))


def _decoded(kind: str) -> list[str]:
    if kind == "integer":
        return [
            f"wide_code = Cast <to = {_FLOAT}> (code)",
            f"wide_zero = Cast <to = {_FLOAT}> (zero)",
            "plain = Sub (wide_code, wide_zero)",
        ]
    read = "GatherElements <axis = 1>" if kind == "books" else "Gather"
    return [f"table = Cast <to = {_FLOAT}> (levels)", f"plain = {read} (table, code)"]


def _scaled(scale_type: str) -> list[str]:
    if scale_type != "e8m0":
        return [f"number = Cast <to = {_FLOAT}> (scale)"]
    return [
        f"biased = Cast <to = {_FLOAT}> (scale)",
        "bias = Constant <value_float = 127.0> ()",
        "exponent = Sub (biased, bias)",
        "two = Constant <value_float = 2.0> ()",
        "number = Pow (two, exponent)",
    ]
