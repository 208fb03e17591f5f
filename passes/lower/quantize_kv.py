"""``quantize-kv``: keep the key/value cache in 8, 4 or 2 bits.

Rewrites, for each cache that a decoder takes as an input and gives back longer::

    present = Concat(past, new)           becomes   past   = KvRead(*past_parts)
                                                    attention reads Concat(past, new) as before
                                                    present_parts = KvAppend(*past_parts, new)

so that the float inputs and outputs are replaced by codes, scales and offsets
(:mod:`onnxq.passes.lower.kv_bodies`). New tokens are read in float in the step that brings them,
from codes in every later one. A rotation of the keys behind the cache (R3) moves in front of it:
what is stored is rotated, and each key is rotated once instead of in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxq.custom_ops import DOMAIN, domain_version
from onnxq.errors import SpecError
from onnxq.graph.edit import insert_after, insert_before, replace_value
from onnxq.graph.match import Structure, analyze, is_op
from onnxq.graph.match.values import attr_int, op_domain, value_name
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.lower.kv_bodies import (
    MIN_OPSET,
    READ,
    CacheLayout,
    append_function,
    read_function,
)

Part = Literal["key", "value"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_MIN_IR_VERSION = 8
_MAX_STEPS = 8


@dataclass(frozen=True)
class QuantizeKv(Pass):
    """Store keys and values in few bits.

    Args:
        bits: of a code.
        keys: scales of keys a ``token`` and head, or a ``channel`` over ``group`` tokens (KIVI).
            Values always have one a token and head.
        group: tokens that share a channel's scale with keys=channel; until there are so many they
            wait in float. 1 with keys=token.
        prefix: first tokens that stay float: they draw the most attention.
        window: latest tokens that stay float.
    """

    name: ClassVar[str] = "quantize-kv"
    summary: ClassVar[str] = "keep the key/value cache in 8, 4 or 2 bits"
    forbids: ClassVar = (PLAN,)
    invalidates: ClassVar = (STATISTICS,)
    tolerance: ClassVar[float | None] = None

    bits: Literal[2, 4, 8] = 8
    keys: Literal["token", "channel"] = "token"
    group: int = 32
    prefix: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise SpecError("SPEC-RANGE", f"bits={self.bits}", "bits is 2, 4 or 8")
        if self.group < 2:
            raise SpecError("SPEC-RANGE", f"group={self.group} is below 2", "32 is usual")
        for name, number in (("prefix", self.prefix), ("window", self.window)):
            if number < 0:
                raise SpecError("SPEC-RANGE", f"{name}={number} is negative", "use 0 or more")

    def candidates(self, model: ir.Model) -> list[str]:
        """The caches, by the name of their input."""
        return [value_name(cache.past) for cache in find_caches(analyze(model))]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Replace the caches."""
        report = PassReport()
        opset = model.opset_imports.get("", 0)
        if opset < MIN_OPSET:
            report.skip("the model", f"needs opset {MIN_OPSET}; put `canonicalize` first")
            return report
        structure = analyze(model)
        caches = find_caches(structure)
        for attention in structure.fused_attentions:
            if any(value is not None and value.is_graph_input() for value in attention.node.inputs):
                report.skip(attention.name, "its cache is kept inside of the fused operator")
        if any(node.op_type.startswith(READ) and is_ours(node) for node in model.graph):
            report.skip("the model", "keeps its cache in codes already")
        elif not caches:
            report.skip("the model", "has no cache that is an input and given back longer")
        writer = _Writer(model)
        for cache in caches:
            name, reason = value_name(cache.past), self._obstacle(cache)
            if reason is not None:
                report.skip(name, reason)
            elif ctx.budget.take(name):
                layout = self._layout(cache)
                moved = _move_rotation(cache)
                writer.replace(cache, layout)
                report.change(name, f"int{self.bits} a {_axis(layout)}", _detail(cache, moved))
        if report.changed:
            report.note(self._memory(caches))
            report.note(
                "its cost shows only behind the first step: measure with "
                "`onnxq eval --task perplexity --set decode=1`"
            )
        return report

    def _layout(self, cache: Cache) -> CacheLayout:
        grouped = self.keys == "channel"
        size, dtype = cache.past.shape[3], cache.past.dtype  # type: ignore[index]
        assert isinstance(size, int)
        assert dtype is not None
        return CacheLayout(
            bits=self.bits,
            per_channel=grouped and cache.part == "key",
            group=self.group if grouped else 1,
            prefix=self.prefix,
            window=self.window,
            size=size,
            dtype=dtype,
        )

    def _obstacle(self, cache: Cache) -> str | None:
        """Why ``cache`` cannot be quantized."""
        shape = cache.past.shape
        if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
            return "its head size is not in its shape [N, H, P, d]"
        if cache.past.dtype not in _FLOATS:
            return "it is not float32 or float16"
        if shape[3] * self.bits % 8:
            return "the codes of one token do not fill whole bytes"
        return cache.reason or None

    def _memory(self, caches: Sequence[Cache]) -> str:
        """Bits an element when the cache is long: codes, scales and offsets."""
        spent = whole = 0.0
        for cache in caches:
            if self._obstacle(cache) is not None:
                continue
            layout = self._layout(cache)
            width = 8 * layout.dtype.itemsize
            share = layout.group if layout.per_channel else layout.size
            spent += layout.size * (self.bits + 2 * width / share)
            whole += layout.size * width
        return f"a long cache takes {whole / spent:.2f} times less memory"


def is_ours(node: ir.Node) -> bool:
    """Whether ``node`` is an operator of ours."""
    return op_domain(node) == DOMAIN


def _axis(layout: CacheLayout) -> str:
    return f"channel and {layout.group} tokens" if layout.per_channel else "token and head"


def _detail(cache: Cache, moved: bool) -> str:
    return "keys, their rotation moved before the cache" if moved else f"{cache.part}s"


@dataclass(frozen=True)
class Cache:
    """One cache of the main graph.

    Attributes:
        past: the graph input ``[N, H, P, d]``.
        new: this step's keys or values ``[N, H, S, d]``.
        join: the Concat of both, whose output is a graph output.
        part: what attention does with it.
        path: nodes from the Concat to the product, in order.
        reason: why it cannot be replaced; empty if it can.
    """

    past: ir.Value
    new: ir.Value
    join: ir.Node
    part: Part
    path: tuple[ir.Node, ...]
    reason: str = ""


def find_caches(structure: Structure) -> list[Cache]:
    """The caches that attention reads, in the order of the graph's inputs."""
    found: dict[ir.Value, Cache] = {}
    for attention in structure.attentions:
        for value, part in ((attention.k, "key"), (attention.v, "value")):
            path: list[ir.Node] = []
            node = value.producer()
            while node is not None and len(path) < _MAX_STEPS and not _is_join(node):
                path.insert(0, node)
                source = node.inputs[0] if node.inputs else None
                node = None if source is None else source.producer()
            if node is None or not _is_join(node):
                continue
            past, new = node.inputs[0], node.inputs[1]
            assert past is not None
            assert new is not None
            reason = "several attentions read it" if past in found else ""
            found[past] = Cache(
                past, new, node, "key" if part == "key" else "value", tuple(path), reason
            )
    order = {value: at for at, value in enumerate(structure.graph.inputs)}
    return sorted(found.values(), key=lambda cache: order[cache.past])


def _is_join(node: ir.Node) -> bool:
    """``Concat(graph input, new)`` over tokens, given back as a graph output."""
    if not is_op(node, "Concat") or len(node.inputs) != 2:
        return False
    past, new = node.inputs
    return (
        past is not None
        and new is not None
        and past.is_graph_input()
        and node.outputs[0].is_graph_output()
        and attr_int(node, "axis", 0) in (2, -2)
    )


def _move_rotation(cache: Cache) -> bool:
    """Rotate new keys instead of all keys, where a rotation lies behind the cache."""
    rotations = [node for node in cache.path if is_ours(node)]
    sole = all(len(tuple(node.outputs[0].consumers())) == 1 for node in cache.path[:-1])
    readers = [n for n in cache.join.outputs[0].consumers() if not is_op(n, "Shape")]
    if len(rotations) != 1 or not sole or readers != list(cache.path[:1]):
        return False
    (rotation,) = rotations
    before, after = rotation.inputs[0], rotation.outputs[0]
    assert before is not None
    replace_value(after, before)
    rotation.replace_input_with(0, cache.new)
    graph = rotation.graph
    assert isinstance(graph, ir.Graph)
    graph.remove(rotation)
    after.shape, after.type = cache.new.shape, cache.new.type
    insert_before(cache.join, rotation)
    cache.join.replace_input_with(1, after)
    return True


class _Writer:
    """Edits the graph; the body of each layout is attached once."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._graph = model.graph

    def replace(self, cache: Cache, layout: CacheLayout) -> None:
        """Put parts in place of ``cache``'s input and output."""
        graph = self._graph
        self._attach(layout)
        past_name, present = value_name(cache.past), cache.join.outputs[0]
        inputs = [_part(past_name, "past", p, layout, cache.past) for p in layout.parts]
        at = list(graph.inputs).index(cache.past)
        read = ir.Node(DOMAIN, layout.read_op, inputs, num_outputs=1, name=f"{past_name}_read")
        whole = read.outputs[0]
        whole.type, whole.shape = cache.past.type, cache.past.shape
        insert_after(cache.past, read)
        for usage in cache.past.uses():
            usage.node.replace_input_with(usage.idx, whole)
        graph.inputs.remove(cache.past)
        for part in reversed(inputs):
            graph.inputs.insert(at, part)
        cache.past.name = None
        whole.name = past_name
        new = cache.join.inputs[1]
        append = ir.Node(
            DOMAIN,
            layout.append_op,
            [*inputs, new],
            num_outputs=len(inputs),
            name=f"{value_name(present)}_append",
        )
        for out, which in zip(append.outputs, layout.parts, strict=True):
            described = _part(value_name(present), "present", which, layout, cache.past)
            out.name, out.type, out.shape = described.name, described.type, described.shape
        insert_after(cache.join, append)
        at = next(i for i, value in enumerate(graph.outputs) if value is present)
        del graph.outputs[at]
        for out in reversed(append.outputs):
            graph.outputs.insert(at, out)

    def _attach(self, layout: CacheLayout) -> None:
        model, opset = self._model, self._model.opset_imports[""]
        if (DOMAIN, layout.read_op, "") in model.functions:
            return
        model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
        model.opset_imports[DOMAIN] = domain_version()
        for function in (read_function(layout, opset), append_function(layout, opset)):
            model.functions[function.identifier()] = function


def _part(base: str, step: str, part: str, layout: CacheLayout, past: ir.Value) -> ir.Value:
    """A cache tensor with its name, type and shape ``[N, H, free, size]``."""
    assert past.shape is not None
    size, free = layout.size, part
    if part == "codes":
        size = layout.codes_size
    elif part in ("scale", "offset"):
        size, free = (size, "groups") if layout.per_channel else (1, "codes")
    dtype = ir.DataType.UINT8 if part == "codes" else layout.dtype
    return ir.Value(
        name=f"{base}_{part}",
        type=ir.TensorType(dtype),
        shape=ir.Shape([past.shape[0], past.shape[1], f"{step}_{free}", size]),
    )
