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
from onnxscript import ir

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
        self._nodes: list[ir.Node] = []
        self._node_names: dict[str, int] = {}
        self._values: dict[str, ir.Value] = {}
        self._initializers: dict[str, Array] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

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
        self._add(op_type, name, inputs, out, attributes)
        return out

    def _add(
        self, op_type: str, name: str, inputs: Sequence[str], out: str, attributes: dict[str, Any]
    ) -> None:
        given = [self._values[value] if value else None for value in inputs]
        self._values[out] = ir.val(out)
        node = ir.node(op_type, given, attributes, outputs=[self._values[out]], name=name)
        self._nodes.append(node)

    def weight(self, name: str, value: Array) -> str:
        """An initializer under exactly this name; the same name twice must mean the same array."""
        known = self._initializers.get(name)
        if known is None:
            self._initialize(name, np.ascontiguousarray(value))
        elif known.shape != value.shape or known.dtype != value.dtype:
            raise ValueError(f"two different initializers named {name!r}")
        return name

    def const(self, value: Any, dtype: npt.DTypeLike, leaf: str = "Constant") -> str:
        """A small constant, as a ``Constant`` node or an initializer (see the class)."""
        array = np.asarray(value, dtype=dtype)
        name = self._unique(leaf)
        out = f"{name}_output_0"
        if self._constants_as_nodes:
            self._add("Constant", name, [], out, {"value": ir.tensor(array)})
        else:
            self._initialize(out, array)
        return out

    def _initialize(self, name: str, array: Array) -> None:
        self._initializers[name] = array
        self._values[name] = ir.val(name, const_value=ir.tensor(array, name=name))

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.const(list(values), np.int64)

    def scalar(self, value: int) -> str:
        """A scalar int64 constant."""
        return self.const(value, np.int64)

    def add_input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare a graph input; strings in ``shape`` are symbolic dimensions."""
        self._values[name] = _typed(ir.val(name), dtype, shape)
        self._inputs.append(self._values[name])
        return name

    def add_output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Declare a graph output; the value must exist."""
        self._outputs.append(_typed(self._values[name], dtype, shape))

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
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=[self._values[name] for name in self._initializers],
            opset_imports={"": OPSET},
            name=self._name,
            doc_string=doc,
        )
        model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, producer_name="onnxq"))
        del model.graph.value_info[:]  # nothing but the types of initializers, which they have
        onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
        onnx.checker.check_model(model)
        return model


def _typed(value: ir.Value, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> ir.Value:
    value.dtype = ir.DataType.from_numpy(np.dtype(dtype))
    value.shape = ir.Shape(shape)
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part.

    Raises:
        DataError: the file cannot be written.
    """
    with reported(path), temporary_for(path) as temporary:
        temporary.file.write(data)
        temporary.put_in_place()
