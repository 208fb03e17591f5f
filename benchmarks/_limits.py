"""The limits of this machine that shares refer to, measured beside what is compared.

Not a benchmark itself. The loops are in C++ (`_limits.cc`): numpy's are not the fastest that read
memory, and it has no INT8 products.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("_limits.cc")
BLOCK = 512
ROUNDS, TRIALS = 20_000, 20


@cache
def library() -> Any:
    """The compiled loops.

    Raises:
        SystemExit: there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise SystemExit("no C++ compiler to measure the machine's limits with; set CXX")
    with tempfile.TemporaryDirectory(prefix="onnxq-limits-") as folder:
        target = Path(folder) / "limits.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w"]
        done = subprocess.run(
            [compiler, *flags, str(SOURCE), "-o", str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{compiler} cannot compile {SOURCE.name}: {done.stderr}")
        loaded = ctypes.CDLL(str(target))
    loaded.ReadBytes.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    for name in ("ReadBytes", "Int8Operations", "FloatOperations"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def reader(size: int) -> Callable[[], object]:
    """A function that reads ``size`` bytes, up to a multiple of 512, of memory of its own."""
    whole = -(-size // BLOCK) * BLOCK
    memory = np.ones(whole, np.uint8)
    read, address = library().ReadBytes, memory.ctypes.data
    return lambda: (read(address, whole), memory)[0]


def operations_per_second(int8: bool) -> float:
    """Multiplications and additions a second of one thread, in registers: INT8 or float32."""
    run = library().Int8Operations if int8 else library().FloatOperations
    return max(_rate(run) for _ in range(TRIALS))


def _rate(run: Callable[[ctypes.c_int64], int]) -> float:
    began = time.thread_time()
    done = run(ctypes.c_int64(ROUNDS))
    return done / (time.thread_time() - began)
