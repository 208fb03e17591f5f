"""What a model is: its fingerprint, the hash of a file, and the provenance written into it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import onnx_ir as ir

from onnxq.graph import check
from onnxq.graph.tensors import Streamed, placeholders, skeleton

PROVENANCE_PREFIX = "onnxq."
"""Start of the metadata keys that belong to us."""


class HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes, /) -> int:
        """Hash ``data`` and pass it on."""
        self._hash.update(data)
        if self._file is not None:
            self._file.write(data)
        self.position += len(data)
        return len(data)

    def hexdigest(self) -> str:
        """SHA-256 of what was written, in hex."""
        return self._hash.hexdigest()


def fingerprint(model: ir.Model) -> str:
    """SHA-256, in hex, of the graph's structure and weights.

    It does not depend on where or in which field the weights are stored, nor on documentation,
    metadata or the producer's name; it does on every name, type, shape, attribute and number.
    """
    proto, tensors = skeleton(model, lambda _tensor, _is_initializer: True)
    hashes: dict[int, str] = {}
    for tensor in tensors:
        if id(tensor) not in hashes:
            hashes[id(tensor)] = _tensor_hash(tensor)
    for tensor, index in placeholders(check.walk_tensors(proto)):
        if index is not None:
            tensor.external_data[0].value = hashes[id(tensors[index])]
    for field in ("producer_name", "producer_version", "model_version", "domain"):
        proto.ClearField(field)
    _strip_notes(proto)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def _tensor_hash(tensor: ir.TensorProtocol) -> str:
    out = HashedFile()
    Streamed(tensor).tofile(out)
    return out.hexdigest()


def _strip_notes(message: Any) -> None:
    """Remove documentation and metadata from a message and all messages in it."""
    for note in ("doc_string", "metadata_props"):
        if note in message.DESCRIPTOR.fields_by_name:
            message.ClearField(note)
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                _strip_notes(part)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_provenance(model: ir.Model, facts: Mapping[str, Any]) -> None:
    """Write ``facts`` into the model's metadata as ``onnxq.<key>``, in place of older ones.

    The values are stored as JSON with sorted keys; keep times, host names and paths out of them,
    as equal runs must give equal bytes.
    """
    encoded = {
        PROVENANCE_PREFIX + key: json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        for key, value in sorted(facts.items())
    }
    others = {
        key: value
        for key, value in model.metadata_props.items()
        if not key.startswith(PROVENANCE_PREFIX)
    }
    model.metadata_props.clear()
    model.metadata_props.update(others)
    model.metadata_props.update(encoded)


def get_provenance(model: ir.Model) -> dict[str, Any]:
    """The facts that :func:`set_provenance` wrote; a value that is not JSON stays a string."""
    facts: dict[str, Any] = {}
    for key, text in sorted(model.metadata_props.items()):
        if key.startswith(PROVENANCE_PREFIX):
            try:
                facts[key.removeprefix(PROVENANCE_PREFIX)] = json.loads(text)
            except ValueError:
                facts[key.removeprefix(PROVENANCE_PREFIX)] = text
    return facts
