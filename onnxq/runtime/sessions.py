"""ONNX Runtime sessions with our operators registered where they fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq.errors import DataError, UnsupportedError
from onnxq.runtime.cuda import device_problem, usable_cuda_library
from onnxq.runtime.flavour import require_onnxruntime
from onnxq.runtime.library import CPU, CUDA, inspect_library, usable_library

if TYPE_CHECKING:
    import onnxruntime

_SHORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
_CPU = _SHORT_NAMES["cpu"]
_CUDA = _SHORT_NAMES["cuda"]
_MESSAGE_LENGTH = 600
# What ONNX Runtime says of an operator that is registered, but not for such inputs; and our own
# kernels of what they do not cover. A kernel that finds a fault in the model says something else.
_NO_KERNEL = ("Type Error", "Kernel not found", "NOT_IMPLEMENTED")

_log = logging.getLogger("onnxq.runtime")


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
    optimized: str | os.PathLike[str] | None = None,
) -> onnxruntime.InferenceSession:
    """An ``onnxruntime.InferenceSession`` in which our operators run as compiled kernels.

    Where the kernel library is absent or does not fit, the operators run as the bodies that the
    model carries; that is logged once a process (logger ``onnxq.runtime``). So do the operators of
    a model with types that no kernel takes; that is logged for each model. With CUDA among the
    providers the library is that of the CUDA kernels.

    Args:
        model: path of the model, or the model itself as bytes.
        providers: execution providers in order of preference, by ONNX Runtime's names or as
            ``cpu`` and ``cuda``. None is the CPU alone. CUDA that cannot run here is left out with
            a warning where another provider follows it.
        threads: threads inside one operator; None leaves the choice to ONNX Runtime.
        optimize: whether ONNX Runtime may rewrite the graph.
        library: None registers the package's own library where it fits, True insists on it, False
            uses the bodies, and a path names another onnxq operator library.
        optimized: also write the graph as ONNX Runtime runs it to this file, its weights in
            another beside it.

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

    def make_options() -> Any:
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized is not None:
            options.log_severity_level = 3  # it warns that the file is for this machine
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name",
                Path(optimized).name + ".data",
            )
        return options

    path = _library_path(library, on_cuda=_CUDA in wanted)
    name = "the model" if isinstance(source, bytes) else source
    try:
        made = _make(ort, source, make_options(), wanted, path)
    except Exception as error:  # ONNX Runtime's own classes share no base but Exception
        if path is None or library is not None or not _lacks_kernel(str(error)):
            raise _refused(name, str(error)) from error
        try:
            made = _make(ort, source, make_options(), wanted, None)
        except Exception:
            raise _refused(name, str(error)) from error
        _log.warning(
            "onnxq: the kernels do not take %s, so its operators run as their standard-ONNX "
            "bodies: %s",
            name,
            _shortened(str(error)),
        )
    # ONNX Runtime drops a provider that fails to start and goes on without it.
    lost = [provider for provider in wanted if provider not in made.get_providers()]
    if lost:
        raise UnsupportedError(
            "UNSUPPORTED-PROVIDER",
            f"{lost[0]} is in this onnxruntime but did not start on this machine",
            "check its driver and libraries, or leave it out",
        )
    return made


def _make(
    ort: Any, source: str | bytes, options: Any, providers: list[str], library: Path | None
) -> Any:
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(source, options, providers=providers)


def _existing(path: Path) -> str:
    if not path.is_file():
        raise DataError("DATA-FILE-MISSING", f"there is no file {path}", "check the path")
    return str(path)


def _provider_names(ort: Any, providers: Sequence[str] | None) -> list[str]:
    names = [_SHORT_NAMES.get(name.lower(), name) for name in providers or [_CPU]]
    available = ort.get_available_providers()
    if _CUDA in names and len(set(names)) > 1:
        here = f"this onnxruntime has no {_CUDA}" if _CUDA not in available else device_problem()
        if here is not None:
            names = [name for name in names if name != _CUDA]
            _log.warning("onnxq: without CUDA, on %s: %s", ", ".join(names), here)
    for name in names:
        if name not in available:
            raise UnsupportedError(
                "UNSUPPORTED-PROVIDER",
                f"this onnxruntime has no {name}; it has {', '.join(available)}",
                "choose one of those, or install the onnxruntime that has it",
            )
    return names


def _library_path(library: str | os.PathLike[str] | bool | None, *, on_cuda: bool) -> Path | None:
    if library is False:
        return None
    if library is None or library is True:
        usable = usable_cuda_library() if on_cuda else usable_library()
        if usable is None and library is True:
            raise UnsupportedError(
                "UNSUPPORTED-LIBRARY",
                "the package's own operator library cannot be used",
                "`onnxq doctor` says why",
            )
        return None if usable is None else usable.path
    return inspect_library(Path(library), CUDA if on_cuda else CPU).path


def _lacks_kernel(message: str) -> bool:
    return any(text in message for text in _NO_KERNEL)


def _shortened(message: str) -> str:
    return " ".join(message.split())[:_MESSAGE_LENGTH]


def _refused(name: str, message: str) -> DataError | UnsupportedError:
    text = _shortened(message)
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
