"""What `onnxq.session` and `onnxq doctor` say and do where CUDA is not as it should be.

The driver is played by a small library in its place.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

import onnxq
from onnxq import custom_ops
from onnxq.errors import UnsupportedError
from onnxq.runtime import cuda, doctor, session, usable_library
from onnxq.runtime.library import CUDA
from tests.custom_ops.cases import CASES, Case, agrees, model_of, quantized_weight
from tests.custom_ops.exact import quant_mat_mul

_DRIVER = """
int cuDriverGetVersion(int* version) {{ *version = {version}; return {answer}; }}
int cuInit(unsigned flags) {{ return {init}; }}
int cuDeviceGetCount(int* count) {{ *count = {devices}; return 0; }}
int cuDeviceGetAttribute(int* value, int which, int device) {{
  *value = which == 75 ? {major} : which == 76 ? {minor} : -1;
  return device;
}}
"""
_HEALTHY = {
    "version": 13000,
    "answer": 0,
    "init": 0,
    "devices": 1,
    "major": 9,
    "minor": 0,
}
_LIBRARY = """
const char* onnxq_abi_tag() {{ return "{tag}"; }}
const char* onnxq_version() {{ return "{version}"; }}
const char* onnxq_kernels() {{ return "{kernels}"; }}
int onnxq_cuda_runtime_version() {{ return 13000; }}
"""


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    cuda.usable_cuda_library.cache_clear()
    yield
    cuda.usable_cuda_library.cache_clear()


def build(code: str, to: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", to]
    subprocess.run(command, input=code, text=True, check=True)
    return to


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets up a driver of given answers and a CUDA library that fits, or one of another tag."""

    def make(*, driver: bool = True, tag: str = CUDA.abi_tag, **answers: int) -> None:
        at = tmp_path / "libcuda.so.1"
        if driver:
            build(_DRIVER.format(**{**_HEALTHY, **answers}), at)
        monkeypatch.setattr(cuda, "_DRIVER_LIBRARY", str(at))
        rows = [row for row in custom_ops.kernels() if row.provider == "CUDA"]
        kernels = "".join(f"{row.op} {row.since_version} CUDA {row.dtype}\\n" for row in rows)
        code = _LIBRARY.format(tag=tag, version=onnxq.__version__, kernels=kernels)
        library = build(code, tmp_path / "library.so")
        monkeypatch.setattr(cuda, "shipped_path", lambda **_: library)

    return make


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, None),
        ({"version": 13010, "major": 12}, None),
        ({"major": 8, "minor": 6}, None),
        ({"driver": False}, "there is no NVIDIA driver"),
        ({"answer": 34}, "does not answer"),
        ({"init": 100}, r"shows no GPU \(CUDA error 100\)"),
        ({"devices": 0}, "shows no GPU"),
        ({"version": 12080}, r"too old: it runs CUDA 12\.8, the kernels need 13\.0"),
        ({"major": 7, "minor": 5}, r"compute capability 7\.5; the kernels need 8\.0"),
        ({"tag": "onnxq-ops-cuda-abi-0"}, "its ABI tag is 'onnxq-ops-cuda-abi-0'"),
    ],
)
def test_what_is_missing_is_said(
    answers: dict[str, int],
    expected: str | None,
    machine: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import re

    machine(**answers)
    problem = cuda.cuda_problem()
    with caplog.at_level(logging.WARNING, logger="onnxq.runtime"):
        usable = cuda.usable_cuda_library()
    if expected is None:
        assert problem is None
        assert usable is not None
        assert usable.cuda_version == 13000
        assert not caplog.records
    else:
        assert problem is not None
        assert re.search(expected, problem)
        assert usable is None
        assert re.search(expected, caplog.text)
        assert "standard-ONNX bodies" in caplog.text
    report = doctor()
    assert report.cuda_problem == problem
    assert report.healthy is not any("cuda" in line.lower() for line in report.problems)
    assert any(line.startswith("cuda kernels") and str(problem or "usable") in line
               for line in report.lines())  # fmt: skip


def test_kernels_that_were_not_built(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(cuda, "shipped_path", lambda **_: None)
    problem = cuda.cuda_problem()
    assert problem is not None
    assert "ONNXQ_CUDA=1" in problem


def product(dtype: str) -> tuple[bytes, Case]:
    packed = quantized_weight(
        "int4", 40, 96, 32, int8_activations=False, rng=np.random.default_rng(2)
    )
    x = np.random.default_rng(4).normal(size=(3, 96)).astype(dtype)
    case = Case("product", {"x": x}, packed.inputs, packed.attributes)
    return model_of("QuantMatMul", case), case


def test_cuda_first_without_cuda_runs_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    if cuda.device_problem() is None:
        pytest.skip("there is a GPU here")
    model, case = product("float32")
    with caplog.at_level(logging.WARNING, logger="onnxq.runtime"):
        made = session(model, ["cuda", "cpu"], threads=1)
    assert made.get_providers() == ["CPUExecutionProvider"]
    assert "without CUDA" in caplog.text
    (y,) = made.run(None, case.inputs)
    exact, budget = quant_mat_mul({**case.inputs, **case.constants}, case.attributes)
    assert np.all(np.abs(y - exact) <= budget)


@pytest.mark.parametrize(("op", "dtype"), sorted(
    (k.op, k.dtype) for k in custom_ops.kernels() if k.provider == "CUDA" and k.dtype != "bfloat16"
))  # fmt: skip
def test_every_operator_of_cuda_runs_without_it(
    op: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A model for CUDA on a machine without: said, and right; also one with FP8 on both sides."""
    if cuda.device_problem() is None:
        pytest.skip("there is a GPU here")
    case = next(iter(CASES[op](dtype)))
    with caplog.at_level(logging.WARNING, logger="onnxq.runtime"):
        made = session(model_of(op, case), ["cuda", "cpu"], threads=1)
    assert "without CUDA" in caplog.text
    compiled = usable_library() is not None and op != "DynamicFloat8MatMul"
    assert agrees(op, case, made.run(None, case.inputs), kernel=compiled)


def test_cuda_alone_without_cuda_is_an_error() -> None:
    if cuda.device_problem() is None:
        pytest.skip("there is a GPU here")
    model, _ = product("float32")
    with pytest.raises(UnsupportedError) as caught:
        session(model, ["cuda"], threads=1)
    assert caught.value.code == "UNSUPPORTED-PROVIDER"


def test_model_for_cuda_in_a_cpu_session_runs_its_bodies(caplog: pytest.LogCaptureFixture) -> None:
    """bfloat16 activations have kernels on CUDA only."""
    model, case = product("float32")
    proto = onnx.load_from_string(model)
    bfloat16 = onnx.TensorProto.BFLOAT16
    # Float in and out, so that onnxruntime's Python interface can feed it.
    (inner,) = proto.graph.node
    x, y = inner.input[0], inner.output[0]
    inner.input[0], inner.output[0] = "narrow", "wide"
    proto.graph.node.insert(0, onnx.helper.make_node("Cast", [x], ["narrow"], to=bfloat16))
    proto.graph.node.append(onnx.helper.make_node("Cast", ["wide"], [y], to=onnx.TensorProto.FLOAT))
    with caplog.at_level(logging.WARNING, logger="onnxq.runtime"):
        made = session(proto.SerializeToString(), ["cpu"], threads=1)
    assert "standard-ONNX bodies" in caplog.text
    narrow = case.inputs["x"].astype(ml_dtypes.bfloat16).astype(np.float32)
    exact, budget = quant_mat_mul({**case.constants, "x": narrow}, case.attributes)
    (got,) = made.run(None, case.inputs)
    assert np.all(np.abs(got - exact) <= budget + np.abs(exact) * 2.0**-8)
