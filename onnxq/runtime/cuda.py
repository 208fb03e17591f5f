"""What stands between a model and the CUDA kernels on this machine.

The driver is asked through its own library, so that a machine without one, or one without onnxq's
CUDA kernels, gets an answer too.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass

from onnxq.errors import UnsupportedError
from onnxq.runtime.library import CUDA, Library, inspect_library, shipped_path

MIN_CAPABILITY = 80
"""Ampere: 10 * major + minor of the oldest devices that the kernels run on."""

_DRIVER_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NOT_BUILT = "onnxq's CUDA kernels were not built; reinstall onnxq with ONNXQ_CUDA=1 where nvcc is"

_log = logging.getLogger("onnxq.runtime")


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver says of this machine.

    Args:
        version: newest CUDA that it runs, 1000 * major + 10 * minor; 0 without a driver.
        devices: how many GPUs this process may use.
        capability: 10 * major + minor of the first one; 0 without one.
        error: why there is no driver or device, None when there are.
    """

    version: int
    devices: int
    capability: int
    error: str | None


def probe_driver() -> Driver:
    """Ask the driver; raises nothing."""
    try:
        handle = ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return Driver(0, 0, 0, f"there is no NVIDIA driver ({_DRIVER_LIBRARY} does not load)")
    version, devices = ctypes.c_int(), ctypes.c_int()
    if handle.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return Driver(0, 0, 0, "the NVIDIA driver does not answer")
    status = handle.cuInit(0) or handle.cuDeviceGetCount(ctypes.byref(devices))
    if status != 0 or devices.value == 0:
        return Driver(version.value, 0, 0, f"the NVIDIA driver shows no GPU (CUDA error {status})")
    major, minor = ctypes.c_int(), ctypes.c_int()
    handle.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, 0)
    handle.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, 0)
    return Driver(version.value, devices.value, 10 * major.value + minor.value, None)


def device_problem() -> str | None:
    """Why no CUDA program runs here, or None when one does."""
    return probe_driver().error


def cuda_problem() -> str | None:
    """Why onnxq's CUDA kernels cannot be used, or None when they can."""
    driver = probe_driver()
    if driver.error is not None:
        return driver.error
    path = shipped_path(kind=CUDA)
    if path is None:
        return _NOT_BUILT
    try:
        library = inspect_library(path, CUDA)
    except UnsupportedError as error:
        return error.cause
    if driver.version // 1000 < library.cuda_version // 1000:
        return (
            f"the NVIDIA driver is too old: it runs CUDA {_text(driver.version)}, the kernels "
            f"need {library.cuda_version // 1000}.0"
        )
    if driver.capability < MIN_CAPABILITY:
        return (
            f"the GPU has compute capability {driver.capability / 10:.1f}; the kernels need "
            f"{MIN_CAPABILITY / 10:.1f} or newer"
        )
    return None


@functools.cache
def usable_cuda_library() -> Library | None:
    """The package's own CUDA library, or None, with one warning a process that says why."""
    problem = cuda_problem()
    if problem is None:
        path = shipped_path(kind=CUDA)
        return None if path is None else inspect_library(path, CUDA)
    _log.warning("onnxq: %s; operators run as their standard-ONNX bodies", problem)
    return None


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
