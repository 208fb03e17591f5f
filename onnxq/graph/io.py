"""Guarded load and atomic save of ONNX models, their fingerprint and their provenance.

:func:`load` reads the graph and leaves large weights on the disk, whether they lie in external
data or inside the model file; every file is checked before it is opened (:mod:`.external`), and the
graph before it is handed on (:mod:`.check`). :func:`save` writes one tensor at a time and replaces
the output in one step (:mod:`.atomic`): the data file first, named by its content, the graph last.
Equal models give equal bytes: nothing that is written depends on the time, the machine or a path.
"""

from onnxq.graph.external import MAX_EXTERNAL_BYTES, FileTensor
from onnxq.graph.identity import file_hash, fingerprint, get_provenance, set_provenance
from onnxq.graph.probe import check_loads
from onnxq.graph.read import data_files, from_proto, load, size_on_disk
from onnxq.graph.tensors import copy_model, copy_to_edit, tensor_slots
from onnxq.graph.write import MAX_MESSAGE_BYTES, SavedModel, save, serialized, session_source

__all__ = [
    "MAX_EXTERNAL_BYTES",
    "MAX_MESSAGE_BYTES",
    "FileTensor",
    "SavedModel",
    "check_loads",
    "copy_model",
    "copy_to_edit",
    "data_files",
    "file_hash",
    "fingerprint",
    "from_proto",
    "get_provenance",
    "load",
    "save",
    "serialized",
    "session_source",
    "set_provenance",
    "size_on_disk",
    "tensor_slots",
]
