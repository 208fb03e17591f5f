"""RMSNorm over the last axis, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxq.custom_ops.integer_math import POWERS, normalized, round_shift
from onnxq.custom_ops.integer_schema import NORM
from onnxq.custom_ops.registry import DOMAIN, Operator

Array = np.ndarray[Any, Any]

_DOC = """\
RMSNorm over the last axis after I-BERT (arXiv 2101.01321, section 3.5), with the learned scale
folded into dyadic factors.

```
v = x;   r = 2^shift · max(IntegerSqrt(Σ ⌊v / 2^shift⌋² + epsilon), 1)
f = ⌊2^31 / r⌋
y = clip(round((⌊v · f / 2⌋ · multiplier) / 2^out_shift), low, high)
```

`x: [..., D]` i16; `multiplier: [D]` i32 of any sign; `y: [..., D]` i16. ⌊v · f / 2⌋ has the scale
√D / 2^30 whatever that of x. A gamma of zero is a multiplier of zero.

- `shift` is I-BERT's, for machines whose sum of squares has 32 bits; 0 is exact in 64.
- Rounding is half up, but for ⌊.⌋.
- Errors: D is 0 or above 2^20; the multiplier has not D elements; the shift is not from 0 to 15,
  out_shift not from 1 to 62, epsilon not from 0 to 2^60.
"""

_INT16 = onnx.TensorProto.INT16
_INT64 = onnx.TensorProto.INT64


def _build_function() -> onnx.FunctionProto:
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, 1)
    table = onnx.numpy_helper.from_array(POWERS, "powers")

    @script(domain, default_opset=op)
    def IntegerRmsNorm(
        x, multiplier, shift: int, epsilon: int, out_shift: int, low: int, high: int
    ):
        powers = op.Constant(value=table)
        last = op.Constant(value_ints=[-1])
        wide = op.Cast(x, to=_INT64)
        v = op.Identity(wide)
        step = op.Gather(powers, op.Constant(value_int=shift))
        coarse = op.Div(op.Sub(v, op.Mod(v, step)), step)
        squares = op.ReduceSum(op.Mul(coarse, coarse), last, keepdims=1)
        root = domain.IntegerSqrt(op.Add(squares, op.Constant(value_int=epsilon)))
        one = op.Constant(value_int=1)
        deviation = op.Mul(op.Where(op.Less(root, one), one, root), step)
        factor = op.Div(op.Constant(value_int=2147483648), deviation)
        scaled = op.Mul(v, factor)
        two = op.Constant(value_int=2)
        normal = op.Div(op.Sub(scaled, op.Mod(scaled, two)), two)
        power = op.Gather(powers, op.Constant(value_int=out_shift))
        product = op.Mul(normal, op.Cast(multiplier, to=_INT64))
        raised = op.Add(product, op.Div(power, two))
        rounded = op.Div(op.Sub(raised, op.Mod(raised, power)), power)
        least = op.Constant(value_int=low)
        most = op.Constant(value_int=high)
        capped = op.Where(op.Greater(rounded, most), most, rounded)
        clipped = op.Where(op.Less(capped, least), least, capped)
        y = op.Cast(clipped, to=_INT16)
        return y  # noqa: RET504  (names the output)

    proto: onnx.FunctionProto = IntegerRmsNorm.to_function_proto()
    return proto


def reference(
    x: Array,
    multiplier: Array,
    *,
    shift: int,
    epsilon: int,
    out_shift: int,
    low: int,
    high: int,
) -> tuple[Array]:
    """See the operator's documentation."""
    v = x.astype(np.int64)
    scaled = normalized(v, shift, epsilon) * multiplier.astype(np.int64)
    rounded = round_shift(scaled, out_shift)
    return (np.clip(rounded, low, high).astype(np.int16),)


OPERATOR = Operator(
    name="IntegerRmsNorm",
    doc=_DOC,
    inputs={"x": "`[..., D]` i16", "multiplier": "`[D]` i32"},
    outputs={"y": "`[..., D]` i16"},
    min_opset=18,
    build_function=_build_function,
    reference=reference,
    attributes=NORM,
)
