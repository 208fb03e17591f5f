"""A model's main graph in torch, so that a loss at its outputs has a gradient inside of it.

Operators of decoders and encoders in any exporter's spelling, as far as they are listed in
``_OPERATORS``, in float32. torch is imported where it is used, and is no
dependency of the package (extra ``torch``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxq.errors import UnsupportedError
from onnxq.graph.match.values import attr_float, attr_int, attr_ints, node_label, value_name
from onnxq.solvers.hadamard import hadamard_matrix

Tensor = Any
Reading = tuple[ir.Node, int]
"""A node and the index of one of its inputs."""


def import_torch(needed_by: str) -> Any:
    """The package torch.

    Raises:
        UnsupportedError: ``UNSUPPORTED-TORCH``: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UnsupportedError(
            "UNSUPPORTED-TORCH",
            f"{needed_by} needs torch, which is not installed",
            "pip install 'onnxq[torch]', or learn without it: objective=range",
        ) from error


class TorchGraph:
    """Runs ``model``; weights are constants.

    Args:
        model: its main graph alone; subgraphs are refused.

    Raises:
        UnsupportedError: ``UNSUPPORTED-TORCH``, ``UNSUPPORTED-TORCH-OP``.
    """

    def __init__(self, model: ir.Model) -> None:
        self.torch = import_torch("learning by the loss")
        self._graph = model.graph
        self._constants: dict[ir.Value, Tensor] = {}
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                self._constants[value] = self.tensor(value.const_value.numpy())
        for node in model.graph:
            if _key(node) not in _OPERATORS:
                raise UnsupportedError(
                    "UNSUPPORTED-TORCH-OP",
                    f"`{node_label(node)}` is a {_key(node)}, which cannot be run in torch here",
                    "learn without torch: objective=range",
                )

    def tensor(self, array: np.ndarray) -> Tensor:
        """``array`` in torch, floats as float32."""
        wide = array.astype(np.float32) if array.dtype.kind == "f" else array
        return self.torch.from_numpy(np.array(wide))

    def run(
        self,
        feeds: Mapping[str, np.ndarray],
        instead: Mapping[Reading, Callable[[Tensor], Tensor]],
    ) -> dict[str, Tensor]:
        """The outputs by name.

        Args:
            feeds: inputs by name.
            instead: for an input of a node, what is made of it before the node reads it; one
                function is called once for all nodes that read a value through it.
        """
        values = dict(self._constants)
        for value in self._graph.inputs:
            if value_name(value) in feeds:
                values[value] = self.tensor(feeds[value_name(value)])
        made: dict[tuple[ir.Value, int], Tensor] = {}
        for node in self._graph:
            inputs: list[Any] = []
            for index, read in enumerate(node.inputs):
                x = None if read is None else values[read]
                function = instead.get((node, index))
                if read is not None and function is not None:
                    key = (read, id(function))
                    if key not in made:
                        made[key] = function(x)
                    x = made[key]
                inputs.append(x)
            found = _OPERATORS[_key(node)](self.torch, node, inputs)
            several = found if isinstance(found, tuple) else (found,)
            values.update(zip(node.outputs, several, strict=False))
        return {value_name(value): values[value] for value in self._graph.outputs}


def _key(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


Run = Callable[[Any, ir.Node, Sequence[Any]], Any]


def _ints(tensor: Tensor) -> list[int]:
    return [int(v) for v in tensor.reshape(-1).tolist()]


def _axes(node: ir.Node, inputs: Sequence[Any]) -> tuple[int, ...]:
    """From the second input or, before opset 13 or 18, the attribute."""
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(_ints(inputs[1]))
    return attr_ints(node, "axes") or ()


def _dtype(torch: Any, number: int) -> Any:
    kind = ir.DataType(number).numpy()
    return torch.float32 if kind.kind == "f" else getattr(torch, str(kind).replace("bool_", "bool"))


def _cast(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    return inputs[0].to(_dtype(torch, attr_int(node, "to", 1)))


def _constant(torch: Any, node: ir.Node, _: Sequence[Any]) -> Any:
    attribute = next(iter(node.attributes.values()))
    if attribute.type == ir.AttributeType.TENSOR:
        array = attribute.as_tensor().numpy()
        return torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array)
    return torch.tensor(attribute.value)


def _shape(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    whole = torch.tensor(inputs[0].shape)
    return whole[attr_int(node, "start", 0) : attr_int(node, "end", len(whole))]


def _reshape(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    x, wanted = inputs[0], _ints(inputs[1])
    zeros = not attr_int(node, "allowzero", 0)
    return x.reshape([x.shape[i] if d == 0 and zeros else d for i, d in enumerate(wanted)])


def _slice(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    x, starts, ends = inputs[0], _ints(inputs[1]), _ints(inputs[2])
    given = inputs[3] if len(inputs) > 3 else None
    axes = list(range(len(starts))) if given is None else _ints(given)
    steps = _ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(axes)
    places = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        places[axis] = slice(start, min(end, x.shape[axis]), step)
    return x[tuple(places)]


def _gather(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    x, index = inputs
    axis = attr_int(node, "axis", 0) % x.ndim
    places = torch.where(index < 0, index + x.shape[axis], index).long()
    picked = torch.index_select(x, axis, places.reshape(-1))
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _unsqueeze(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    x, axes = inputs[0], _axes(node, inputs)
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    axes = _axes(node, inputs)
    return inputs[0].squeeze(axes) if axes else inputs[0].squeeze()


def _mean(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    axes = _axes(node, inputs) or tuple(range(inputs[0].ndim))
    return inputs[0].mean(axes, keepdim=bool(attr_int(node, "keepdims", 1)))


def _rms_norm(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    x, gamma = inputs
    variance = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + attr_float(node, "epsilon", 1e-5)) * gamma


def _layer_norm(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    beta = inputs[2] if len(inputs) > 2 else None
    epsilon = attr_float(node, "epsilon", 1e-5)
    return torch.nn.functional.layer_norm(
        inputs[0], (inputs[0].shape[-1],), inputs[1], beta, epsilon
    )


def _gemm(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    a = inputs[0].T if attr_int(node, "transA", 0) else inputs[0]
    b = inputs[1].T if attr_int(node, "transB", 0) else inputs[1]
    y = attr_float(node, "alpha", 1.0) * (a @ b)
    bias = inputs[2] if len(inputs) > 2 else None
    return y if bias is None else y + attr_float(node, "beta", 1.0) * bias


def _div(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    a, b = inputs
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _transpose(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    perm = attr_ints(node, "perm")
    return inputs[0].permute(perm or tuple(range(inputs[0].ndim))[::-1])


def _softmax(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    return torch.softmax(inputs[0], attr_int(node, "axis", -1))


def _gelu(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    return torch.nn.functional.gelu(inputs[0])


def _expand(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    shape = torch.broadcast_shapes(inputs[0].shape, tuple(_ints(inputs[1])))
    return inputs[0].expand(shape)


def _concat(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    return torch.cat(list(inputs), attr_int(node, "axis", 0))


def _range(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    return torch.arange(*(each.item() for each in inputs))


def _trilu(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    k = int(inputs[1].item()) if len(inputs) > 1 and inputs[1] is not None else 0
    cut = torch.triu if attr_int(node, "upper", 1) else torch.tril
    return cut(inputs[0], k)


def _hadamard(torch: Any, node: ir.Node, inputs: Sequence[Any]) -> Any:
    x, order = inputs[0], attr_int(node, "block", 1)
    matrix = hadamard_matrix(order).astype(np.float32) * attr_float(node, "scale", 1.0)
    return (x.reshape(*x.shape[:-1], -1, order) @ torch.from_numpy(matrix)).reshape(x.shape)


def _plain(name: str) -> Run:
    """An operator that is torch's function of the same inputs."""
    return lambda torch, node, inputs: getattr(torch, name)(*inputs)


_OPERATORS: Final[Mapping[str, Run]] = {
    **{name: _plain(name.lower()) for name in ("Add", "Sub", "Mul", "MatMul", "Sqrt", "Cos", "Sin",
                                               "Where", "Pow", "Reciprocal", "Neg", "Exp", "Erf",
                                               "Sigmoid", "Tanh", "Relu", "Less", "Greater", "Abs",
                                               "IsNaN")},
    "LessOrEqual": _plain("less_equal"),
    "GreaterOrEqual": _plain("greater_equal"),
    "Equal": _plain("eq"),
    "And": _plain("logical_and"),
    "Not": _plain("logical_not"),
    "Identity": lambda torch, node, inputs: inputs[0],
    "Cast": _cast,
    "Constant": _constant,
    "Shape": _shape,
    "Reshape": _reshape,
    "Slice": _slice,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "ReduceMean": _mean,
    "RMSNormalization": _rms_norm,
    "LayerNormalization": _layer_norm,
    "Gemm": _gemm,
    "Div": _div,
    "Transpose": _transpose,
    "Softmax": _softmax,
    "Gelu": _gelu,
    "Expand": _expand,
    "Concat": _concat,
    "Range": _range,
    "Trilu": _trilu,
    "com.onnxq::Hadamard": _hadamard,
}  # fmt: skip
