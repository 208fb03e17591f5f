"""ONNX Runtime sessions with our operators registered where they fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq.errors import DataError, UnsupportedError
from onnxq.runtime.flavour import require_onnxruntime
from onnxq.runtime.library import inspect_library, usable_library

if TYPE_CHECKING:
    import onnxruntime

_SHORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
_CPU = _SHORT_NAMES["cpu"]
_MESSAGE_LENGTH = 600


def available_providers() -> tuple[str, ...]:
    """The execution providers that the installed onnxruntime was built with, best first."""
    return tuple(require_onnxruntime().get_available_providers())


def session(
    model: str | os.PathLike[str] | bytes,
    providers: Sequence[str] | None = None,
    *,
    threads: int | None = None,
    optimize: bool = True,
    library: str | os.PathLike[str] | bool | None = None,
) -> onnxruntime.InferenceSession:
    """An ``onnxruntime.InferenceSession`` in which our operators run as compiled kernels.

    Where the kernel library is absent or does not fit, the operators run as the bodies that the
    model carries; that is logged once a process (logger ``onnxq.runtime``).

    Args:
        model: path of the model, or the model itself as bytes.
        providers: execution providers in order of preference, by ONNX Runtime's names or as
            ``cpu`` and ``cuda``. None is the CPU alone.
        threads: threads inside one operator; None leaves the choice to ONNX Runtime.
        optimize: whether ONNX Runtime may rewrite the graph.
        library: None registers the package's own library where it fits, True insists on it, False
            uses the bodies, and a path names another onnxq operator library.

    Raises:
        DataError: ``DATA-FILE-MISSING``, ``DATA-LIBRARY-MISSING``; ``DATA-ORT-REFUSED`` with ONNX
            Runtime's message.
        UnsupportedError: the errors of `require_onnxruntime`, ``UNSUPPORTED-PROVIDER``,
            ``UNSUPPORTED-LIBRARY``; ``UNSUPPORTED-CUSTOM-OP`` when the
            model needs an operator that is not there.
    """
    ort = require_onnxruntime()
    source = model if isinstance(model, bytes) else _existing(Path(model))
    wanted = _provider_names(ort, providers)
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = _library_path(library)
    name = "the model" if isinstance(source, bytes) else source
    try:
        if path is not None:
            options.register_custom_ops_library(str(path))
        made = ort.InferenceSession(source, options, providers=wanted)
    except Exception as error:  # ONNX Runtime's own classes share no base but Exception
        raise _refused(name, str(error)) from error
    # ONNX Runtime drops a provider that fails to start and goes on without it.
    lost = [provider for provider in wanted if provider not in made.get_providers()]
    if lost:
        raise UnsupportedError(
            "UNSUPPORTED-PROVIDER",
            f"{lost[0]} is in this onnxruntime but did not start on this machine",
            "check its driver and libraries, or leave it out",
        )
    return made


def _existing(path: Path) -> str:
    if not path.is_file():
        raise DataError("DATA-FILE-MISSING", f"there is no file {path}", "check the path")
    return str(path)


def _provider_names(ort: Any, providers: Sequence[str] | None) -> list[str]:
    names = [_SHORT_NAMES.get(name.lower(), name) for name in providers or [_CPU]]
    available = ort.get_available_providers()
    for name in names:
        if name not in available:
            raise UnsupportedError(
                "UNSUPPORTED-PROVIDER",
                f"this onnxruntime has no {name}; it has {', '.join(available)}",
                "choose one of those, or install the onnxruntime that has it",
            )
    return names


def _library_path(library: str | os.PathLike[str] | bool | None) -> Path | None:
    if library is False:
        return None
    if library is None or library is True:
        usable = usable_library()
        if usable is None and library is True:
            raise UnsupportedError(
                "UNSUPPORTED-LIBRARY",
                "the package's own operator library cannot be used",
                "`onnxq doctor` says why",
            )
        return None if usable is None else usable.path
    return inspect_library(Path(library)).path


def _refused(name: str, message: str) -> DataError | UnsupportedError:
    text = " ".join(message.split())[:_MESSAGE_LENGTH]
    if "is not a registered function/op" in message or "No Op registered for" in message:
        return UnsupportedError(
            "UNSUPPORTED-CUSTOM-OP",
            f"onnxruntime lacks an operator that {name} uses: {text}",
            "name the library that brings the operator, or export the model without it",
        )
    return DataError(
        "DATA-ORT-REFUSED",
        f"onnxruntime cannot load {name}: {text}",
        "run `onnxq inspect` on the model",
    )
