"""The exponential of numbers that are not positive, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import POWERS, exponential
from onnxq.custom_ops.integer_schema import exponential as exp_attributes
from onnxq.custom_ops.registry import DOMAIN, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
exp of numbers that are not positive, after I-BERT (arXiv 2101.01321, section 3.4): as many
halvings as fit, and a polynomial of what remains.

`x: [...]` i32 in steps of S → `y: [...]` i32 in steps of 1/32767:

```
c = min(-min(x, 0), 30 · ln2);   k = ⌊c / ln2⌋;   r = k · ln2 - c        (-ln2 < r <= 0)
```
```
z = p4
z = ⌊z · r / 2^s3⌋ + p3;   z = ⌊z · r / 2^s2⌋ + p2
z = ⌊z · r / 2^s1⌋ + p1;   z = ⌊z · r / 2^s0⌋ + p0
```
```
y = round(z · multiplier / 2^(shift + k))            (halves up; 0 where shift + k > 62)
```

With p4 = p3 = 0, p2 = 1 and no shifts, z is I-BERT's polynomial r(r + p1) + p0 and z · 2^(30 - k)
its integer result; its requantization to 16 bits follows.
`onnxq.solvers.integer_only.exp_constants` computes the attributes from S. The error is at most
2e-3 with I-BERT's polynomial for S <= 1e-3; beyond, rounding ln 2 to whole steps adds up to S / 2,
as it does to the 1e-4 of degree 3 and 4. Coarser x are to be shifted left first.

- Positive x counts as 0.
- Errors: ln2 is not from 1 to 65536; z is negative, or reaches 2^30, for some r; a product z · r
  leaves int32; the multiplier is not from 1 to 2^31 - 1; the shift is not from 14 to 46; exp(0)
  exceeds 32767.
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
    def IntegerExp(
        x,
        ln2: int,
        p4: int,
        p3: int,
        p2: int,
        p1: int,
        p0: int,
        s3: int,
        s2: int,
        s1: int,
        s0: int,
        multiplier: int,
        shift: int,
    ):
        powers = op.Constant(value=table)
        two = op.Constant(value_int=2)
        step = op.Constant(value_int=ln2)
        x64 = op.Cast(x, to=_INT64)
        zero = op.Constant(value_int=0)
        reach = op.Mul(step, op.Constant(value_int=-30))
        least = op.Where(op.Less(x64, reach), reach, x64)
        distance = op.Neg(op.Where(op.Greater(least, zero), zero, least))
        halvings = op.Div(distance, step)
        r = op.Sub(op.Mul(halvings, step), distance)
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
        places = op.Min(op.Add(halvings, op.Constant(value_int=shift)), op.Constant(value_int=62))
        power = op.Gather(powers, places)
        product = op.Mul(z0, op.Constant(value_int=multiplier))
        raised = op.Add(product, op.Div(power, two))
        y = op.Cast(op.Div(raised, power), to=_INT32)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerExp.to_function_proto()
    return proto


def reference(x: Array, **attributes: int) -> tuple[Array]:
    """See the operator's documentation."""
    return (exponential(x.astype(np.int64), attributes).astype(np.int32),)


OPERATOR = Operator(
    name="IntegerExp",
    doc=_DOC,
    inputs={"x": "`[...]` i32"},
    outputs={"y": "`[...]` i32"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=exp_attributes(),
)
