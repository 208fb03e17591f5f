"""Builds the CUDA library for the tests, once: CMake knows what is up to date."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "build" / "cuda"
LOG = FOLDER / "ptxas.log"
LIBRARY = FOLDER / "custom_ops" / "cuda" / "libonnxq_ops_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90a")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Use:
    """What ptxas says of a kernel.

    Attributes:
        kernel: its name with template arguments, namespaces left out.
        architecture: ``sm_80`` or ``sm_90a``.
        registers: of a thread.
        stack: bytes of local memory of a thread.
        spills: bytes that are stored to local memory for want of registers.
    """

    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int


def missing_tool() -> str | None:
    """The tool without which the library cannot be built, or None."""
    return next(
        (name for name in ("nvcc", "cmake", "ninja", "g++") if not shutil.which(name)), None
    )


def build_library() -> Path:
    """The shared library, with a log of every kernel's compilation beside it.

    Raises:
        subprocess.CalledProcessError: it does not compile; the output holds why.
    """
    settings = ("-G", "Ninja", "-DONNXQ_CUDA=ON", "-DONNXQ_REQUIRE_KERNELS=ON")
    _run("cmake", "-S", str(REPOSITORY), "-B", str(FOLDER), *settings)
    # What somebody else built in this folder left nothing in the log.
    known = LOG.is_file() and LIBRARY.is_file() and _age(LOG) >= _age(LIBRARY)
    fresh = () if known else ("--clean-first",)
    output = _run(*("cmake", "--build", str(FOLDER), "--target", "onnxq_ops_cuda", "-j2"), *fresh)
    with LOG.open("a" if known else "w", encoding="utf-8") as log:
        log.write(output)
    LOG.touch()
    return LIBRARY


def resource_use() -> list[Use]:
    """Of every kernel of the library, as it was compiled last."""
    latest: dict[tuple[str, str], Use] = {}
    library = LIBRARY.read_bytes()  # names the kernels that it registers
    for found in _ENTRY.finditer(LOG.read_text(encoding="utf-8")):
        if found["name"].encode() not in library:
            continue
        name, architecture = _demangled(found["name"]), found["architecture"]
        numbers = (int(found[key]) for key in ("registers", "stack", "stores"))
        latest[name, architecture] = Use(name, architecture, *numbers)
    return list(latest.values())


def _demangled(name: str) -> str:
    """``_ZN...4Gemv...`` -> ``Gemv<Half, Affine4<Half> >``."""
    text = _run("c++filt", name).strip()
    text = re.sub(r"\(anonymous namespace\)::|onnxq::cuda::|^void ", "", text)
    return text.partition("(")[0]


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _run(*command: str) -> str:
    child = subprocess.run(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{child.stdout[-4000:]}")
    return child.stdout
