"""A small writer of ONNX graphs for the builders: named scopes, initializers, one method a node.

Every node is called ``/<scope>/<OpType>`` (a second one of that type in the same scope gets ``_1``)
and its first output ``<node>_output_0``, as PyTorch's exporter does, so that a glob such as
``/encoder/layer.*/attention/*`` selects what it seems to select. Nothing depends on time, hashes or
addresses: two builds of the same checkpoint give the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from onnxq.errors import UnsupportedError
from onnxq.graph.atomic import reported, temporary_for

OPSET = 21
"""The opset the builders write: the first with INT4 and INT16 Quantize/DequantizeLinear."""

IR_VERSION = 10
"""The IR version that belongs to opset 21."""

MAX_INLINE_BYTES = 2**31 - 2**20
"""Protobuf refuses messages of 2 GiB and more; a margin is kept for the graph itself."""

Array = npt.NDArray[Any]


class GraphBuilder:
    """Collects nodes and initializers, then makes one :class:`onnx.ModelProto`.

    Args:
        name: name of the graph.
        constants: where small constants (shapes, scalars) go: ``"initializer"`` or, as the
            TorchScript exporter does it, ``"node"`` (a ``Constant`` node beside its user).
    """

    def __init__(self, name: str, *, constants: str = "initializer") -> None:
        self._name = name
        self._constants_as_nodes = constants == "node"
        self._scopes: list[str] = []
        self._nodes: list[onnx.NodeProto] = []
        self._node_names: dict[str, int] = {}
        self._initializers: dict[str, Array] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    @contextlib.contextmanager
    def scope(self, *parts: str) -> Iterator[None]:
        """Node names made inside carry ``/part/part/`` below the scopes already open."""
        self._scopes.extend(parts)
        yield
        del self._scopes[len(self._scopes) - len(parts) :]

    def path(self, leaf: str) -> str:
        """``/scope/.../leaf`` for the scopes that are open."""
        return "/" + "/".join([*self._scopes, leaf])

    def _unique(self, leaf: str) -> str:
        base = self.path(leaf)
        count = self._node_names.get(base, 0)
        self._node_names[base] = count + 1
        return base if count == 0 else f"{base}_{count}"

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return the output's name.

        Args:
            op_type: operator of the default domain.
            inputs: value names; ``""`` leaves an optional input out.
            output: the output's name, when it must be a graph output.
            attributes: ONNX attributes.
        """
        name = self._unique(op_type)
        out = output or f"{name}_output_0"
        self._nodes.append(helper.make_node(op_type, list(inputs), [out], name=name, **attributes))
        return out

    def weight(self, name: str, value: Array) -> str:
        """An initializer under exactly this name; the same name twice must mean the same array."""
        known = self._initializers.get(name)
        if known is None:
            self._initializers[name] = np.ascontiguousarray(value)
        elif known.shape != value.shape or known.dtype != value.dtype:
            raise ValueError(f"two different initializers named {name!r}")
        return name

    def const(self, value: Any, dtype: npt.DTypeLike, leaf: str = "Constant") -> str:
        """A small constant, as a ``Constant`` node or an initializer (see the class)."""
        array = np.asarray(value, dtype=dtype)
        name = self._unique(leaf)
        out = f"{name}_output_0"
        if self._constants_as_nodes:
            tensor = numpy_helper.from_array(array)
            self._nodes.append(helper.make_node("Constant", [], [out], name=name, value=tensor))
        else:
            self._initializers[out] = array
        return out

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.const(list(values), np.int64)

    def scalar(self, value: int) -> str:
        """A scalar int64 constant."""
        return self.const(value, np.int64)

    def add_input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare a graph input; strings in ``shape`` are symbolic dimensions."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def add_output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Declare a graph output; the value must exist."""
        self._outputs.append(_value_info(name, dtype, shape))

    def build(self, *, doc: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """The checked model; ``metadata`` becomes ``metadata_props`` in sorted order."""
        size = sum(array.nbytes for array in self._initializers.values())
        if size > MAX_INLINE_BYTES:
            raise UnsupportedError(
                "UNSUPPORTED-MODEL-TOO-LARGE",
                f"the weights take {size} bytes and a single .onnx file holds at most "
                f"{MAX_INLINE_BYTES}",
                "build with dtype=float16",
            )
        initializers = [numpy_helper.from_array(a, n) for n, a in self._initializers.items()]
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, initializers, doc_string=doc
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="onnxq",
        )
        helper.set_model_props(model, dict(sorted(metadata.items())))
        onnx.checker.check_model(model)
        return model


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, element, list(shape))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part.

    Raises:
        DataError: the file cannot be written.
    """
    with reported(path), temporary_for(path) as temporary:
        temporary.file.write(data)
        temporary.put_in_place()
