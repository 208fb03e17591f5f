"""Embedding tables in integers, one scale a row.

Rows are gathered as codes together with their scales, so the float table never exists::

    y = Cast(Gather(codes, ids)) * Gather(scales, ids)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxq.errors import InternalError
from onnxq.graph.edit import Names, add_initializer, insert_before, replace_value
from onnxq.graph.match import Embedding
from onnxq.passes.lower.weights import quantize_weight
from onnxq.passes.plan import SitePlan


def lower_embedding(graph: ir.Graph, embedding: Embedding, site: SitePlan) -> str:
    """Replace one Gather; returns what was done, for the report."""
    table = embedding.table.const_value
    if site.weight is None or table is None:
        raise InternalError("PLAN-WEIGHT", f"{site.site} has no weight plan or no constant table")
    weight = quantize_weight(
        np.asarray(table.numpy(), np.float32), site.weight, in_axis=1, out_axis=0
    )
    names = Names(graph)
    base = embedding.name
    codes = add_initializer(graph, names.fresh(f"{base}_table_quantized"), weight.codes)
    scales = add_initializer(graph, names.fresh(f"{base}_table_scale"), weight.scale.reshape(-1, 1))
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
    scaled.outputs[0].type, scaled.outputs[0].shape = embedding.output.type, embedding.output.shape
    insert_before(embedding.node, [rows, row_scales, cast, scaled])
    replace_value(embedding.output, scaled.outputs[0])
    graph.remove(embedding.node, safe=True)
    return f"{site.weight.format} table, one scale a row"
