"""The CUDA library compiles for both architectures, within its table of resources, and loads."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from onnxq import custom_ops
from onnxq.runtime import Library, inspect_library, require_onnxruntime
from onnxq.runtime.cuda import device_problem
from onnxq.runtime.library import CPU, CUDA
from tests.cuda.build import ARCHITECTURES, build_library, missing_tool, resource_use
from tests.custom_ops.cases import CASES, agrees, model_of, single_node_model

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
    "BlockVectors": 40,
    "BlockWarps": 40,
    "RowFactor": 40,
    "ExpandBytes": 40,
    "FinishFloat8": 32,
    "PlainFloat8": 64,
    "Float8Groups": 40,
    "Gather": 32,
    "Widen": 32,
    "ScaleIntegers": 32,
    "FindOutliers": 40,
    "OrderColumns": 40,
    "AddOutliers": 40,
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


def cpu_session(library: Path, model: bytes) -> Any:
    """A session on the CPU with the CUDA library registered."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"])


def test_registered_alone_in_a_cpu_session_it_is_refused(built: Path, tmp_path: Path) -> None:
    """No operator of the domain has a body once it is registered."""
    alone = shutil.copy(built, tmp_path)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        cpu_session(alone, single_node_model("Hadamard", "float32"))


def test_with_the_cpu_kernels_beside_it_every_operator_has_a_kernel(
    built: Path, library: Library, tmp_path: Path
) -> None:
    """The domain holds both libraries' kernels: what CUDA does not take is left to the CPU's."""
    both = Path(shutil.copy(built, tmp_path))
    shutil.copy(library.path, tmp_path)
    for kernel in library.kernels:
        case = next(iter(CASES[kernel.op](kernel.dtype)))
        made = cpu_session(both, model_of(kernel.op, case))
        got = made.run(None, case.inputs)
        assert agrees(kernel.op, case, got, kernel=True), kernel


def test_cpu_kernels_of_another_build_are_left_out(built: Path, tmp_path: Path) -> None:
    both = Path(shutil.copy(built, tmp_path))
    code = 'const char* onnxq_version() { return "0.0.0"; }\n'
    to = tmp_path / CPU.file_name
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", to]
    subprocess.run(command, input=code, text=True, check=True)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        cpu_session(both, single_node_model("Hadamard", "float32"))
