"""Bodies of the operators that read and extend a quantized key/value cache, in standard operators.

The cache of one tensor, T tokens in order, ``[N, H, T, d]`` as attention sees it::

    prefix [N, H, p, d] float | codes [N, H, C, d b / 8] uint8 | window [N, H, w, d] float

A code q of b bits stands for ``scale * q + offset``; 8/b codes share a byte, the first one in its
low bits, as in ONNX's INT4. Scale and offset are of one of two shapes:

- ``token``: ``[N, H, C, 1]``, one pair a token and head;
- ``channel``: ``[N, H, C / G, d]``, one pair a channel and G tokens (KIVI).

``scale = (max - min) / (2^b - 1)``, ``offset = min``, ``q = round((x - min) / scale)``, ties to
even. Zero is no special number in a cache, so that the range need not reach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxq.custom_ops import DOMAIN

MIN_OPSET: Final = 18
"""Reductions with axes as an input, and BitwiseAnd."""

READ: Final = "KvRead"
APPEND: Final = "KvAppend"


@dataclass(frozen=True)
class CacheLayout:
    """How one cache tensor is stored.

    Args:
        bits: of a code: 2, 4 or 8.
        per_channel: scales ``[N, H, C / G, d]`` instead of ``[N, H, C, 1]``.
        group: G, tokens that are quantized together.
        prefix: tokens at the beginning that stay float.
        window: least number of latest tokens that stay float; up to ``group - 1`` more wait.
        size: d.
        dtype: of the float cache, and so of scale and offset.
    """

    bits: int
    per_channel: bool
    group: int
    prefix: int
    window: int
    size: int
    dtype: ir.DataType

    @property
    def has_window(self) -> bool:
        """Tokens wait in float: for their group to be full, or for the window to move on."""
        return self.window > 0 or self.group > 1

    @property
    def codes_size(self) -> int:
        """Bytes of the codes of one token and head."""
        return self.size * self.bits // 8

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of the cache, in the order in which the operators take them."""
        return (
            *(("prefix",) if self.prefix else ()),
            "codes",
            "scale",
            "offset",
            *(("window",) if self.has_window else ()),
        )

    @property
    def suffix(self) -> str:
        """What tells the operators of one layout from those of another."""
        axis = f"Channel{self.group}" if self.per_channel else f"Token{self.group}"
        return f"{axis}x{self.size}Int{self.bits}P{self.prefix}W{self.window}{self.dtype.name}"

    @property
    def read_op(self) -> str:
        """``(*parts) -> [N, H, T, d]`` float."""
        return f"{READ}{self.suffix}"

    @property
    def append_op(self) -> str:
        """``(*parts, new [N, H, S, d]) -> parts``."""
        return f"{APPEND}{self.suffix}"


class _Body:
    """Nodes of a function; every method returns the value that it computes."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.inputs = {name: ir.Value(name=name) for name in inputs}
        self._nodes: list[ir.Node] = []

    def op(self, kind: str, *args: ir.Value, **attributes: object) -> ir.Value:
        node = ir.node(kind, list(args), attributes)  # type: ignore[arg-type]
        node.outputs[0].name = f"v{len(self._nodes)}"
        self._nodes.append(node)
        return node.outputs[0]

    def ints(self, *numbers: int) -> ir.Value:
        return self.op("Constant", value_ints=list(numbers))

    def scalar(self, number: float, dtype: np.dtype[np.generic]) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.asarray(number, dtype)))

    def length(self, x: ir.Value) -> ir.Value:
        """Tokens of ``x``, ``[1]``."""
        return self.op("Shape", x, start=2, end=3)

    def tokens(self, x: ir.Value, start: ir.Value, stop: ir.Value) -> ir.Value:
        return self.op("Slice", x, start, stop, self.ints(2))

    def join(self, *parts: ir.Value) -> ir.Value:
        return self.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]

    def function(self, name: str, outputs: Iterable[ir.Value], opset: int) -> ir.Function:
        graph = ir.Graph(
            list(self.inputs.values()),
            list(outputs),
            nodes=self._nodes,
            opset_imports={"": opset},
            name=name,
        )
        return ir.Function(DOMAIN, name, graph=graph, attributes=[])


def read_function(layout: CacheLayout, opset: int) -> ir.Function:
    """The body of :attr:`CacheLayout.read_op`."""
    body = _Body(layout.parts)
    parts = body.inputs
    codes = body.op("Cast", _unpack(body, parts["codes"], layout), to=layout.dtype)
    scale, offset = parts["scale"], parts["offset"]
    if layout.per_channel:
        codes = body.op("Reshape", codes, body.ints(0, 0, -1, layout.group, layout.size))
        scale, offset = (body.op("Unsqueeze", v, body.ints(3)) for v in (scale, offset))
    exact = body.op("Add", body.op("Mul", codes, scale), offset)
    if layout.per_channel:
        exact = body.op("Reshape", exact, body.ints(0, 0, -1, layout.size))
    pieces = [parts[p] for p in ("prefix",) if layout.prefix]
    pieces.append(exact)
    pieces.extend(parts[p] for p in ("window",) if layout.has_window)
    return body.function(layout.read_op, [body.op("Identity", body.join(*pieces))], opset)


def append_function(layout: CacheLayout, opset: int) -> ir.Function:
    """The body of :attr:`CacheLayout.append_op`.

    New tokens go behind those that wait in float; the oldest of these fill the prefix, and whole
    groups beyond the window are quantized.
    """
    body = _Body([*layout.parts, "new"])
    parts = body.inputs
    recent = parts["new"]
    if layout.has_window:
        recent = body.join(parts["window"], recent)
    found: dict[str, ir.Value] = {}
    zero = body.ints(0)
    if layout.prefix:
        room = body.op("Sub", body.ints(layout.prefix), body.length(parts["prefix"]))
        taken = body.op("Min", room, body.length(recent))
        found["prefix"] = body.join(parts["prefix"], body.tokens(recent, zero, taken))
        recent = body.tokens(recent, taken, body.length(recent))
    count = body.length(recent)
    if layout.window:
        count = body.op("Max", body.op("Sub", count, body.ints(layout.window)), zero)
    groups = body.op("Div", count, body.ints(layout.group)) if layout.group > 1 else count
    count = body.op("Mul", groups, body.ints(layout.group)) if layout.group > 1 else count
    coded = _quantize(body, body.tokens(recent, zero, count), layout)
    pairs = groups if layout.per_channel else count
    for name, value, length in zip(
        ("codes", "scale", "offset"), coded, (count, pairs, pairs), strict=True
    ):
        found[name] = body.join(parts[name], body.tokens(value, zero, length))
    if layout.has_window:
        found["window"] = body.tokens(recent, count, body.length(recent))
    outputs = [body.op("Identity", found[name]) for name in layout.parts]
    return body.function(layout.append_op, outputs, opset)


def _quantize(body: _Body, x: ir.Value, layout: CacheLayout) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes, scales and offsets of ``x [N, H, n G, d]`` and of one more group, of zeros.

    onnxruntime's reductions keep the shape of an empty input; with the zeros none is empty.
    """
    dtype = layout.dtype.numpy()
    heads = body.op("Shape", x, start=0, end=2)
    shape = body.op("Concat", heads, body.ints(layout.group, layout.size), axis=0)
    x = body.join(x, body.op("Expand", body.scalar(0, dtype), shape))
    axis = 3
    if layout.per_channel:
        x = body.op("Reshape", x, body.ints(0, 0, -1, layout.group, layout.size))
    low = body.op("ReduceMin", x, body.ints(axis), keepdims=1)
    high = body.op("ReduceMax", x, body.ints(axis), keepdims=1)
    steps = 2**layout.bits - 1
    step = body.op("Div", body.op("Sub", high, low), body.scalar(steps, dtype))
    # Equal numbers have no range; any step gives them the code 0.
    step = body.op("Max", step, body.scalar(float(np.finfo(dtype).tiny), dtype))
    codes = body.op("Round", body.op("Div", body.op("Sub", x, low), step))
    codes = body.op("Clip", codes, body.scalar(0, dtype), body.scalar(steps, dtype))
    codes = body.op("Cast", codes, to=ir.DataType.UINT8)
    if layout.per_channel:
        codes = body.op("Reshape", codes, body.ints(0, 0, -1, layout.size))
        step, low = (body.op("Squeeze", v, body.ints(axis)) for v in (step, low))
    return _pack(body, codes, layout), step, low


def _pack(body: _Body, codes: ir.Value, layout: CacheLayout) -> ir.Value:
    """8/b codes in a byte, ``[.., d]`` to ``[.., d b / 8]``."""
    share = 8 // layout.bits
    if share == 1:
        return codes
    split = body.op("Reshape", codes, body.ints(0, 0, -1, layout.codes_size, share))
    byte: ir.Value | None = None
    for place in range(share):
        piece = body.op("Gather", split, body.op("Constant", value_int=place), axis=4)
        if byte is None:
            byte = piece
            continue
        shift = body.scalar(place * layout.bits, np.dtype(np.uint8))
        byte = body.op("BitwiseOr", byte, body.op("BitShift", piece, shift, direction="LEFT"))
    assert byte is not None
    return byte


def _unpack(body: _Body, packed: ir.Value, layout: CacheLayout) -> ir.Value:
    """The inverse of :func:`_pack`."""
    share = 8 // layout.bits
    if share == 1:
        return packed
    unsigned = np.dtype(np.uint8)
    mask = body.scalar(2**layout.bits - 1, unsigned)
    shifts = np.arange(share, dtype=np.uint8) * layout.bits
    wide = body.op("Unsqueeze", packed, body.ints(4))
    moved = body.op(
        "BitShift", wide, body.op("Constant", value=ir.tensor(shifts)), direction="RIGHT"
    )
    return body.op("Reshape", body.op("BitwiseAnd", moved, mask), body.ints(0, 0, -1, layout.size))
