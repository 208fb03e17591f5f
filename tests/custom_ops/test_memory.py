"""Loading packed weights: no repacking, and no second copy of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxq.runtime import Library
from tests.custom_ops.cases import Case, model_of

K, N = 4096, 4096
MOST = 1.25
"""Of the bytes of the weights; a second copy would be 2."""
NOISE = 1e6

CHILD = """
import json, sys
import numpy as np
from onnxq.runtime import require_onnxruntime

def resident():
    with open("/proc/self/smaps_rollup") as rollup:
        return sum(int(line.split()[1]) for line in rollup if line.startswith("Rss:")) * 1024

def made(path):
    options = require_onnxruntime().SessionOptions()
    options.register_custom_ops_library(sys.argv[3])
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = 1
    return require_onnxruntime().InferenceSession(path, options)

x = np.ones((1, %d), np.float32)
small = made(sys.argv[2])  # what the first session of a process takes
before = resident()
session = made(sys.argv[1])
session.run(None, {"x": x})
print(json.dumps(resident() - before))
"""


def packed_case(bits: int, n: int) -> Case:
    """Random codes; 8 bits are the numbers of E4M3 and take float activations."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 120, size=(n // 32, K // 4, 16 * bits), dtype=np.uint8)
    levels = np.arange(1 << bits, dtype=np.float32)
    if bits == 8:
        levels = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    constants = {
        "codes": codes,
        "scales": np.ones((n // 32, K // 128, 32), np.float16),
        "zero_points": np.zeros((1, 1, 1), np.int8),
        "levels": levels,
        "bias": np.zeros(1, np.float32),
        "order": np.zeros(1, np.int32),
    }
    attributes = {
        "K": K, "N": n, "group": 128, "bits": bits, "int8_activations": int(bits < 8),
        "exponent_scales": 0, "factor": 1.0, "layout": 1,
    }  # fmt: skip
    return Case("", {"x": np.zeros((0, K), np.float32)}, constants, attributes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_memory_at_load_is_about_the_file(bits: int, tmp_path: Path, library: Library) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs /proc/self/smaps_rollup")
    paths = []
    for name, n in (("large", N), ("small", 32)):
        proto = onnx.load_from_string(model_of("QuantMatMul", packed_case(bits, n)))
        path = tmp_path / f"{name}.onnx"
        onnx.save(
            proto, path, save_as_external_data=True, location=f"{name}.data", size_threshold=64
        )
        paths.append(path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD % K, *map(str, paths), str(library.path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    weights = (tmp_path / "large.data").stat().st_size
    assert weights > K * N * bits / 8
    assert json.loads(child.stdout) <= MOST * weights + NOISE
