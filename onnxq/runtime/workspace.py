"""Run a model that is still in memory, exactly as it is written.

The weights go to a file that onnxruntime maps into memory, so that a check costs no copies of them:
on a 90 MB model a session adds 7 MB of memory, where one made from bytes adds 350.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import onnx

from onnxq.errors import DataError
from onnxq.graph.check import walk_tensors
from onnxq.graph.tensors import Streamed, placeholders, skeleton
from onnxq.runtime.caches import with_empty_caches

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort

Sample = Mapping[str, np.ndarray]

_WEIGHTS: Final = "weights.bin"
_MAPPED_BYTES: Final = 1 << 12
"""Smaller weights stay in the graph file."""

_ALIGNMENT: Final = 4096
"""Of weights in the file: what onnxruntime maps without an offset."""


class Workspace:
    """A temporary folder with the weights of one model in several states; a context manager.

    A weight that two states share is written once. Sessions outlive the folder.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="onnxq-")
        self._offsets: dict[int, int] = {}
        self._held: list[ir.TensorProtocol] = []  # so that no identity is used again
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    def session(
        self, model: ir.Model, *, threads: int = 1, outputs: Sequence[str] = ()
    ) -> ort.InferenceSession:
        """A CPU session that runs ``model`` as it is: onnxruntime rewrites nothing.

        Args:
            model: what to run; it is not changed.
            threads: inside one operator.
            outputs: names of inner values of the main graph that become outputs as well.

        Raises:
            DataError: ``DATA-ORT-REFUSED``, with onnxruntime's message; ``DATA-NO-SPACE``: the
                temporary folder is full.
        """
        import onnxruntime as ort

        path = Path(self._folder.name, "model.onnx")
        with _reported(path.parent):
            path.write_bytes(self._skeleton(model, outputs).SerializeToString())
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Packed copies of the weights pay off only over many runs.
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's classes have no common base
            text = " ".join(str(error).split())[:600]
            raise DataError(
                "DATA-ORT-REFUSED",
                f"onnxruntime cannot load the model: {text}",
                "run `onnxq inspect` on the model; --bisect names the pass if one broke it",
            ) from error

    def _skeleton(self, model: ir.Model, outputs: Sequence[str]) -> onnx.ModelProto:
        """The graph, whose large weights lie in the folder's file."""
        proto, taken = skeleton(
            model,
            lambda tensor, is_initializer: is_initializer and tensor.nbytes >= _MAPPED_BYTES,
        )
        self._write([t for t in taken if id(t) not in self._offsets])
        for tensor, index in placeholders(walk_tensors(proto)):
            if index is None:
                continue
            place = (_WEIGHTS, self._offsets[id(taken[index])], taken[index].nbytes)
            del tensor.external_data[:]
            for key, value in zip(("location", "offset", "length"), place, strict=True):
                tensor.external_data.add(key=key, value=str(value))
        present = {o.name for o in proto.graph.output}
        for name in outputs:
            if name not in present:
                proto.graph.output.add(name=name)
        return proto

    def _write(self, tensors: Sequence[ir.TensorProtocol]) -> None:
        with _reported(Path(self._folder.name)), Path(self._folder.name, _WEIGHTS).open("ab") as f:
            for tensor in tensors:
                if id(tensor) in self._offsets:
                    continue
                self._offsets[id(tensor)] = self._end + -self._end % _ALIGNMENT
                f.write(bytes(-self._end % _ALIGNMENT))
                Streamed(tensor).tofile(f)
                self._end = f.tell()
                self._held.append(tensor)


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            "DATA-NO-SPACE",
            f"cannot write the model to the temporary folder {folder.parent}: {error.strerror}",
            "free space there, or set TMPDIR to a folder with room for the model",
        ) from error


def run_samples(
    session: ort.InferenceSession, samples: Iterable[Sample]
) -> Iterator[dict[str, np.ndarray]]:
    """The outputs for each sample, by name.

    Raises:
        DataError: ``DATA-ORT-RUN``: onnxruntime failed on a sample.
    """
    names = [o.name for o in session.get_outputs()]
    for number, sample in enumerate(samples):
        feeds = with_empty_caches(session, sample)
        try:
            values: Sequence[Any] = session.run(names, feeds)
        except Exception as error:
            text = " ".join(str(error).split())[:600]
            raise DataError(
                "DATA-ORT-RUN",
                f"onnxruntime failed on sample {number}: {text}",
                "check that names, shapes and types of the samples are the model's",
            ) from error
        yield dict(zip(names, values, strict=True))
