"""Embedding tables in integers.

Without blocks, one scale a row: rows are gathered as codes together with their scales, so that the
float table never exists::

    y = Cast(Gather(codes, ids)) * Gather(scales, ids)

Targets that take integers only next to Q/DQ get ``Gather(DequantizeLinear(codes), ids)`` instead.

In blocks, onnxruntime's ``GatherBlockQuantized``, whose codes lie as those of ``MatMulNBits`` do.
So a tied output layer and its table may be one tensor.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.errors import InternalError, UnsupportedError
from onnxq.formats.packing import pack_bits
from onnxq.graph.edit import Names, add_initializer, insert_before, replace_value
from onnxq.graph.match import Embedding
from onnxq.graph.match.values import value_name
from onnxq.passes.lower.weights import (
    QuantizedWeight,
    integer_format,
    quantize_weight,
    to_nearest,
)
from onnxq.passes.plan import SitePlan, WeightPlan
from onnxq.passes.targets import Target

CONTRIB = "com.microsoft"
BLOCK_BITS = (2, 4, 8)


def lower_embedding(graph: ir.Graph, embedding: Embedding, site: SitePlan, target: Target) -> str:
    """Replace one Gather; returns what was done, for the report."""
    table = embedding.table.const_value
    if site.weight is None or table is None:
        raise InternalError("PLAN-WEIGHT", f"{site.site} has no weight plan or no constant table")
    if site.weight.block:
        return _lower_blocks(graph, embedding, site.weight)
    weight = quantize_weight(
        np.asarray(table.numpy(), np.float32), site.weight, in_axis=1, out_axis=0
    )
    names = Names(graph)
    codes = add_initializer(graph, names.fresh(f"{embedding.name}_table_quantized"), weight.codes)
    if target.embedding == "rows":
        nodes = _rows_of_codes(graph, embedding, codes, weight.scale, names)
    else:
        nodes = _between_qdq(
            graph, embedding, codes, weight, names, requantize=target.embedding == "codes"
        )
    output = nodes[-1].outputs[0]
    output.type, output.shape = embedding.output.type, embedding.output.shape
    insert_before(embedding.node, nodes)
    replace_value(embedding.output, output)
    graph.remove(embedding.node, safe=True)
    scales = "row" if site.weight.per_channel else "table"
    return f"{site.weight.format} table, one scale a {scales}"


def _rows_of_codes(
    graph: ir.Graph,
    embedding: Embedding,
    codes: ir.Value,
    scale: npt.NDArray[np.float32],
    names: Names,
) -> list[ir.Node]:
    base = embedding.name
    scales = add_initializer(graph, names.fresh(f"{base}_table_scale"), scale.reshape(-1, 1))
    rows = ir.node(
        "Gather", [codes, embedding.indices], {"axis": 0}, name=names.fresh(f"{base}_rows")
    )
    row_scales = ir.node(
        "Gather", [scales, embedding.indices], {"axis": 0}, name=names.fresh(f"{base}_row_scales")
    )
    cast = ir.node(
        "Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT}, name=names.fresh(f"{base}_cast")
    )
    scaled = ir.node(
        "Mul", [cast.outputs[0], row_scales.outputs[0]], name=names.fresh(f"{base}_scaled")
    )
    return [rows, row_scales, cast, scaled]


def _between_qdq(
    graph: ir.Graph,
    embedding: Embedding,
    codes: ir.Value,
    weight: QuantizedWeight,
    names: Names,
    *,
    requantize: bool,
) -> list[ir.Node]:
    """``Gather`` behind DequantizeLinear, and Q/DQ on the same scale behind it if asked for.

    The second pair changes no number: what it rounds lies on its grid. Runtimes that match a node
    between Q/DQ then gather codes.
    """
    base = embedding.name
    scale = add_initializer(graph, names.fresh(f"{base}_table_scale"), weight.scale)
    zero = add_initializer(graph, names.fresh(f"{base}_table_zero_point"), weight.zero_point)
    attributes = {} if weight.axis is None else {"axis": weight.axis}
    table = ir.node(
        "DequantizeLinear",
        [codes, scale, zero],
        attributes,
        name=names.fresh(f"{base}_table_DequantizeLinear"),
    )
    gather = ir.node(
        "Gather", [table.outputs[0], embedding.indices], {"axis": 0}, name=names.fresh(base)
    )
    nodes = [table, gather]
    if requantize:
        for op_type in ("QuantizeLinear", "DequantizeLinear"):
            name = names.fresh(f"{base}_{op_type}")
            nodes.append(ir.node(op_type, [nodes[-1].outputs[0], scale, zero], name=name))
    return nodes


def _lower_blocks(graph: ir.Graph, embedding: Embedding, plan: WeightPlan) -> str:
    """``GatherBlockQuantized`` on a table of its own, or on the codes of ``plan.same_as``."""
    bits = integer_format(plan.format).bits
    names = Names(graph)
    nodes: list[ir.Node] = []
    if plan.same_as:
        codes, scales = _shared(graph, embedding, plan, names, nodes)
        what = f"{plan.format} in blocks of {plan.block}, one table with {plan.same_as}"
    else:
        codes, scales = _own(graph, embedding, plan, names)
        what = f"GatherBlockQuantized, {plan.format} in blocks of {plan.block}"
    gather = ir.node(
        "GatherBlockQuantized",
        [codes, embedding.indices, scales],
        {"bits": bits, "block_size": plan.block, "gather_axis": 0, "quantize_axis": 1},
        domain=CONTRIB,
        name=names.fresh(f"{embedding.name}_GatherBlockQuantized"),
    )
    gather.outputs[0].type, gather.outputs[0].shape = embedding.output.type, embedding.output.shape
    insert_before(embedding.node, [*nodes, gather])
    replace_value(embedding.output, gather.outputs[0])
    graph.remove(embedding.node, safe=True)
    graph.opset_imports.setdefault(CONTRIB, 1)
    return what


def _own(
    graph: ir.Graph, embedding: Embedding, plan: WeightPlan, names: Names
) -> tuple[ir.Value, ir.Value]:
    table = embedding.table.const_value
    assert table is not None
    rows = np.asarray(table.numpy(), np.float32)
    fmt = integer_format(plan.format)
    if fmt.bits not in BLOCK_BITS or not plan.symmetric or rows.shape[1] % plan.block:
        raise UnsupportedError(
            "TARGET-EMBEDDING",
            f"{embedding.name}: GatherBlockQuantized has symmetric codes of 2, 4 and 8 bits, and "
            f"blocks that divide the row; not {plan.format} in blocks of {plan.block} for rows "
            f"of {rows.shape[1]}",
            "use int4 or int8, or another block",
        )
    found = to_nearest(rows, dataclasses.replace(fmt, block=0, scheme="full"), plan)
    shift = 1 << (fmt.bits - 1) if fmt.signed else 0
    unsigned = found.codes.astype(np.int16) + shift
    packed = np.frombuffer(pack_bits(unsigned, fmt.bits), np.uint8).reshape(rows.shape[0], -1)
    return (
        add_initializer(graph, names.fresh(f"{embedding.name}_table_packed"), packed),
        add_initializer(graph, names.fresh(f"{embedding.name}_table_scale"), found.scale),
    )


def _shared(
    graph: ir.Graph, embedding: Embedding, plan: WeightPlan, names: Names, nodes: list[ir.Node]
) -> tuple[ir.Value, ir.Value]:
    """The codes of a layer that was lowered before, in the shape of a table."""
    packed = graph.initializers.get(f"{plan.same_as}_weight_packed")
    scales = graph.initializers.get(f"{plan.same_as}_weight_scale")
    if packed is None or scales is None or packed.const_value is None:
        raise UnsupportedError(
            "TARGET-EMBEDDING",
            f"{value_name(embedding.table)} cannot share codes with {plan.same_as}: that layer "
            "was not packed for MatMulNBits",
            "choose a target with MatMulNBits, or leave share out",
        )
    shape = add_initializer(
        graph,
        names.fresh(f"{embedding.name}_table_shape"),
        np.array([packed.const_value.shape[0], -1], np.int64),
    )
    flat = ir.node("Reshape", [packed, shape], name=names.fresh(f"{embedding.name}_table"))
    nodes.append(flat)
    return flat.outputs[0], scales
