"""Tied tables: an output layer that reads the embedding through a Transpose is packed as well."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxq.passes.decide.assign import Assign
from onnxq.passes.lower.qdq import Qdq

from .. import helpers as h

ROWS, D = 2048, 64
TABLE = h.normal(ROWS, D, seed=7)
TIED = f"""g (int64[T] ids) => (float[T,{ROWS}] logits) {{
    e = Gather(table, ids)  t = Transpose<perm = [1, 0]>(table)  logits = MatMul(e, t) }}"""
IDS = {"ids": np.array([3, 900, 2047, 0, 3])}
W4 = Assign(mode="weight-only", weights="int4", block=32)


def tied_model() -> ir.Model:
    return h.model_of(TIED, {"table": TABLE}, opset=21)


def test_both_readers_of_a_tied_table_get_codes_and_the_float_table_goes() -> None:
    model = tied_model()
    after = h.apply(model, W4, Qdq()).model
    assert h.ops(after)["MatMulNBits"] == 1
    assert h.ops(after)["Transpose"] == 0
    assert not [
        v
        for v in after.graph.initializers.values()
        if v.dtype == ir.DataType.FLOAT
        and v.const_value is not None
        and v.const_value.size == TABLE.size
    ]
    error = h.relative_error(h.run(model, IDS)["logits"], h.run(after, IDS)["logits"])
    assert error < 0.12
