"""The error function, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import POWERS, erf
from onnxq.custom_ops.integer_schema import ERF
from onnxq.custom_ops.registry import DOMAIN, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
erf after I-BERT (arXiv 2101.01321, section 3.3): a polynomial up to a point from which on erf is
1.

`x: [...]` i32 → `y: [...]` i32:

```
r = min(|x|, bound) - bound        (-bound <= r <= 0)
```
```
z = p4
z = ⌊z · r / 2^s3⌋ + p3;   z = ⌊z · r / 2^s2⌋ + p2
z = ⌊z · r / 2^s1⌋ + p1;   z = ⌊z · r / 2^s0⌋ + p0
```
```
y = ⌊sign(x) · z / 2^erf_shift⌋
```

With p4 = p3 = p1 = 0, p2 = 1 and no shifts, z is I-BERT's r² + p0, p0 negative, and so is the
scale of y. `onnxq.solvers.integer_only.erf_constants` computes the attributes and the scale.

- sign(0) = 0.
- Errors: the bound is not from 1 to 32768; z or a product z · r leaves int32 for some r; a shift
  is not from 0 to 31.
"""

_INT32 = onnx.TensorProto.INT32
_INT64 = onnx.TensorProto.INT64


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    table = onnx.numpy_helper.from_array(POWERS, "powers")

    @script(domain, default_opset=op)
    def IntegerErf(
        x,
        bound: int,
        p4: int,
        p3: int,
        p2: int,
        p1: int,
        p0: int,
        s3: int,
        s2: int,
        s1: int,
        s0: int,
        erf_shift: int,
    ):
        powers = op.Constant(value=table)
        x64 = op.Cast(x, to=_INT64)
        clip = op.Constant(value_int=bound)
        magnitude = op.Abs(x64)
        r = op.Sub(op.Where(op.Greater(magnitude, clip), clip, magnitude), clip)
        z4 = op.Constant(value_int=p4)
        z3 = op.Mul(z4, r)
        u3 = op.Gather(powers, op.Constant(value_int=s3))
        z3 = op.Add(op.Div(op.Sub(z3, op.Mod(z3, u3)), u3), op.Constant(value_int=p3))
        z2 = op.Mul(z3, r)
        u2 = op.Gather(powers, op.Constant(value_int=s2))
        z2 = op.Add(op.Div(op.Sub(z2, op.Mod(z2, u2)), u2), op.Constant(value_int=p2))
        z1 = op.Mul(z2, r)
        u1 = op.Gather(powers, op.Constant(value_int=s1))
        z1 = op.Add(op.Div(op.Sub(z1, op.Mod(z1, u1)), u1), op.Constant(value_int=p1))
        z0 = op.Mul(z1, r)
        u0 = op.Gather(powers, op.Constant(value_int=s0))
        z0 = op.Add(op.Div(op.Sub(z0, op.Mod(z0, u0)), u0), op.Constant(value_int=p0))
        signed = op.Mul(op.Sign(x64), z0)
        power = op.Gather(powers, op.Constant(value_int=erf_shift))
        y = op.Cast(op.Div(op.Sub(signed, op.Mod(signed, power)), power), to=_INT32)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerErf.to_function_proto()
    return proto


def reference(x: Array, **attributes: int) -> tuple[Array]:
    """See the operator's documentation."""
    return (erf(x.astype(np.int64), attributes).astype(np.int32),)


OPERATOR = Operator(
    name="IntegerErf",
    doc=_DOC,
    inputs={"x": "`[...]` i32"},
    outputs={"y": "`[...]` i32"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=ERF,
)
