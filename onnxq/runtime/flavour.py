"""Exactly one onnxruntime: its flavours are separate packages that overwrite each other's files."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

from onnxq.errors import UnsupportedError

FLAVOURS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)
"""Packages that install, or once installed, the module ``onnxruntime``."""

_CHOOSE = "pip install 'onnxq[cpu]', or 'onnxq[gpu]' on a machine with an NVIDIA GPU"


def installed_flavours() -> dict[str, str]:
    """Name and version of each installed package that brings the module ``onnxruntime``."""
    found = {}
    for name in FLAVOURS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if _brings_module(name):
            found[name] = version
    return found


def _brings_module(name: str) -> bool:
    """Whether a package holds the module itself; newer ones (onnxruntime-qnn 2) are plug-ins."""
    try:
        files = metadata.files(name)
    except metadata.PackageNotFoundError:
        return True
    return files is None or any(file.parts[0] == "onnxruntime" for file in files)


def require_onnxruntime() -> ModuleType:
    """The module ``onnxruntime``, once it is sure which one that is.

    Raises:
        UnsupportedError: ``UNSUPPORTED-NO-ORT`` when there is none, ``UNSUPPORTED-TWO-ORT`` when
            several flavours overwrote each other, ``UNSUPPORTED-BROKEN-ORT`` when the import fails.
    """
    found = installed_flavours()
    if len(found) > 1:
        listed = " and ".join(f"{name} {version}" for name, version in found.items())
        raise UnsupportedError(
            "UNSUPPORTED-TWO-ORT",
            f"{listed} are both installed, and overwrite each other's files",
            f"pip uninstall -y {' '.join(found)}, then {_CHOOSE}",
        )
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise _broken(error) from error
        raise UnsupportedError(
            "UNSUPPORTED-NO-ORT", "onnxruntime is not installed", _CHOOSE
        ) from error
    except ImportError as error:
        raise _broken(error) from error


def _broken(error: ImportError) -> UnsupportedError:
    return UnsupportedError(
        "UNSUPPORTED-BROKEN-ORT",
        f"onnxruntime is installed but does not import: {error}",
        "reinstall it: pip install --force-reinstall onnxruntime",
    )
