"""Slow comparison with public reference implementations, which are not a part of this project.

Set ONNXQ_REFERENCES to a folder that holds checkouts named ``microxcaling`` and ``fouroversix``;
torch must be importable. Without them the tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxq.formats import MxFormat, NvFp4Format

pytestmark = pytest.mark.slow
MX_NAMES = {
    "fp8e4m3": "fp8_e4m3",
    "fp8e5m2": "fp8_e5m2",
    "fp6e2m3": "fp6_e2m3",
    "fp6e3m2": "fp6_e3m2",
    "fp4": "fp4_e2m1",
    "int8": "int8",
}


def reference(folder: str, package: str, module: str) -> types.ModuleType:
    """A submodule, past the package's own __init__ (which asks for a GPU)."""
    pytest.importorskip("torch")
    root = os.environ.get("ONNXQ_REFERENCES")
    if root is None or not (Path(root) / folder).is_dir():
        pytest.skip(f"ONNXQ_REFERENCES has no {folder}")
    parts = package.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        shell = types.ModuleType(name)
        shell.__path__ = [str(Path(root, folder, *parts[:depth]))]
        sys.modules[name] = shell
    return importlib.import_module(f"{package}.{module}")


@pytest.mark.parametrize("element", MX_NAMES)
def test_mx_is_microxcaling_bit_for_bit(element: str) -> None:
    quantize = reference("microxcaling", "mx", "mx_ops")._quantize_mx
    import torch

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 45)).astype(np.float32)
    x *= 2.0 ** rng.integers(-20, 20, (1024, 1)).astype(np.float32)
    edges = np.zeros((6, 45), np.float32)
    edges[1:5, 0] = [2.0**-140, 3e38, np.inf, np.nan]
    edges[5, :3] = [1e-39, 3e-40, 1e-38]
    ties = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for case in (x, ties, edges):
        expected = quantize(
            torch.tensor(case), 8, MX_NAMES[element], axes=[-1], block_size=32, round="even"
        )
        np.testing.assert_array_equal(MxFormat(element).fake_quant(case), expected.numpy())


@pytest.mark.parametrize("four_over_six", [False, True])
def test_nvfp4_is_fouroversix(four_over_six: bool) -> None:
    ref = reference("fouroversix/src", "fouroversix.quantize.pytorch", "reference")
    utils = sys.modules["fouroversix.utils"]
    import torch

    x = np.random.default_rng(0).standard_normal((8192, 16)).astype(np.float32)
    blocks, amax = torch.tensor(x), torch.tensor(np.abs(x).max())
    nearest = utils.RoundStyle.nearest
    if four_over_six:
        values, scales = ref.nvfp4_fouroversix_block_scaled_quantization(
            blocks, amax, scale_rule=utils.ScaleRule.mse, round_style=nearest
        )
    else:
        values, scales = ref.generic_block_scaled_quantization(
            blocks,
            amax,
            fp4_format=utils.DataType.nvfp4,
            scale_rule=utils.ScaleRule.static_6,
            round_style=nearest,
        )
    fmt = NvFp4Format(four_over_six)
    params = fmt.params(x)
    ours = fmt.decode(fmt.encode(x, params))
    expected_scales = scales.reshape(-1, 1).to(torch.float32).numpy()
    np.testing.assert_array_equal(params.scale.astype(np.float32), expected_scales)
    np.testing.assert_array_equal(ours, values.numpy())
