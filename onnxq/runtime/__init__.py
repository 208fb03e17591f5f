"""ONNX Runtime: one installation of it, sessions with our operators, and what this machine can do.

Importing this package does not import onnxruntime; the first session does.
"""

from __future__ import annotations

from onnxq.runtime.diagnosis import DoctorReport, doctor
from onnxq.runtime.flavour import require_onnxruntime
from onnxq.runtime.kernels import ModelKernels, NodeKernel, model_kernels
from onnxq.runtime.library import Library, inspect_library, usable_library
from onnxq.runtime.sessions import available_providers, session

__all__ = [
    "DoctorReport",
    "Library",
    "ModelKernels",
    "NodeKernel",
    "available_providers",
    "doctor",
    "inspect_library",
    "model_kernels",
    "require_onnxruntime",
    "session",
    "usable_library",
]
