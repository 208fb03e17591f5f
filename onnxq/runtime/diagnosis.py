"""What this machine has: the facts behind ``onnxq doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxq
from onnxq.errors import UnsupportedError
from onnxq.runtime.cuda import cuda_problem
from onnxq.runtime.flavour import installed_flavours, require_onnxruntime
from onnxq.runtime.library import CUDA, inspect_library, library_problem, shipped_path

_COMPILERS = ("c++", "g++", "clang++")
_EXTRAS = {
    "images": "PIL",
    "models": "gguf",
    "report": "matplotlib",
}
# What a reader can use: the flags that decide which kernels run here and in ONNX Runtime.
_CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class DoctorReport:
    """What this machine has and what is wrong with it.

    Args:
        onnxq: version of this package.
        python: version of Python.
        machine: CPU architecture, for example ``x86_64``.
        cpu: the CPU's own name.
        cpu_count: processors that this process may use.
        cpu_features: instruction-set flags that matter here.
        onnxruntime: name and version of each installed flavour; exactly one is healthy.
        providers: execution providers of the installed onnxruntime.
        library: path of the operator library, None when it was not built.
        library_version: version of onnxq that it was built with.
        isa_levels: kernel levels that this CPU can run, the best last.
        isa: the level in use.
        kernels: ``operator since-version provider dtype`` of each registered kernel.
        cuda_library: path of the library of CUDA kernels, None when it was not built.
        cuda_problem: why the CUDA kernels cannot be used, None when they can; no fault of a machine
            without a GPU, so it does not count as a problem.
        compiler: path of a C++ compiler, None when there is none.
        extras: whether what each optional extra brings is importable.
        runtime_problem: why sessions cannot be made, and the cure; None when they can.
        kernels_problem: why the kernels do not run, and the consequence; None when they do.
    """

    onnxq: str
    python: str
    machine: str
    cpu: str
    cpu_count: int
    cpu_features: tuple[str, ...]
    onnxruntime: dict[str, str]
    providers: tuple[str, ...]
    library: str | None
    library_version: str | None
    isa_levels: tuple[str, ...]
    isa: str | None
    kernels: tuple[str, ...]
    cuda_library: str | None
    cuda_problem: str | None
    compiler: str | None
    extras: dict[str, bool]
    runtime_problem: str | None
    kernels_problem: str | None

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not work, each a sentence; empty on a healthy machine."""
        return tuple(filter(None, (self.runtime_problem, self.kernels_problem)))

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {**asdict(self), "problems": list(self.problems), "healthy": self.healthy}

    def lines(self) -> list[str]:
        """The report as plain lines."""
        flavours = ", ".join(f"{name} {version}" for name, version in self.onnxruntime.items())
        extras = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in self.extras.items())
        rows = (
            ("onnxq", f"{self.onnxq} on Python {self.python}"),
            ("cpu", f"{self.cpu} ({self.machine}, {self.cpu_count} processors)"),
            ("cpu features", " ".join(self.cpu_features) or "none known"),
            ("onnxruntime", flavours or "none"),
            ("providers", ", ".join(self.providers) or "none"),
            ("library", self.library or "not built"),
            ("kernel level", f"{self.isa or 'none'} (this CPU: {' '.join(self.isa_levels)})"),
            ("kernels", ", ".join(self.kernels) or "none"),
            ("cuda library", self.cuda_library or "not built"),
            ("cuda kernels", "usable" if self.cuda_problem is None else f"no: {self.cuda_problem}"),
            ("compiler", self.compiler or "none"),
            ("extras", extras),
        )
        return [f"{label:<13} {text}" for label, text in rows] + [
            f"PROBLEM       {problem}" for problem in self.problems
        ]

    def kernels_line(self) -> str:
        """One line on the kernels alone; loud when there are none."""
        if self.kernels_problem is not None:
            return f"onnxq: WITHOUT KERNELS: {self.kernels_problem}"
        return f"onnxq: kernels built, running at level {self.isa}"


def doctor() -> DoctorReport:
    """Look at this machine. Raises nothing: what is wrong is in ``problems``."""
    runtime_problem: str | None = None
    providers: tuple[str, ...] = ()
    try:
        providers = tuple(require_onnxruntime().get_available_providers())
    except UnsupportedError as error:
        runtime_problem = f"{error.cause}: {error.hint}"

    path = shipped_path()
    version: str | None = None
    kernels: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    isa: str | None = None
    kernels_problem = library_problem()
    if path is not None and kernels_problem is None:
        library = inspect_library(path)
        version, levels = library.version, library.isa_levels
        kernels = tuple(
            f"{row.op} {row.since_version} {row.provider} {row.dtype}" for row in library.kernels
        )
        isa, kernels_problem = _isa_in_use(levels)
    cuda_path = shipped_path(kind=CUDA)
    return DoctorReport(
        onnxq=onnxq.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        cpu=_cpu_info("model name") or platform.processor() or "unknown",
        cpu_count=len(os.sched_getaffinity(0)),
        cpu_features=_cpu_features(),
        onnxruntime=installed_flavours(),
        providers=providers,
        library=None if path is None else str(path),
        library_version=version,
        isa_levels=levels,
        isa=isa,
        kernels=kernels,
        cuda_library=None if cuda_path is None else str(cuda_path),
        cuda_problem=cuda_problem(),
        compiler=next(filter(None, map(shutil.which, _COMPILERS)), None),
        extras={
            name: importlib.util.find_spec(module) is not None for name, module in _EXTRAS.items()
        },
        runtime_problem=runtime_problem,
        kernels_problem=kernels_problem,
    )


def _isa_in_use(levels: tuple[str, ...]) -> tuple[str | None, str | None]:
    """The level that kernels made now would use, and what is wrong with the choice."""
    forced = os.environ.get("ONNXQ_ISA", "")
    if not forced:
        return levels[-1], None
    if forced not in levels:
        return None, f"ONNXQ_ISA={forced} is not a level of this CPU: {', '.join(levels)}"
    return forced, None


def _cpu_features() -> tuple[str, ...]:
    present = set((_cpu_info("flags") or _cpu_info("Features") or "").split())
    return tuple(flag for flag in _CPU_FLAGS if flag in present)


def _cpu_info(key: str) -> str | None:
    """The first value of ``key`` in /proc/cpuinfo; None where there is no such file or key."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def main() -> int:
    """Print the line on kernels that an installation ends with."""
    sys.stdout.write(doctor().kernels_line() + "\n")
    return 0
