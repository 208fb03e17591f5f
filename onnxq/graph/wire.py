"""Protobuf wire format, as far as streaming needs it: read and write weights one at a time.

A protobuf message is a list of fields, each a tag (field number and wire type) and a payload, and
``ModelProto`` nests them as model > graph > initializer > raw_data. :func:`scan_model` walks these
four levels without parsing what lies between, so that :mod:`onnxq.graph.io` can parse a skeleton
without the weights and leave those in the file; :func:`write_model` does the reverse.
Field numbers are those of onnx.proto; the encoding is described at
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx
from google.protobuf.message import Message

MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA = 9

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}

MODEL_WIRE_TYPES = {
    field.number: _VARINT if field.type in (field.TYPE_INT64, field.TYPE_INT32) else _LENGTH
    for field in onnx.ModelProto.DESCRIPTOR.fields
}


class Malformed(ValueError):  # noqa: N818  (a verdict on bytes, turned into a DataError by load)
    """The bytes are not a protobuf message."""


class Truncated(Malformed):
    """The bytes are the beginning of a protobuf message whose end is missing."""


class Unusual(Malformed):
    """A valid message that the streaming reader does not split, such as two merged graphs."""


@dataclass(frozen=True)
class Field:
    """One field: its number, wire type, and the bytes ``[start, payload, stop)`` in the file."""

    number: int
    wire_type: int
    start: int
    payload: int
    stop: int


@dataclass(frozen=True)
class Weight:
    """An initializer whose raw data stays in the file: its index in the graph, and where it is."""

    index: int
    offset: int
    length: int


class _Window:
    """Random reads of a few bytes from a file, through a window so that most cost no call."""

    def __init__(self, descriptor: int, width: int = 1 << 16) -> None:
        self._descriptor = descriptor
        self._width = width
        self._start = 0
        self._data = b""

    def byte(self, position: int) -> int:
        if not self._start <= position < self._start + len(self._data):
            self._start = position
            self._data = os.pread(self._descriptor, self._width, position)
            if not self._data:
                raise Truncated(f"the file ends at byte {position}")
        return self._data[position - self._start]

    def varint(self, position: int, stop: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if position >= stop:
                raise Truncated(f"the file ends in a number at byte {position}")
            byte = self.byte(position)
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise Malformed(f"no number at byte {position - 10}")

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        position = start
        while position < stop:
            tag, payload = self.varint(position, stop)
            number, wire_type = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:
                raise Malformed(f"no field at byte {position}")
            if wire_type == _VARINT:
                _, end = self.varint(payload, stop)
            elif wire_type in _FIXED_SIZES:
                end = payload + _FIXED_SIZES[wire_type]
            elif wire_type == _LENGTH:
                length, payload = self.varint(payload, stop)
                end = payload + length
            else:
                raise Malformed(f"no field at byte {position}")
            yield Field(number, wire_type, position, payload, end)
            if end > stop:
                raise Truncated(f"the field at byte {position} should end at {end}, not {stop}")
            position = end


def scan_model(descriptor: int, size: int, keep_below: int) -> tuple[bytes, list[Weight]]:
    """Split a model file into a skeleton message and the weights that were cut out of it.

    Args:
        descriptor: the open file.
        size: its size in bytes.
        keep_below: raw data shorter than this many bytes stays in the skeleton.

    Returns:
        The bytes of a ``ModelProto`` without the cut raw data, and where each lies in the file.

    Raises:
        Malformed: the file is no model; Truncated: its end is missing; Unusual: parse it whole.
    """
    window = _Window(descriptor)
    graphs: list[Field] = []
    kept: list[tuple[int, int]] = []
    for field in window.fields(0, size):
        if MODEL_WIRE_TYPES.get(field.number) != field.wire_type:
            raise Malformed(f"byte {field.start} starts no field of an ONNX model")
        if field.number == MODEL_GRAPH:
            graphs.append(field)
        elif field.stop <= size:
            kept.append((field.start, field.stop))
    if len(graphs) != 1:
        raise Unusual(f"{len(graphs)} graphs")
    body, weights = _scan_graph(window, descriptor, graphs[0], keep_below)
    parts = [_read(descriptor, start, stop) for start, stop in kept]
    return b"".join([*parts, _header(MODEL_GRAPH, len(body)), body]), weights


def _scan_graph(
    window: _Window, descriptor: int, graph: Field, keep_below: int
) -> tuple[bytes, list[Weight]]:
    parts: list[bytes] = []
    weights: list[Weight] = []
    index = 0
    run_start = run_stop = graph.payload
    for field in window.fields(graph.payload, graph.stop):
        if field.number == GRAPH_INITIALIZER and field.wire_type == _LENGTH:
            raw = None
            if field.stop - field.payload >= keep_below and field.stop <= graph.stop:
                raw = _raw_data(window, field)
            if raw is not None and raw.stop - raw.payload >= keep_below:
                parts.append(_read(descriptor, run_start, run_stop))
                head = _read(descriptor, field.payload, raw.start)
                tail = _read(descriptor, raw.stop, field.stop)
                parts += [_header(GRAPH_INITIALIZER, len(head) + len(tail)), head, tail]
                weights.append(Weight(index, raw.payload, raw.stop - raw.payload))
                run_start = field.stop
            index += 1
        run_stop = field.stop
    parts.append(_read(descriptor, run_start, run_stop))
    return b"".join(parts), weights


def _raw_data(window: _Window, tensor: Field) -> Field | None:
    """The raw data of a tensor; of several, which protobuf allows, none is cut out."""
    found = [
        field
        for field in window.fields(tensor.payload, tensor.stop)
        if field.number == TENSOR_RAW_DATA and field.wire_type == _LENGTH
    ]
    return found[0] if len(found) == 1 else None


def _read(descriptor: int, start: int, stop: int) -> bytes:
    blocks: list[bytes] = []
    while start < stop:
        block = os.pread(descriptor, stop - start, start)
        if not block:
            raise Truncated(f"the file ends at byte {start}")
        blocks.append(block)
        start += len(block)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _header(number: int, length: int) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(length)


class Sink(Protocol):
    """Anything that bytes can be written to: a file, or a hash over one."""

    def write(self, data: bytes, /) -> int:
        """Take ``data`` and return how many bytes it took."""
        ...


class Streamable(Protocol):
    """A tensor that can write its raw bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes that :meth:`tofile` will write."""
        ...

    def tofile(self, file: Sink) -> None:
        """Write the raw bytes."""
        ...


def model_size(skeleton: onnx.ModelProto, tensors: Sequence[Streamable | None]) -> int:
    """Bytes that :func:`write_model` will write, within a few per tensor."""
    streamed = sum(tensor.nbytes + 16 for tensor in tensors if tensor is not None)
    return int(skeleton.ByteSize()) + streamed


def write_model(
    file: Sink, skeleton: onnx.ModelProto, tensors: Sequence[Streamable | None]
) -> None:
    """Write ``skeleton`` with the raw data of ``tensors`` put in, holding one of them at a time.

    Args:
        file: where the bytes go.
        skeleton: the model; its graph's initializers are taken out by this call.
        tensors: for each initializer of the graph the tensor whose bytes are its raw data, or
            ``None`` for one that is complete as it is.
    """
    heads = [tensor.SerializeToString(deterministic=True) for tensor in skeleton.graph.initializer]
    raws = [
        b"" if tensor is None else _header(TENSOR_RAW_DATA, tensor.nbytes) for tensor in tensors
    ]
    sizes = [
        len(head) + len(raw) + (0 if tensor is None else tensor.nbytes)
        for head, raw, tensor in zip(heads, raws, tensors, strict=True)
    ]
    tags = [_header(GRAPH_INITIALIZER, size) for size in sizes]
    del skeleton.graph.initializer[:]
    before, behind = _serialize_around(skeleton.graph, GRAPH_INITIALIZER)
    skeleton.ClearField("graph")
    first, last = _serialize_around(skeleton, MODEL_GRAPH)
    file.write(first)
    file.write(_header(MODEL_GRAPH, len(before) + len(behind) + _total(tags) + sum(sizes)))
    file.write(before)
    for tag, head, raw, tensor in zip(tags, heads, raws, tensors, strict=True):
        file.write(tag + head + raw)
        if tensor is not None:
            tensor.tofile(file)
    file.write(behind)
    file.write(last)


def _serialize_around(message: Message, number: int) -> tuple[bytes, bytes]:
    """The fields below and above field ``number``, which is empty.

    Readers need not care about the order of fields, but OpenVINO (2026.4) looks at the first few of
    a file to see whether it is a model, and knows only the usual order.
    """
    behind = type(message)()
    behind.CopyFrom(message)
    for field, _ in message.ListFields():
        (behind if field.number < number else message).ClearField(field.name)
    return (
        message.SerializeToString(deterministic=True),
        behind.SerializeToString(deterministic=True),
    )


def _total(parts: Iterable[bytes]) -> int:
    return sum(len(part) for part in parts)
