"""A graph cut into stages, so that layers can be rounded one after another.

A stage computes the inputs of layers that do not depend on each other (queries, keys and values;
the output projection; gate and up; down), from values that earlier stages left. So it takes in the
effects of all layers before it, and only its own nodes and weights are in memory.

The level of a value is the largest number of chosen layers on a path to it. Stage d holds the nodes
whose outputs have level d; a chosen layer raises the level by one, so it is the first node of
the stage behind its input. Nodes that depend on constants alone are copied to where they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir

from onnxq.errors import UnsupportedError
from onnxq.graph.match import Linear
from onnxq.graph.match.values import reads, value_name

_CONSTANT = -1


@dataclass
class Stage:
    """Nodes to run, in order, before the inputs of ``layers`` are known.

    Attributes:
        layers: the chosen layers whose inputs this stage completes.
        nodes: in graph order, those of constants included.
        inputs: values that come from the graph's inputs or earlier stages.
        outputs: values that ``layers`` or later stages read.
        finished: values that nothing reads after this stage.
    """

    layers: list[Linear] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)


def cut(graph: ir.Graph, layers: Sequence[Linear]) -> list[Stage]:
    """The stages that compute the inputs of ``layers``, in order.

    What no chosen layer depends on (the last layers, the outputs) is in no stage.

    Raises:
        UnsupportedError: a chosen layer has no activation that can be computed.
    """
    if not layers:
        return []
    levels = _levels(graph, layers)
    needed = _needed(layers)
    stages = [Stage() for _ in range(1 + max(levels[layer.x] for layer in layers))]
    for layer in layers:
        if levels[layer.x] == _CONSTANT:
            raise UnsupportedError(
                "ROUND-CONSTANT-INPUT",
                f"{layer.name}: the input does not depend on the model's inputs",
                "fold constants first with `canonicalize`",
            )
        stages[levels[layer.x]].layers.append(layer)
    order = {node: place for place, node in enumerate(graph)}
    for node in graph:
        level = max((levels[v] for v in node.outputs), default=_CONSTANT)
        if node in needed and level != _CONSTANT:
            stages[level].nodes.append(node)
    last_use: dict[ir.Value, int] = {}
    for number, stage in enumerate(stages):
        _close(stage, levels, order)
        for value in stage.inputs:
            last_use[value] = number
        for layer in stage.layers:
            last_use[layer.x] = max(last_use.get(layer.x, 0), number)
    for value, number in last_use.items():
        stages[number].finished.append(value_name(value))
    for number, stage in enumerate(stages):
        produced = {v for node in stage.nodes for v in node.outputs}
        wanted = [v for v in last_use if v in produced and levels[v] == number]
        stage.outputs = wanted
    return stages


def _levels(graph: ir.Graph, layers: Sequence[Linear]) -> dict[ir.Value, int]:
    chosen = {layer.node for layer in layers}
    levels: dict[ir.Value, int] = dict.fromkeys(graph.inputs, 0)
    for value in graph.initializers.values():
        levels[value] = _CONSTANT
    for node in graph:
        level = max((levels[v] for v in reads(node)), default=_CONSTANT)
        for value in node.outputs:
            levels[value] = level + 1 if node in chosen else level
    return levels


def _needed(layers: Sequence[Linear]) -> set[ir.Node]:
    """All nodes that some layer's input depends on."""
    found: set[ir.Node] = set()
    waiting = [layer.x.producer() for layer in layers]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        waiting.extend(value.producer() for value in reads(node))
    return found


def _close(stage: Stage, levels: Mapping[ir.Value, int], order: Mapping[ir.Node, int]) -> None:
    """Add the constant nodes that the stage reads, and name its inputs."""
    inputs: dict[ir.Value, None] = {}
    constants: set[ir.Node] = set()
    waiting = list(stage.nodes)
    own = {v for node in stage.nodes for v in node.outputs}
    while waiting:
        for value in reads(waiting.pop()):
            producer = value.producer()
            if levels[value] == _CONSTANT:
                if producer is not None and producer not in constants:
                    constants.add(producer)
                    waiting.append(producer)
            elif value not in own:
                inputs[value] = None
    stage.nodes = sorted([*constants, *stage.nodes], key=order.__getitem__)
    stage.inputs = list(inputs)


Array = npt.NDArray[Any]


def stage_model(
    model: ir.Model,
    stage: Stage,
    types: Mapping[str, np.dtype[Any]],
    weights: Mapping[ir.Node, tuple[int, Array]],
    renamed: Mapping[ir.Node, Mapping[str, str]],
) -> onnx.ModelProto:
    """``stage`` as a model.

    Args:
        model: that the stage was cut from.
        stage: one with nodes.
        types: element types of the stage's inputs, under the names that they are read by.
        weights: for a layer's node the input and the array that it reads instead of its weight.
        renamed: for a layer's node, values that it reads under other names.
    """
    nodes, initializers = [], {}
    written = {v for node in stage.nodes for v in node.outputs}
    for place, node in enumerate(stage.nodes):
        proto = ir.serde.serialize_node(node)
        if node in weights:
            index, array = weights[node]
            proto.input[index] = f"{proto.input[index]}__rounded_{place}"
            tensor = onnx.numpy_helper.from_array(array, proto.input[index])
            initializers[proto.input[index]] = tensor
        for number, name in enumerate(proto.input):
            proto.input[number] = renamed.get(node, {}).get(name, name)
        for number, value in enumerate(reads(node)):
            replaced = node in weights and number == weights[node][0]
            if value.is_initializer() and not replaced and value not in written:
                name = value_name(value)
                if name not in initializers and value.const_value is not None:
                    initializers[name] = _tensor(value.const_value, name)
        nodes.append(proto)
    # A weight that is replaced may stand behind nodes that nothing reads now.
    live = _live(nodes, [value_name(v) for v in stage.outputs])
    read = {name for node in live for name in node.input} | _subgraph_names(live)
    graph = onnx.helper.make_graph(
        live,
        "stage",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(dtype), None
            )
            for name, dtype in types.items()
            if name in read
        ],
        [onnx.ValueInfoProto(name=value_name(v)) for v in stage.outputs],
        [tensor for name, tensor in initializers.items() if name in read],
    )
    return onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()],
        ir_version=max(model.ir_version, 8),
        functions=[ir.serde.serialize_function(f) for f in model.functions.values()],
    )


def _tensor(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.ascontiguousarray(tensor.numpy()), name)


def _live(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
            wanted |= _subgraph_names([node])
    return kept[::-1]


def _subgraph_names(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """All names that subgraphs of ``nodes`` read."""
    found: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                found.update(name for inner in graph.node for name in inner.input)
                found.update(o.name for o in graph.output)
                found |= _subgraph_names(graph.node)
    return found
