"""Exact edits of constants in float64: what all folding transforms are made of.

``Linear.w`` is float32; folding reads what is stored and multiplies in float64, so that a model in
float64 keeps its function to float64 and a model in float32 is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.errors import InternalError
from onnxq.graph.edit import replace_const, set_bias, set_weight
from onnxq.graph.match import Linear, Norm, const_tensor, is_op
from onnxq.graph.match.values import value_name

Float64 = npt.NDArray[np.float64]


def stored64(value: ir.Value) -> Float64:
    """The constant behind ``value`` in float64."""
    tensor = const_tensor(value) or value.const_value
    if tensor is None:
        raise InternalError("STALE-MATCH", f"{value_name(value)!r} is not constant")
    return tensor.numpy().astype(np.float64)


def weight64(linear: Linear) -> Float64:
    """The weight of a MatMul or Gemm as ``[K, N]`` float64, whatever the stored layout."""
    stored = stored64(linear.weight)
    return stored if linear.in_axis == 0 else stored.T


def put_weight(linear: Linear, weight: Float64) -> None:
    """Write ``[K, N]`` in the stored layout, for this layer alone."""
    set_weight(linear, weight if linear.in_axis == 0 else weight.T)


def bias64(linear: Linear) -> Float64 | None:
    """The bias as ``[N]`` float64, Gemm's beta applied; None without one."""
    if linear.bias is None:
        return None
    flat = stored64(linear.bias).reshape(-1)
    full = flat if flat.size == linear.out_features else np.repeat(flat, linear.out_features)
    return full * linear.beta


def put_bias(linear: Linear, bias: Float64) -> None:
    """Write the bias ``[N]``; a layer without one gets an Add, and matches of it are stale."""
    set_bias(linear, bias)


def norm_vector(value: ir.Value | None) -> Float64 | None:
    """Gamma or beta as ``[D]`` float64; None for None."""
    return None if value is None else stored64(value).reshape(-1)


def put_norm_vector(norm: Norm, value: ir.Value, vector: Float64) -> None:
    """Write gamma or beta ``[D]`` where ``norm`` reads it, for this norm alone.

    Raises:
        InternalError: the norm does not read ``value`` directly or behind a Cast.
    """
    shape, dtype = stored64(value).shape, _dtype(value)
    places = list(_reads(norm, value))
    if not places:
        raise InternalError("STALE-MATCH", f"{norm.name} does not read {value_name(value)!r}")
    for node, index in places:
        replace_const(node, index, vector.reshape(shape).astype(dtype))


def _dtype(value: ir.Value) -> np.dtype[np.generic]:
    tensor = const_tensor(value) or value.const_value
    assert tensor is not None
    return tensor.dtype.numpy()


def _reads(norm: Norm, value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """(node, index) where the region reads ``value``, or where a Cast for it alone does."""
    nodes = set(norm.nodes)
    for usage in list(value.uses()):
        inside = usage.node in nodes
        casts = is_op(usage.node, "Cast", "Identity") and all(
            reader in nodes for reader in usage.node.outputs[0].consumers()
        )
        if inside or casts:
            yield usage.node, usage.idx
