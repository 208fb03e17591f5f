"""Rows of an integer table, each with a scale of its own, brought to one scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import POWERS, rescale
from onnxq.custom_ops.registry import DOMAIN, Attribute, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
Looks up rows of an 8-bit table and brings them, each with a factor of its own, to one scale.

```
y[..., :] = clip(round(table[i, :] · multiplier[i] / 2^shift), low, high),   i = indices[...]
```

`indices: [...]` i64; `table: [V, D]` i8; `multiplier: [V]` i32; `y: [..., D]` i16.

- Indices below 0 count from the end.
- Rounding is half up.
- Errors: an index is not from -V to V - 1; the multiplier has not V elements; the shift is not
  from 1 to 62.
"""

_INT16 = onnx.TensorProto.INT16
_INT64 = onnx.TensorProto.INT64


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    table_of_powers = onnx.numpy_helper.from_array(POWERS, "powers")

    @script(domain, default_opset=op)
    def IntegerEmbedding(indices, table, multiplier, shift: int, low: int, high: int):
        rows = op.Cast(op.Gather(table, indices), to=_INT64)
        factor = op.Cast(op.Gather(multiplier, indices), to=_INT64)
        power = op.Gather(op.Constant(value=table_of_powers), op.Constant(value_int=shift))
        half = op.Div(power, op.Constant(value_int=2))
        last = op.Constant(value_ints=[-1])
        raised = op.Add(op.Mul(rows, op.Unsqueeze(factor, last)), half)
        rounded = op.Div(op.Sub(raised, op.Mod(raised, power)), power)
        least = op.Constant(value_int=low)
        most = op.Constant(value_int=high)
        capped = op.Where(op.Greater(rounded, most), most, rounded)
        clipped = op.Where(op.Less(capped, least), least, capped)
        y = op.Cast(clipped, to=_INT16)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerEmbedding.to_function_proto()
    return proto


def reference(
    indices: Array, table: Array, multiplier: Array, *, shift: int, low: int, high: int
) -> tuple[Array]:
    """See the operator's documentation."""
    moved = rescale(table[indices], multiplier[indices][..., None], shift)
    return (np.clip(moved, low, high).astype(np.int16),)


OPERATOR = Operator(
    name="IntegerEmbedding",
    doc=_DOC,
    inputs={
        "indices": "`[...]` i64",
        "table": "`[V, D]` i8",
        "multiplier": "`[V]` i32",
    },
    outputs={"y": "`[..., D]` i16"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=(
        Attribute("shift", "INT", "of every row's factor, 1 to 62"),
        Attribute("low", "INT", "least value of y"),
        Attribute("high", "INT", "largest value of y"),
    ),
)
