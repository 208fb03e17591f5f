from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda.emulation import Emulation
from tests.custom_ops.conftest import library

__all__ = ["emulation", "library"]

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "custom_ops" / "cuda"


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The kernels' bodies, compiled for this CPU."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("continuous integration needs a C++ compiler")
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    command = [
        *(compiler, "-std=c++17", "-O1", "-ffp-contract=off"),
        *("-Wall", "-Wextra", "-Wconversion", "-Werror", "-fPIC", "-shared"),
        *(f"-I{KERNELS}", f"-I{KERNELS.parent / 'include'}", f"-I{HERE}"),
        *(str(HERE / name) for name in ("emulate.cc", "emulate_float8.cc")),
        *(str(KERNELS / name) for name in ("dynamic.cc", "float8_product.cc")),
        *("-o", str(library)),
    ]
    subprocess.run(command, check=True)
    return Emulation(ctypes.CDLL(str(library)))
