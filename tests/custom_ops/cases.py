"""Inputs for the contract test: for each operator, what its kernels must agree on.

An operator without an entry in ``CASES`` fails the test: an untested kernel cannot exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxq import custom_ops

Array = np.ndarray[Any, Any]
Inputs = dict[str, Array]

# Around the widths that kernels step by (8, 16, 32, 64), primes, one, none.
_ROW_LENGTHS = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 1021)


def single_node_model(op_name: str, dtype: str, *, opset: int = 21) -> bytes:
    """A model of one node with the operator's body attached; output shapes are left open."""
    operator = custom_ops.get(op_name)
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))))
        for name in operator.inputs
    ]
    node = custom_ops.make_node(op_name, inputs)
    for value, name in zip(node.outputs, operator.outputs, strict=True):
        value.name = name
        value.type = ir.TensorType(_OUTPUT_TYPES[op_name][name])
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset}, name="one")
    model = ir.Model(graph, ir_version=10)
    custom_ops.attach(model, op_name)
    return onnx.ModelProto.SerializeToString(ir.to_proto(model))


def _per_token(dtype: str) -> Iterator[tuple[str, Inputs]]:
    numpy_type = np.dtype(dtype)
    rng = np.random.default_rng(7)
    shapes = [(5, k) for k in _ROW_LENGTHS]
    shapes += [(0,), (1,), (0, 4), (0, 0), (2, 0, 3), (1, 1), (2, 3, 5, 31), (4099, 3), (1, 50021)]
    for shape in shapes:
        yield f"normal {shape}", {"x": rng.normal(size=shape).astype(numpy_type)}
    # More elements than one task takes, so that the thread pool cuts it.
    yield "large", {"x": (rng.standard_cauchy(size=(67, 1499)) * 1e-2).astype(numpy_type)}
    info = np.finfo(numpy_type)
    rows = np.zeros((12, 37), numpy_type)
    rows[0, 0] = np.nan
    rows[1, 36] = np.inf
    rows[2, 20] = -np.inf
    rows[3] = -0.0
    rows[4] = info.smallest_subnormal
    rows[5, ::2] = -info.smallest_normal
    rows[6] = info.max
    rows[7] = -info.max
    rows[7, 3] = info.max
    rows[8] = np.arange(37) - 18.5  # ties after the division by the scale
    rows[8, 0] = 127
    rows[9, 1:] = rng.normal(size=36)
    rows[9, 0] = info.max
    rows[10] = rng.normal(size=37)
    yield "edges", {"x": rows}
    yield "nan in the tail", {"x": np.where(np.arange(65) == 64, np.nan, 1.0).astype(numpy_type)}
    bits = rng.integers(0, 1 << (8 * numpy_type.itemsize), size=(64, 129), dtype=np.uint64)
    unsigned = bits.astype(f"uint{8 * numpy_type.itemsize}")
    yield "any bit pattern", {"x": unsigned.view(numpy_type)}
    finite = np.where(np.isfinite(unsigned.view(numpy_type)), unsigned.view(numpy_type), 0)
    yield "any finite bit pattern", {"x": finite.astype(numpy_type)}


CASES: dict[str, Callable[[str], Iterator[tuple[str, Inputs]]]] = {
    "DynamicQuantizePerToken": _per_token,
}

_OUTPUT_TYPES = {
    "DynamicQuantizePerToken": {"q": ir.DataType.INT8, "scale": ir.DataType.FLOAT},
}


def same_bits(left: Array, right: Array) -> bool:
    """Equal in type, shape and every bit, NaN and the sign of zero included."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
    )


def random_input(dtype: str, rng: np.random.Generator) -> Array:
    """An array of random rank, extents and magnitude, now and then with a NaN in it."""
    shape = tuple(int(n) for n in rng.integers(0, 70, size=rng.integers(1, 4)))
    x = rng.normal(size=shape) * math.pow(10.0, rng.uniform(-9, 4))
    if x.size and rng.random() < 0.2:
        x.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf, -np.inf])
    with np.errstate(over="ignore"):
        return x.astype(dtype)
