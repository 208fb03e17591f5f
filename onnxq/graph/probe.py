"""Ask onnxruntime whether it can load a model, in a process that may crash.

onnxruntime parses and rewrites the graph in C++; some models make it abort or fault. The probe runs
in a child, so that the worst case is an error with a code. The child imports only onnxruntime.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from onnxq.errors import DataError, UnsupportedError

_FAILED = 3
"""Exit code of the child when onnxruntime refused the model with a message."""

_CHILD = """\
import sys
model, *libraries = sys.argv[1:]
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 4
try:
    for library in libraries:
        options.register_custom_ops_library(library)
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
except Exception as error:
    sys.stderr.write(str(error))
    sys.stderr.flush()
    sys.exit(3)
"""

_MESSAGE_LENGTH = 600
_HINT = "run `onnxq inspect` on the model"


def check_loads(
    path: str | os.PathLike[str],
    *,
    libraries: Sequence[str | os.PathLike[str]] = (),
    isolated: bool = True,
    timeout_s: float = 300.0,
) -> None:
    """Raise unless onnxruntime can create a CPU session for the model at ``path``.

    Args:
        path: the model file.
        libraries: custom-operator libraries to register; code, so only ones the user chose.
        isolated: use a child process, which a crash cannot take down with us. ``False`` is for a
            model that has passed once: it saves the start of a process.
        timeout_s: seconds after which the child is ended.

    Raises:
        DataError: ``DATA-ORT-REFUSED`` with onnxruntime's message, ``DATA-ORT-CRASHED`` with the
            signal, ``DATA-ORT-TIMEOUT``.
        UnsupportedError: ``UNSUPPORTED-CUSTOM-OP`` when an operator is not registered,
            ``UNSUPPORTED-NO-ORT`` when onnxruntime is not installed.
    """
    source = Path(path)
    if not isolated:
        _check_here(source, libraries)
        return
    command = [sys.executable, "-c", _CHILD, str(source), *map(str, libraries)]
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            "DATA-ORT-TIMEOUT",
            f"onnxruntime did not load {source} within {timeout_s:g} s",
            "the model may be too large for this machine, or make onnxruntime loop",
        ) from error
    message = child.stderr.decode(errors="replace").strip()
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise DataError(
            "DATA-ORT-CRASHED",
            f"onnxruntime crashed with {name} while it loaded {source}",
            "the model is not usable with this onnxruntime; export it again",
        )
    if child.returncode == _FAILED:
        raise _refused(source, message)
    if child.returncode:
        if "No module named 'onnxruntime'" in message:
            raise _not_installed()
        raise DataError(
            "DATA-ORT-CRASHED",
            f"onnxruntime ended with code {child.returncode} on {source}: {_short(message)}",
            _HINT,
        )


def _check_here(source: Path, libraries: Sequence[str | os.PathLike[str]]) -> None:
    try:
        import onnxruntime
    except ImportError as error:
        raise _not_installed() from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        for library in libraries:
            options.register_custom_ops_library(str(library))
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises eleven classes of its own, all plain Exceptions
        raise _refused(source, str(error)) from error


def _refused(source: Path, message: str) -> DataError | UnsupportedError:
    text = _short(message)
    if "is not a registered function/op" in message or "No Op registered for" in message:
        return UnsupportedError(
            "UNSUPPORTED-CUSTOM-OP",
            f"onnxruntime lacks an operator that {source} uses: {text}",
            "export the model without it; libraries of operators are not loaded",
        )
    return DataError("DATA-ORT-REFUSED", f"onnxruntime cannot load {source}: {text}", _HINT)


def _not_installed() -> UnsupportedError:
    return UnsupportedError(
        "UNSUPPORTED-NO-ORT",
        "onnxruntime is not installed",
        "pip install onnxq[cpu], or onnxq[gpu] on a machine with an NVIDIA GPU",
    )


def _short(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _MESSAGE_LENGTH else text[:_MESSAGE_LENGTH] + " ..."
