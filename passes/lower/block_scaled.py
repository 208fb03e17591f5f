"""FP4 and FP8 weights in the packed products that ONNX Runtime has for CUDA.

========================================  =====================================================
``MatMulBlockQuantizedFp4Weight``         ``B [N, K/2]`` bytes, two E2M1 codes each, the lower
                                          column in the low nibble; ``weight_scale [N, G]`` bytes
                                          of E4M3; ``weight_scale_2``, float32 for all
``MatMulBlockQuantizedFp8Weight``         ``B [N, K]`` E4M3; ``b_scale [N, G]`` float32
========================================  =====================================================

with ``G = ceil(K / block_size)`` and any block size, so that one scale a row is ``block_size = K``.
NVFP4 and FP8 are theirs as they stand. MXFP8's scales are float32 as well; MXFP4's powers of two
are E4M3 numbers times a common power if they span no more than 2^17. Activations become float16
around the product, and the kernels decode weights to float16. Neither has a kernel for the CPU.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from ml_dtypes import float4_e2m1fn, float8_e4m3fn

from onnxq.errors import UnsupportedError
from onnxq.graph.edit import Names, add_initializer, insert_before, replace_value
from onnxq.graph.match import Linear
from onnxq.graph.spill import spilled
from onnxq.passes.weights.rounded import RoundedWeight

Array = npt.NDArray[np.generic]

CONTRIB = "com.microsoft"
FP4 = "MatMulBlockQuantizedFp4Weight"
FP8 = "MatMulBlockQuantizedFp8Weight"

_E4M3_EXPONENTS = (-9, 8)
"""Powers of two that are E4M3 numbers."""
_BIAS = {FP4: 5, FP8: 4}
"""Which input of the operator is the bias."""
_FLOAT8_IR = 9
"""First ``ir_version`` with 8-bit floats."""


def misfit(weight: RoundedWeight) -> str | None:
    """Why neither operator can hold ``weight``; None if one can."""
    levels = weight.levels
    if levels is None or levels.ndim != 1:
        return "its codes are no FP4 or FP8 numbers"
    if len(levels) == 256 and _same(levels, float8_e4m3fn):
        return None
    if len(levels) != 16 or not _same(levels, float4_e2m1fn):
        return "its codes are no FP4 or FP8 numbers"
    if weight.codes.shape[1] % 2:
        return "its number of inputs is odd"
    if weight.scale_type != "e4m3" and _as_e4m3(weight) is None:
        return "its scales are no E4M3 numbers times a common power of two"
    return None


def _same(levels: npt.NDArray[np.float32], dtype: type) -> bool:
    """Whether code i stands for what ``dtype`` reads in the bits of i."""
    wide = np.uint8(len(levels) - 1)
    known = np.arange(int(wide) + 1, dtype=np.uint8).view(dtype).astype(np.float32)
    return bool(np.array_equal(levels, known, equal_nan=True))


def _as_e4m3(weight: RoundedWeight) -> tuple[Array, float] | None:
    """Scales as E4M3 times a factor; None if they are not."""
    if weight.scale_type == "e4m3":
        return weight.scale.astype(float8_e4m3fn), weight.factor
    zero = (weight.codes & 7 == 0) if weight.codes.size else np.zeros((0, 0), np.bool_)
    rows, columns = weight.codes.shape
    starts = np.arange(0, columns, weight.group)
    used = ~np.logical_and.reduceat(zero, starts, axis=1)
    exponents = np.where(used, np.frexp(weight.scale)[1] - 1, 0)
    if not used.any():
        return np.zeros((rows, len(starts)), float8_e4m3fn), weight.factor
    low, high = _E4M3_EXPONENTS
    top = int(exponents[used].max())
    shifted = exponents - top + high
    if (shifted[used] < low).any() or (np.ldexp(1.0, exponents) != weight.scale)[used].any():
        return None
    scale = np.where(used, np.ldexp(np.float32(1), shifted), np.float32(0))
    return scale.astype(float8_e4m3fn), math.ldexp(weight.factor, top - high)


def lower_to_block_scaled(model: ir.Model, linear: Linear, weight: RoundedWeight) -> str:
    """Replace ``linear`` and its bias; ``weight`` must fit. Returns what was done."""
    graph, names = model.graph, Names(model.graph)
    base = f"{linear.name}_weight"
    assert weight.levels is not None
    half = len(weight.levels) == 16

    def constant(what: str, array: Array) -> ir.Value:
        return add_initializer(graph, names.fresh(f"{base}_{what}"), spilled(array))

    inputs: list[ir.Value | None]
    if half:
        found = _as_e4m3(weight)
        assert found is not None
        scale, factor = found
        packed = (weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4)).astype(np.uint8)
        inputs = [
            constant("packed", packed),
            constant("scale", scale.view(np.uint8)),
            constant("factor", np.array(factor, np.float32)),
            None,  # the scale of the activations, which only a later kernel will use
        ]
    else:
        scales = (weight.scale * np.float32(weight.factor)).astype(np.float32)
        codes = weight.codes.astype(np.uint8).view(float8_e4m3fn)
        inputs = [constant("codes", codes), constant("scale", scales)]
        if linear.b is not None:
            inputs.append(None)  # the scale of the activations, which would make them FP8
        model.ir_version = max(model.ir_version, _FLOAT8_IR)
    x = linear.node.inputs[0]
    assert x is not None
    narrow = _cast(x, ir.DataType.FLOAT16, names, f"{linear.name}_input")
    if linear.b is not None:
        inputs.append(add_initializer(graph, names.fresh(f"{linear.name}_bias"), _half(linear.b)))
    elif half:
        inputs.pop()
    kind = FP4 if half else FP8
    node = ir.node(
        kind,
        [narrow.outputs[0], *inputs],
        {"block_size": weight.group},
        domain=CONTRIB,
        name=names.fresh(f"{linear.name}_{kind}"),
    )
    node.outputs[0].name = names.fresh(f"{linear.name}_{kind}_output")
    wide = _cast(node.outputs[0], ir.DataType.FLOAT, names, linear.name)
    wide.outputs[0].shape = linear.output.shape
    insert_before(linear.node, [narrow, node, wide])
    replace_value(linear.output, wide.outputs[0])
    if linear.bias_add is not None:
        graph.remove(linear.bias_add, safe=True)
    graph.remove(linear.node, safe=True)
    model.opset_imports.setdefault(CONTRIB, 1)
    return f"{kind}, blocks of {weight.group}"


def _half(bias: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Raises UnsupportedError: larger than float16 can hold."""
    with np.errstate(over="ignore"):
        narrow = bias.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise UnsupportedError(
            "PASS-RANGE",
            f"a bias of {np.abs(bias).max():g} is beyond float16, in which this product computes",
            "leave this layer float with `partial`, or choose another target",
        )
    return narrow


def _cast(x: ir.Value, to: ir.DataType, names: Names, base: str) -> ir.Node:
    node = ir.node("Cast", [x], {"to": to}, name=names.fresh(f"{base}_Cast"))
    node.outputs[0].name = names.fresh(f"{base}_{to.name.lower()}")
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), x.shape
    return node


def decoded(node: ir.Node) -> npt.NDArray[np.float32]:
    """``[N, K]``: what the weight of one of the two operators stands for, read from its inputs."""
    arrays = [None if v is None or v.const_value is None else v.const_value.numpy()
              for v in node.inputs]  # fmt: skip
    codes, scale = arrays[1], arrays[2]
    assert codes is not None
    assert scale is not None
    block = node.attributes["block_size"].as_int()
    if node.op_type == FP4:
        nibbles = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
        values = nibbles.astype(np.uint8).view(float4_e2m1fn).astype(np.float32)
        factor = arrays[3]
        assert factor is not None
        wide = scale.view(float8_e4m3fn).astype(np.float32) * factor
    else:
        values, wide = codes.astype(np.float32), scale
    spread = np.repeat(wide, block, axis=1)[:, : values.shape[1]]
    return np.asarray(values * spread, np.float32)


def with_plain_products(model: ir.Model) -> bool:
    """Replace both operators by products of decoded weights, in float32; whether there were any.

    For a look at the results on a machine without CUDA. The kernels decode weights to the type of
    the activations, and so does this.
    """
    nodes = [n for n in model.graph if n.domain == CONTRIB and n.op_type in (FP4, FP8)]
    names = Names(model.graph)
    for node in nodes:
        x, name = node.inputs[0], str(node.name)
        assert x is not None
        values = decoded(node).astype(np.float16).astype(np.float32)
        weight = add_initializer(model.graph, names.fresh(f"{name}_decoded"), values.T.copy())
        wide = _cast(x, ir.DataType.FLOAT, names, f"{name}_wide")
        product = ir.node("MatMul", [wide.outputs[0], weight], name=names.fresh(f"{name}_MatMul"))
        product.outputs[0].name = names.fresh(f"{name}_product")
        steps = [wide, product]
        if len(node.inputs) > _BIAS[node.op_type]:
            bias = node.inputs[_BIAS[node.op_type]]
            assert bias is not None
            widened = _cast(bias, ir.DataType.FLOAT, names, f"{name}_bias")
            total = ir.node("Add", [product.outputs[0], widened.outputs[0]])
            total.name = names.fresh(f"{name}_Add")
            total.outputs[0].name = names.fresh(f"{name}_sum")
            steps += [widened, total]
        steps.append(_cast(steps[-1].outputs[0], ir.DataType.FLOAT16, names, f"{name}_narrow"))
        insert_before(node, steps)
        replace_value(node.outputs[0], steps[-1].outputs[0])
        read = [v for v in node.inputs[1:] if v is not None]
        model.graph.remove(node, safe=True)
        for value in read:
            if not value.uses():
                del model.graph.initializers[str(value.name)]
    return bool(nodes)
