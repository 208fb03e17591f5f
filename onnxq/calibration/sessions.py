"""Onnxruntime sessions on observed copies of one model, with little memory.

The weights are written once to a temporary folder as external data, which onnxruntime maps into
memory; each session then reads a small graph file beside them. A model in one file, or in bytes,
would be parsed and kept beside onnxruntime's own copy of the weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from onnxq.errors import DataError, UnsupportedError

_WEIGHTS = "weights.bin"
_EXTERNAL_FROM_BYTES = 4096


class Workspace:
    """A temporary folder that holds the weights of ``model`` for several sessions.

    Use as a context manager; the folder is removed at its end. ``model`` is not changed.

    Raises:
        DataError: CALIB-NO-SPACE when the folder cannot be written.
    """

    def __init__(self, model: ir.Model, threads: int = 1) -> None:
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="onnxq-calibration-")
        self._sessions = 0
        path = Path(self._folder.name) / "model.onnx"
        try:
            ir.save(
                widen_bfloat16(model),
                path,
                external_data=_WEIGHTS,
                size_threshold_bytes=_EXTERNAL_FROM_BYTES,
            )
        except OSError as error:
            self._folder.cleanup()
            raise DataError(
                "CALIB-NO-SPACE",
                f"cannot write the model to a temporary folder: {error.strerror or error}",
                "free space there, or set TMPDIR to a folder with room for the model",
            ) from error
        self.model = ir.load(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    def session(self, observed: ir.Model) -> Session:
        """A session on ``observed``, a copy of :attr:`model` with other outputs.

        Raises:
            UnsupportedError: CALIB-SESSION when onnxruntime cannot load it.
        """
        self._sessions += 1
        path = Path(self._folder.name) / f"observed{self._sessions}.onnx"
        path.write_bytes(ir.to_proto(observed).SerializeToString())
        return Session(path, self._threads)


class Session:
    """An onnxruntime CPU session that hands out one output at a time."""

    def __init__(self, path: Path, threads: int) -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.use_deterministic_compute = True
        # Waiting threads would burn the processor time that the histograms between runs need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Fusions beyond the basic ones would hide values or make float results differ by path.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._session: Any = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise UnsupportedError(
                "CALIB-SESSION",
                f"onnxruntime cannot load the model to observe it: {_first_line(error)}",
                "check that the model runs in onnxruntime on a CPU",
            ) from error
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        self._make = ort.OrtValue.ortvalue_from_numpy

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray], sample: int
    ) -> list[Any]:
        """Run one sample; the outputs stay onnxruntime's, ``.numpy()`` copies one.

        Raises:
            DataError: CALIB-RUN when the run fails.
        """
        given = {name: self._make(_feed(feeds[name])) for name in self._inputs if name in feeds}
        try:
            found: list[Any] = self._session.run_with_ort_values(list(outputs), given)
        except Exception as error:
            raise DataError(
                "CALIB-RUN",
                f"onnxruntime failed on calibration sample {sample}: {_first_line(error)}",
                "check the shapes and the range of the integer inputs of that sample",
            ) from error
        return found


def _feed(array: np.ndarray) -> np.ndarray:
    """Contiguous, and in float32 instead of bfloat16; see :func:`widen_bfloat16`."""
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            "CALIB-NO-RUNTIME",
            "onnxruntime is not installed, and calibration runs the model",
            "pip install 'onnxq[cpu]'",
        ) from error
    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def widen_bfloat16(model: ir.Model) -> ir.Model:
    """A copy of ``model`` that computes in float32 where it said bfloat16.

    Onnxruntime has next to no bfloat16 kernels for the CPU. Weights keep their bfloat16 values;
    activations are not rounded to bfloat16, which moves an extreme by at most one part in 256.
    """
    copy = model.clone()
    for graph in copy.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            _widen_value(value)
        for node in graph:
            _widen_node(node)
    for function in copy.functions.values():
        for node in function.all_nodes():
            _widen_node(node)
    return copy


def _widen_node(node: ir.Node) -> None:
    for value in node.outputs:
        _widen_value(value)
    for name, attribute in list(node.attributes.items()):
        widened = _widen_attribute(name, attribute)
        if widened is not None:
            node.attributes[name] = widened


def _widen_value(value: ir.Value) -> None:
    if value.dtype is ir.DataType.BFLOAT16:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    if value.const_value is not None and value.const_value.dtype is ir.DataType.BFLOAT16:
        value.const_value = _widen_tensor(value.const_value)


def _widen_attribute(name: str, attribute: ir.Attr) -> ir.Attr | None:
    """The attribute in float32, or None when it does not mention bfloat16."""
    if attribute.is_ref():
        return None
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.dtype is ir.DataType.BFLOAT16:
            return ir.AttrTensor(name, _widen_tensor(tensor))
    is_type = name in ("to", "dtype") and attribute.type is ir.AttributeType.INT
    if is_type and attribute.as_int() == ir.DataType.BFLOAT16.value:
        return ir.AttrInt64(name, ir.DataType.FLOAT.value)
    return None


def _widen_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
