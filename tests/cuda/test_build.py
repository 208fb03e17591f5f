"""The CUDA library compiles for both architectures, within its table of resources, and loads."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from onnxq import custom_ops
from onnxq.runtime import inspect_library, require_onnxruntime
from onnxq.runtime.cuda import device_problem
from onnxq.runtime.library import CUDA
from tests.cuda.build import ARCHITECTURES, build_library, missing_tool, resource_use
from tests.custom_ops.cases import single_node_model

# Registers of a thread at most. A multiprocessor has 65536: with 256 threads a block, 128 let two
# blocks of a GEMV run at once, 255 one block of the widest tile.
REGISTERS = {
    "Gemv": 128,
    "Tile<2>": 128,
    "Tile<4>": 168,
    "Tile<8>": 232,
    "Any": 64,
    "Expand": 64,
    "SumSplits": 32,
    "FinishSums": 32,
    "FindNanCodes": 32,
    "PerToken": 40,
    "HadamardRows": 80,
}


@pytest.fixture(scope="module")
def built() -> Path:
    missing = missing_tool()
    if missing is not None:
        pytest.skip(f"needs {missing}")
    return build_library()


def row_of(kernel: str) -> str:
    name, _, arguments = kernel.partition("<")
    return f"Tile<{arguments.rstrip('> ').split()[-1]}>" if name == "Tile" else name


@pytest.mark.usefixtures("built")
def test_registers_stay_in_the_table_and_none_spills() -> None:
    use = resource_use()
    for architecture in ARCHITECTURES:
        kernels = {one.kernel for one in use if one.architecture == architecture}
        assert {row_of(kernel) for kernel in kernels} == set(REGISTERS), architecture
        # 4 kinds of weights and 2 types of activations; tiles of 3 heights.
        assert sum(kernel.startswith("Gemv") for kernel in kernels) == 8
        assert sum(kernel.startswith("Tile") for kernel in kernels) == 24
    for one in use:
        assert (one.stack, one.spills) == (0, 0), one
        assert one.registers <= REGISTERS[row_of(one.kernel)], one


def test_library_fits_the_package(built: Path) -> None:
    library = inspect_library(built, CUDA)
    assert set(library.kernels) == {row for row in custom_ops.kernels() if row.provider == "CUDA"}
    assert library.cuda_version >= 12000


def test_library_needs_nothing_that_a_machine_without_cuda_lacks(built: Path) -> None:
    needed = subprocess.run(["ldd", built], capture_output=True, text=True, check=True).stdout
    assert "not found" not in needed
    for name in ("libcuda", "libcublas", "libonnxruntime"):
        assert name not in needed


def test_calls_without_a_driver_answer_with_a_code(built: Path) -> None:
    if device_problem() is None:
        pytest.skip("there is a GPU here")
    handle = ctypes.CDLL(str(built))
    handle.onnxq_cuda_error_text.restype = ctypes.c_char_p
    code = handle.onnxq_cuda_prepare()
    assert code != 0
    assert b"driver" in handle.onnxq_cuda_error_text(code)


def test_registered_in_a_cpu_session_it_is_refused(built: Path) -> None:
    """Which is why `onnxq.session` registers it with the CUDA provider alone."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(built))
    model = single_node_model("Hadamard", "float32")
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(model, options, ["CPUExecutionProvider"])
